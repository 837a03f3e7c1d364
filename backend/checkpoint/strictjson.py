"""JSON from model folders: bounded in size, depth and digits, no key twice, always an object at the top."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from backend.errors import CheckpointError

MAX_JSON_BYTES = 64 << 20  # the index of the largest model known has 10 MB
MAX_VALUES = 4 << 20  # parsed, each takes some dozens of bytes
MAX_DEPTH = 32
MAX_DIGITS = 20  # of a whole number; offsets and sizes need at most 19


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file. CheckpointError when it is missing, too large, no JSON, or another kind of value."""
    try:
        if not path.is_file():  # a pipe would wait for ever
            raise CheckpointError(f"{path}: there is no such file")
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: has {size} bytes, at most {MAX_JSON_BYTES} can be right")
        with open(path, "rb") as file:
            data = file.read(MAX_JSON_BYTES)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from None
    return parse_json(data, str(path))


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """The object in `data`, which must be UTF-8. `where`: how the error sentence begins.

    NaN and Infinity come back as floats: whoever takes a number checks its range.
    """
    # Every value but the first of a list or an object follows one of these, so this counts before anything is made.
    values = sum(map(data.count, (b",", b"[", b"{")))
    if values > MAX_VALUES:
        raise CheckpointError(f"{where}: holds about {values} values, at most {MAX_VALUES} can be right")
    try:
        value = json.loads(data.decode("utf-8-sig"), object_pairs_hook=_object, parse_int=_integer)
    except UnicodeDecodeError:
        raise CheckpointError(f"{where}: is not valid UTF-8") from None
    except RecursionError:
        raise CheckpointError(f"{where}: is nested deeper than {MAX_DEPTH} levels") from None
    except json.JSONDecodeError as error:
        raise CheckpointError(
            f"{where}: is not valid JSON: {error.msg} (line {error.lineno}, column {error.colno})"
        ) from None
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: holds a {type(value).__name__}, expected a JSON object")
    if _deeper_than(value, MAX_DEPTH):
        raise CheckpointError(f"{where}: is nested deeper than {MAX_DEPTH} levels")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key {key[:100]!r} appears twice")
        result[key] = value
    return result


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a whole number has {len(digits)} digits, at most {MAX_DIGITS} can be right")
    return int(digits)


def _deeper_than(value: Any, depth: int) -> bool:
    """Level by level and not by recursion; the parser has already stopped at the interpreter's own limit."""
    level = [value]
    for _ in range(depth):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True
