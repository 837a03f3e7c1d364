"""Writes leaves of an EasyLM stream; the format is described in backend/checkpoint/easylm.py."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import BinaryIO

import torch

from backend.checkpoint.easylm import DTYPES

MAX_CHUNK = 1 << 30  # bytes; above that flax writes an array in pieces
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_leaf(file: BinaryIO, key: Sequence[str], values: torch.Tensor, max_chunk: int = MAX_CHUNK) -> None:
    """Write one pair. `values`: contiguous, float32, float16 or bfloat16."""
    flat = values.contiguous().view(-1)
    parts = [b"\x92", _array(len(key)), *(_text(part) for part in key)]
    if values.nbytes <= max_chunk:
        starts = [_extension_start(values.shape, flat)]
        pieces = [flat]
    else:
        step = max(1, max_chunk // values.dtype.itemsize)
        pieces = list(flat.split(step))
        shape = b"".join(_text(str(i)) + _number(size) for i, size in enumerate(values.shape))
        head = _map(3) + _text("__msgpack_chunked_array__") + b"\xc3"
        head += _text("shape") + _map(values.ndim) + shape + _text("chunks") + _map(len(pieces))
        starts = [_text(str(i)) + _extension_start(piece.shape, piece) for i, piece in enumerate(pieces)]
        starts[0] = head + starts[0]
    nbytes = sum(len(start) for start in starts) + values.nbytes
    file.write(b"".join(parts) + _binary_start(nbytes))
    for start, piece in zip(starts, pieces, strict=True):
        file.write(start)
        file.write(memoryview(piece.view(torch.uint8).numpy()).cast("B"))


def _extension_start(shape: Sequence[int], values: torch.Tensor) -> bytes:
    """Everything before the values: extension 1, then shape, dtype name and the length of the bytes."""
    inner = b"\x93" + _array(len(shape)) + b"".join(_number(size) for size in shape)
    inner += _text(_NAMES[values.dtype]) + _binary_start(values.nbytes)
    return struct.pack(">BIb", 0xC9, len(inner) + values.nbytes, 1) + inner


def _array(count: int) -> bytes:
    return bytes([0x90 | count]) if count < 16 else struct.pack(">BH", 0xDC, count)


def _map(count: int) -> bytes:
    return bytes([0x80 | count]) if count < 16 else struct.pack(">BH", 0xDE, count)


def _text(text: str) -> bytes:
    data = text.encode()
    return (bytes([0xA0 | len(data)]) if len(data) < 32 else struct.pack(">BB", 0xD9, len(data))) + data


def _number(value: int) -> bytes:
    return bytes([value]) if value < 128 else struct.pack(">BQ", 0xCF, value)


def _binary_start(length: int) -> bytes:
    return struct.pack(">BI", 0xC6, length)
