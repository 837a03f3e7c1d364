"""Small files beside a model, read with limits: what is too large, broken or of the wrong type is one sentence."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from backend.errors import CheckpointError

# Python needs up to about 100 bytes for an entry of a list or a table. Tokenizer files of 256,000 tokens and as many
# merges have two million.
_MAX_ENTRIES = 1 << 23


def read_file(path: Path, limit: int) -> bytes:
    """The whole file, of at most `limit` bytes. Raises CheckpointError."""
    try:
        if not path.is_file():  # a pipe would make us wait for ever
            raise CheckpointError(f"{path}: not a file")
        with open(path, "rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
    if len(data) > limit:
        raise CheckpointError(f"{path}: larger than {limit >> 20} MiB, which no such file is")
    return data


def read_json(path: Path, limit: int) -> dict[str, Any]:
    """The JSON object in a file of at most `limit` bytes. Raises CheckpointError."""
    data = read_file(path, limit)
    entries = data.count(b",") + data.count(b"[") + data.count(b"{")
    if entries > _MAX_ENTRIES:
        raise CheckpointError(f"{path}: about {entries} JSON entries, at most {_MAX_ENTRIES} can be right")
    try:
        content = json.loads(data.decode("utf-8-sig"), parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: broken JSON: {str(error)[:200]}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a JSON {type(content).__name__}, expected an object")
    return content


def _no_constant(name: str) -> float:
    # transformers writes Infinity for "no limit"; not a number is never meant.
    if name == "NaN":
        raise ValueError("NaN is no JSON value")
    return math.inf if name == "Infinity" else -math.inf
