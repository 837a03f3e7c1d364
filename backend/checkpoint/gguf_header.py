"""The header of a GGUF file, v1 to v3: metadata and where each tensor lies.

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Every count, length and offset is checked against
the bytes that are there before anything is allocated, because files come from strangers.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backend.checkpoint.base import checked_extent
from backend.errors import CheckpointError
from backend.weights.blocks import BY_GGML_ID, OTHER_GGML_NAMES, BlockFormat

MAGIC = b"GGUF"
MAX_TENSORS = 1 << 16
MAX_KEYS = 1 << 16
MAX_NAME = 1 << 16
MAX_ARRAY = 1 << 24  # the largest vocabularies and merge lists have under a million entries

_SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class GGUFTensor:
    """One entry of the tensor table. `shape`: rows first; the file lists the innermost dimension first."""

    name: str
    shape: tuple[int, ...]
    format: BlockFormat
    offset: int  # from the start of the file
    nbytes: int


def read_header(path: Path) -> Header:
    """Open, check and parse. Raises CheckpointError."""
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        if size < 16:
            raise CheckpointError(f"{path}: {size} bytes are too few for a GGUF file")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            return Header(path, view)


class Header:
    """The parsed header: version, metadata, and tensors by file name."""

    def __init__(self, path: Path, view: mmap.mmap) -> None:
        self.path, self._view, self._at, self._size = path, view, 0, len(view)
        if self._take(4, "the magic") != MAGIC:
            raise CheckpointError(f"{path}: does not start with 'GGUF', so it is no GGUF file")
        self.version = self._scalar("I", "the version")
        if self.version not in (1, 2, 3):
            if self.version in (0x01000000, 0x02000000, 0x03000000):
                raise CheckpointError(f"{path}: a big-endian GGUF file; only little-endian files can be opened")
            raise CheckpointError(f"{path}: GGUF version {self.version}; versions 1 to 3 can be opened")
        self._length = "I" if self.version == 1 else "Q"  # counts, lengths and dimensions
        n_tensors = self._count("the number of tensors", MAX_TENSORS)
        n_keys = self._count("the number of keys", MAX_KEYS)
        self.metadata = self._read_metadata(n_keys)
        self.tensors = self._read_tensors(n_tensors)

    # primitive reads, each bounded by the bytes that are left ---------------------------------------------------------

    def _take(self, length: int, what: str) -> bytes:
        if length > self._size - self._at:
            raise CheckpointError(
                f"{self.path}: the header ends in the middle of {what}: {length} bytes wanted at {self._at}, "
                f"the file has {self._size}; it is incomplete or damaged, download it again"
            )
        piece = self._view[self._at : self._at + length]
        self._at += length
        return piece

    def _scalar(self, code: str, what: str) -> Any:
        return struct.unpack("<" + code, self._take(struct.calcsize("<" + code), what))[0]

    def _count(self, what: str, limit: int) -> int:
        count = self._scalar(self._length, what)
        if count > limit:
            raise CheckpointError(f"{self.path}: {what} is {count}, at most {limit} can be right")
        return int(count)

    def _string(self, what: str, limit: int | None = None) -> str:
        length = self._scalar(self._length, f"the length of {what}")
        if limit is not None and length > limit:
            raise CheckpointError(f"{self.path}: {what} claims {length} bytes, at most {limit} can be right")
        try:
            return self._take(length, what).decode("utf-8")
        except UnicodeDecodeError:
            raise CheckpointError(f"{self.path}: {what} is not valid UTF-8") from None

    def _value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self._string(f"the value of '{key}'")
        if kind == _ARRAY:
            return self._array(key)
        if kind not in _SCALARS:
            raise CheckpointError(f"{self.path}: key '{key}' has the unknown type {kind}")
        return self._scalar(_SCALARS[kind], f"the value of '{key}'")

    def _array(self, key: str) -> list[Any]:
        kind = self._scalar("I", f"the array type of '{key}'")
        length = self._scalar(self._length, f"the array length of '{key}'")
        if kind == _STRING:
            smallest = struct.calcsize("<" + self._length)  # an empty string still has its length
        elif kind in _SCALARS:
            smallest = struct.calcsize("<" + _SCALARS[kind])
        else:
            raise CheckpointError(f"{self.path}: key '{key}' is an array of the unknown or nested type {kind}")
        if length > MAX_ARRAY or length * smallest > self._size - self._at:
            raise CheckpointError(
                f"{self.path}: array '{key}' claims {length} entries, more than the file of {self._size} bytes can hold"
            )
        if kind == _STRING:
            return self._strings(key, length)
        return list(struct.unpack(f"<{length}{_SCALARS[kind]}", self._take(length * smallest, f"array '{key}'")))

    def _strings(self, key: str, count: int) -> list[str]:
        """Vocabularies and merges have up to half a million of them: one plain loop, the sentence only when needed."""
        width, view, at, size = struct.calcsize("<" + self._length), self._view, self._at, self._size
        texts: list[str] = []
        for index in range(count):
            start = at + width
            end = start + int.from_bytes(view[at:start], "little")
            try:
                if end > size:
                    raise ValueError
                texts.append(view[start:end].decode("utf-8"))
            except ValueError:  # also what is no UTF-8
                self._at = at
                self._string(f"entry {index} of '{key}'")  # raises
            at = end
        self._at = at
        return texts

    # the two tables ---------------------------------------------------------------------------------------------------

    def _read_metadata(self, n_keys: int) -> dict[str, Any]:
        metadata: dict[str, Any] = {}
        for index in range(n_keys):
            key = self._string(f"key {index}", MAX_NAME)
            if key in metadata:
                raise CheckpointError(f"{self.path}: key '{key}' appears twice")
            metadata[key] = self._value(self._scalar("I", f"the type of '{key}'"), key)
        return metadata

    def _read_tensors(self, n_tensors: int) -> dict[str, GGUFTensor]:
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1) or alignment > 1 << 20:
            raise CheckpointError(f"{self.path}: general.alignment is {alignment!r}, expected a power of two from 8 up")
        entries = [self._read_tensor_entry(index) for index in range(n_tensors)]
        data_start = -(-self._at // alignment) * alignment
        tensors: dict[str, GGUFTensor] = {}
        for name, shape, type_id, offset in entries:
            if name in tensors:
                raise CheckpointError(f"{self.path}: tensor '{name}' appears twice")
            if offset % alignment:
                raise CheckpointError(f"{self.path}: tensor '{name}' starts at {offset}, not a multiple of {alignment}")
            if type_id not in BY_GGML_ID:
                label = OTHER_GGML_NAMES.get(type_id, f"id {type_id}")
                known = ", ".join(fmt.name for fmt in BY_GGML_ID.values())
                raise CheckpointError(f"{self.path}: tensor '{name}' is stored as {label}; this version opens {known}")
            fmt = BY_GGML_ID[type_id]
            nbytes = checked_extent(self.path, name, shape, fmt, data_start + offset, self._size)
            tensors[name] = GGUFTensor(name, shape, fmt, data_start + offset, nbytes)
        _refuse_overlaps(self.path, tensors)
        return tensors

    def _read_tensor_entry(self, index: int) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string(f"the name of tensor {index}", MAX_NAME)
        n_dims = self._scalar("I", f"the dimensions of tensor '{name}'")
        if not 1 <= n_dims <= 4:
            raise CheckpointError(f"{self.path}: tensor '{name}' has {n_dims} dimensions, expected 1 to 4")
        form = f"<{n_dims}{self._length}"
        dims = struct.unpack(form, self._take(struct.calcsize(form), f"the dimensions of tensor '{name}'"))
        type_id = self._scalar("I", f"the type of tensor '{name}'")
        offset = self._scalar("Q", f"the offset of tensor '{name}'")
        return name, tuple(reversed(dims)), type_id, offset  # the file lists the innermost dimension first


def _refuse_overlaps(path: Path, tensors: Mapping[str, GGUFTensor]) -> None:
    ordered = sorted(tensors.values(), key=lambda info: info.offset)
    for before, after in zip(ordered, ordered[1:], strict=False):
        if before.offset + before.nbytes > after.offset:
            raise CheckpointError(f"{path}: tensors '{before.name}' and '{after.name}' overlap in the file")
