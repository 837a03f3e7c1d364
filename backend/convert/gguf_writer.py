"""Writes GGUF v3: the header first, since all sizes are known, then one tensor after the other in pieces of rows.

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Knows nothing of models; what keys and tensors there
are is decided elsewhere.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

from backend.convert.output import ConvertError
from backend.weights.blocks import BlockFormat

ALIGNMENT = 32
_U32, _I32, _F32, _BOOL, _STRING, _ARRAY, _U64, _I64 = 4, 5, 6, 7, 8, 9, 10, 11
_PACK = {_U32: "I", _I32: "i", _F32: "f", _BOOL: "?", _U64: "Q", _I64: "q"}


@dataclass(frozen=True)
class OutTensor:
    """One tensor to write, under the file's name. `shape` (rows, columns) or (n,)."""

    name: str
    shape: tuple[int, ...]
    format: BlockFormat

    @property
    def nbytes(self) -> int:
        rows = 1
        for size in self.shape[:-1]:
            rows *= size
        return rows * self.format.row_bytes(self.shape[-1])


def header(keys: Mapping[str, Any], tensors: Sequence[OutTensor]) -> bytes:
    """Everything before the tensor data, padded. Tensors follow in this order, each padded to ALIGNMENT."""
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(keys))]
    for key, value in keys.items():
        parts += [_string(key), _value(key, value)]
    offset = 0
    for tensor in tensors:
        assert tensor.format.ggml_id is not None
        parts.append(_string(tensor.name))
        parts.append(struct.pack("<I", len(tensor.shape)))
        parts.append(struct.pack(f"<{len(tensor.shape)}Q", *reversed(tensor.shape)))  # innermost dimension first
        parts.append(struct.pack("<IQ", tensor.format.ggml_id, offset))
        offset += padded(tensor.nbytes)
    data = b"".join(parts)
    return data + bytes(padded(len(data)) - len(data))


def pad(file: BinaryIO, nbytes: int) -> None:
    """After a tensor of `nbytes` bytes: zeros up to the next tensor's start."""
    file.write(bytes(padded(nbytes) - nbytes))


def padded(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _value(key: str, value: Any) -> bytes:
    """Type and value. bool, int, float and str become bool, uint32, float32 and string; lists become arrays."""
    if isinstance(value, (list, tuple)):
        kind = _array_kind(key, value)
        start = struct.pack("<IIQ", _ARRAY, kind, len(value))
        if kind == _STRING:
            return start + b"".join(_string(item) for item in value)
        return start + struct.pack(f"<{len(value)}{_PACK[kind]}", *value)
    kind = _kind(key, value)
    if kind == _STRING:
        return struct.pack("<I", kind) + _string(value)
    return struct.pack("<I" + _PACK[kind], kind, value)


def _kind(key: str, value: Any) -> int:
    if isinstance(value, bool):
        return _BOOL
    if isinstance(value, int):
        if value < 0:
            return _I32 if value >= -(1 << 31) else _I64
        return _U32 if value < 1 << 32 else _U64
    if isinstance(value, float):
        return _F32
    if isinstance(value, str):
        return _STRING
    raise ValueError(f"key '{key}' has a value of type {type(value).__name__}")


def _array_kind(key: str, values: Sequence[Any]) -> int:
    if all(isinstance(value, int) and not isinstance(value, bool) for value in values):
        small = all(-(1 << 31) <= value < 1 << 31 for value in values)
        return _I32 if small else _I64
    if all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
        return _F32
    kinds = {_kind(key, value) for value in values}
    if len(kinds) != 1:
        raise ValueError(f"key '{key}' is an array of mixed types")
    return kinds.pop()


def _string(text: str) -> bytes:
    try:
        data = text.encode("utf-8")
    except UnicodeEncodeError:  # JSON can spell halves of characters
        raise ConvertError(f"the text {text[:40]!r} has no UTF-8 form and cannot be written to a GGUF file") from None
    return struct.pack("<Q", len(data)) + data
