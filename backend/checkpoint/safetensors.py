"""safetensors files, read strictly: https://github.com/huggingface/safetensors#format

    u64 little-endian n | n bytes of JSON | data
    JSON: {"__metadata__": {str: str}, name: {"dtype": "F16", "shape": [rows, columns], "data_offsets": [begin, end]}}

Offsets count from the start of the data; together the tensors cover it without gaps or overlaps. Nothing of the header
is believed before it was checked against the file's size.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from backend.checkpoint.base import MAX_ELEMENTS
from backend.checkpoint.container import RawTensor, RawTensors
from backend.checkpoint.mapped import MappedFile
from backend.checkpoint.strictjson import parse_json
from backend.errors import CheckpointError

MAX_HEADER = 100_000_000  # bytes; the format's own limit
MAX_NAME = 1024  # characters
MAX_DIMENSIONS = 8
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_FIELDS = {"dtype", "shape", "data_offsets"}


def is_safetensors(path: Path) -> bool:
    """Does the file begin as one: a possible header length, then an opening brace? OSError when it cannot be read."""
    with open(path, "rb") as file:
        start = file.read(9)
        size = os.fstat(file.fileno()).st_size
    return (
        len(start) == 9 and start[8:] == b"{" and 2 <= int.from_bytes(start[:8], "little") <= min(MAX_HEADER, size - 8)
    )


def read_safetensors(path: Path) -> RawTensors:
    """All tensors of a file, in the order of their data. Reads the header only; the data is mapped.

    Raises CheckpointError that names the file and, where there is one, the tensor.
    """
    try:
        if not path.is_file():  # a pipe would wait for ever
            raise CheckpointError(f"{path}: there is no such file")
        header, data_start, size = _header(path)
        mapped = MappedFile(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from None
    if mapped.size != size:
        raise CheckpointError(f"{path}: changed its size while it was opened")
    _check_metadata(path, header.pop("__metadata__", {}))
    tensors = [_tensor(mapped, name, entry, data_start) for name, entry in header.items()]
    tensors.sort(key=lambda found: found[:2])
    _check_cover(path, tensors, size - data_start)
    return {tensor.name: tensor for _, _, tensor in tensors}


def _header(path: Path) -> tuple[dict[str, Any], int, int]:
    """The JSON object, the offset at which data begins, the file's size."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size < 10:
            raise CheckpointError(f"{path}: has {size} bytes, too few for a safetensors file")
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER:
            raise CheckpointError(f"{path}: the header claims {length} bytes, at most {MAX_HEADER} can be right")
        if length > size - 8:
            raise CheckpointError(
                f"{path}: the header claims {length} bytes, but the file has {size}; it is incomplete or damaged"
            )
        data = file.read(length)
    if len(data) != length or not data.startswith(b"{"):
        raise CheckpointError(f"{path}: the header is no JSON object, so this is no safetensors file")
    return parse_json(data, f"{path}: the header"), 8 + length, size


def _check_metadata(path: Path, metadata: Any) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ is not an object of strings")


def _tensor(mapped: MappedFile, name: str, entry: Any, data_start: int) -> tuple[int, int, RawTensor]:
    """Begin and end in the data, and the tensor."""
    path = mapped.path
    if not 0 < len(name) <= MAX_NAME or not name.isprintable():
        raise CheckpointError(
            f"{path}: a tensor has the name {name[:100]!r}, expected 1 to {MAX_NAME} printable characters"
        )
    if not isinstance(entry, dict) or set(entry) != _FIELDS:
        raise CheckpointError(f"{path}: tensor '{name}' is not described by dtype, shape and data_offsets alone")
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(kind, str) or kind not in DTYPES:
        raise CheckpointError(
            f"{path}: tensor '{name}' has the dtype {str(kind)[:50]!r}; known are {', '.join(DTYPES)}"
        )
    if not _whole_numbers(shape) or len(shape) > MAX_DIMENSIONS:
        raise CheckpointError(
            f"{path}: tensor '{name}' has the shape {str(shape)[:100]}; "
            f"expected at most {MAX_DIMENSIONS} whole numbers from 0 up"
        )
    if not _whole_numbers(offsets) or len(offsets) != 2:
        raise CheckpointError(
            f"{path}: tensor '{name}' has the offsets {str(offsets)[:100]}; expected two whole numbers"
        )
    begin, end = offsets
    available = mapped.size - data_start
    if not begin <= end <= available:
        raise CheckpointError(
            f"{path}: tensor '{name}' claims bytes {begin} to {end} of the data, but there are {available}; "
            "the file is incomplete or damaged, download it again"
        )
    elements, nonzero = 1, 1
    for size in shape:
        elements, nonzero = elements * size, nonzero * max(size, 1)
    if nonzero > MAX_ELEMENTS:
        raise CheckpointError(f"{path}: tensor '{name}' claims the shape {tuple(shape)}, more than any model has")
    dtype = DTYPES[kind]
    if elements * dtype.itemsize != end - begin:
        raise CheckpointError(
            f"{path}: tensor '{name}' of shape {tuple(shape)} and dtype {kind} needs {elements * dtype.itemsize} "
            f"bytes, but its offsets give it {end - begin}"
        )
    offset, nbytes = data_start + begin, end - begin
    view = _viewer(mapped, offset, nbytes, dtype, tuple(shape))
    raw = RawTensor(name, tuple(shape), dtype, nbytes, path, view, mapped.releaser(offset, nbytes))
    return begin, end, raw


def _viewer(
    mapped: MappedFile, offset: int, nbytes: int, dtype: torch.dtype, shape: tuple[int, ...]
) -> Callable[[], torch.Tensor]:
    return lambda: mapped.typed(offset, nbytes, dtype).view(shape)


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_cover(path: Path, tensors: list[tuple[int, int, RawTensor]], available: int) -> None:
    """The tensors, sorted by offset, follow each other without a gap or overlap up to the end of the file."""
    at, before = 0, "the header"
    for begin, end, tensor in tensors:
        if begin != at:
            problem = "overlaps" if begin < at else "leaves a gap after"
            raise CheckpointError(f"{path}: tensor '{tensor.name}' {problem} {before} in the file")
        at, before = end, f"tensor '{tensor.name}'"
    if at != available:
        raise CheckpointError(f"{path}: {available - at} bytes after {before} belong to no tensor; the file is damaged")
