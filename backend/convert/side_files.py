"""Small files beside the weights (config.json, tokenizer files): size-checked and parsed as plain data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from backend.tokenizer.jsonfile import read_file
from backend.tokenizer.jsonfile import read_json as read_limited

MAX_BYTES = 1 << 26  # the largest tokenizer.json in use has 33 MB
# What belongs to a Hugging Face tokenizer, and what goes along with a model that is rewritten.
TOKENIZER_FILES = (
    "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "vocab.json", "merges.txt",
)  # fmt: skip


def read_small(path: Path) -> bytes:
    """The whole file, after a look at its size. Raises CheckpointError."""
    return read_file(path, MAX_BYTES)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError."""
    return read_limited(path, MAX_BYTES)


def read_json_if_there(folder: Path, name: str) -> dict[str, Any]:
    """A JSON object, empty when the file is not there."""
    path = folder / name
    return read_json(path) if path.is_file() else {}
