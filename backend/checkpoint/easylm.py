"""EasyLM's checkpoint streams (Koala): msgpack pairs of a key path and one array, read lazily from the mapped file.

    pair:  [ ["transformer", "h", "0", "attention", "wq", "kernel"], bin ]
    bin:   msgpack ext type 1, whose content is msgpack [shape, dtype name, raw bytes in C order], as flax has it;
           an array above 1 GiB is {"__msgpack_chunked_array__": true, "shape": {"0": n, ..}, "chunks": {"0": ext, ..}}

A strict reader for this alone, not for msgpack at large: https://github.com/msgpack/msgpack/blob/master/spec.md. Every
count and length is checked against the bytes that are left before anything is made of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from backend.checkpoint.base import MAX_ELEMENTS
from backend.checkpoint.mapped import MappedFile
from backend.errors import CheckpointError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
MAX_LEAVES, MAX_PARTS, MAX_TEXT, MAX_DIMS, MAX_CHUNKS = 1 << 16, 32, 256, 4, 1 << 12
_CHUNKED = "__msgpack_chunked_array__"
_ARRAY_EXT = 1


@dataclass(frozen=True)
class _Span:
    """Bytes of the file: start and length."""

    at: int
    nbytes: int


class Leaf:
    """One array. `key` is its path with "/"; shape and extent were checked against the file."""

    def __init__(
        self, mapped: MappedFile, key: str, shape: tuple[int, ...], dtype: torch.dtype, parts: Sequence[_Span]
    ) -> None:
        self.key, self.shape, self.dtype = key, shape, dtype
        self._mapped, self._parts = mapped, tuple(parts)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self._parts)

    def values(self) -> torch.Tensor:
        """The array, of `shape` and `dtype`: a view of the mapped file, or a copy where it is in chunks."""
        parts = [self._mapped.typed(part.at, part.nbytes, self.dtype) for part in self._parts]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(self.shape)

    def release(self) -> None:
        for part in self._parts:
            self._mapped.releaser(part.at, part.nbytes)()


def looks_like_easylm(path: Path) -> bool:
    """Whether a file begins as such a stream: a pair whose first is a short list of short texts."""
    try:
        with open(path, "rb") as file:
            start = file.read(3)
    except OSError:
        return False
    return len(start) == 3 and start[0] == 0x92 and 0x91 <= start[1] <= 0x9F and (0xA1 <= start[2] <= 0xBF)


def read_easylm(path: Path) -> dict[str, Leaf]:
    """All arrays by key, "params/" in front taken off. Reads no values. Raises CheckpointError."""
    try:
        if not path.is_file():
            raise CheckpointError(f"{path}: there is no such file")
        if path.stat().st_size < 8:
            raise CheckpointError(f"{path}: is too short for an EasyLM stream")
        mapped = MappedFile(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from None
    leaves: dict[str, Leaf] = {}
    reader = _Reader(mapped)
    while reader.at < reader.end:
        if len(leaves) >= MAX_LEAVES:
            raise CheckpointError(f"{path}: more than {MAX_LEAVES} arrays")
        if reader.array("a pair", 2) != 2:
            raise reader.wrong("a list of another length", "a pair of key and array")
        key = "/".join(reader.text("a part of a key") for _ in range(reader.array("a key", MAX_PARTS)))
        while key.startswith("params/"):
            key = key.removeprefix("params/")
        if not key or key in leaves:
            raise CheckpointError(f"{path}: the key '{key}' is empty or appears twice")
        span = reader.binary(f"the value of '{key}'")
        leaves[key] = _leaf(_Reader(mapped, span), key)
    return leaves


def _leaf(reader: _Reader, key: str) -> Leaf:
    if not reader.is_map():
        shape, dtype, span = _array(reader)
        return Leaf(reader.mapped, key, shape, dtype, [span])
    whole: tuple[int, ...] = ()
    parts: list[_Span] = []
    dtypes: set[torch.dtype] = set()
    for _ in range(reader.map(f"'{key}'", 3)):
        name = reader.text("a name in a chunked array")
        if name == _CHUNKED:
            if not reader.true():
                raise reader.wrong("false", f"true for {_CHUNKED}")
        elif name == "shape":
            whole = tuple(reader.numbered("the shape", MAX_DIMS, lambda: reader.whole_number("a dimension")))
        elif name == "chunks":
            for _, dtype, span in reader.numbered("the chunks", MAX_CHUNKS, lambda: _array(reader)):
                dtypes.add(dtype)
                parts.append(span)
        else:
            raise reader.wrong(repr(name), "an array, whole or in chunks")
    if len(dtypes) != 1 or not parts:
        raise reader.wrong(f"{len(parts)} chunks of {len(dtypes)} types", f"the chunks of '{key}'")
    dtype = dtypes.pop()
    _check_size(reader, key, whole, dtype, sum(part.nbytes for part in parts))
    return Leaf(reader.mapped, key, whole, dtype, parts)


def _array(reader: _Reader) -> tuple[tuple[int, ...], torch.dtype, _Span]:
    inner = _Reader(reader.mapped, reader.extension(_ARRAY_EXT))
    if inner.array("an array", 3) != 3:
        raise inner.wrong("a list of another length", "shape, dtype and bytes")
    shape = tuple(inner.whole_number("a dimension") for _ in range(inner.array("a shape", MAX_DIMS)))
    name = inner.text("a dtype")
    if name not in DTYPES:
        raise inner.wrong(f"the dtype '{name}'", " or ".join(DTYPES))
    span = inner.binary("the values")
    if inner.at != inner.end:
        raise inner.wrong(f"{inner.end - inner.at} bytes more", "the end of an array")
    _check_size(inner, "an array", shape, DTYPES[name], span.nbytes)
    return shape, DTYPES[name], span


def _check_size(reader: _Reader, what: str, shape: tuple[int, ...], dtype: torch.dtype, nbytes: int) -> None:
    elements = math.prod(shape)
    if not shape or min(shape) < 1 or elements > MAX_ELEMENTS or elements * dtype.itemsize != nbytes:
        raise reader.wrong(f"{nbytes} bytes for {what} of shape {shape}", "as many as the shape needs")


class _Reader:
    """Reads msgpack values one after the other from a span of the file."""

    def __init__(self, mapped: MappedFile, span: _Span | None = None) -> None:
        self.mapped = mapped
        self.at = span.at if span else 0
        self.end = span.at + span.nbytes if span else mapped.size

    def wrong(self, found: str, expected: str) -> CheckpointError:
        return CheckpointError(
            f"{self.mapped.path}: at byte {self.at} there is {found}, expected {expected}; "
            "it is no EasyLM stream, or it is damaged"
        )

    def array(self, what: str, limit: int) -> int:
        return self._count(what, limit, 0x90, {0xDC: 2, 0xDD: 4})

    def map(self, what: str, limit: int) -> int:
        return self._count(what, limit, 0x80, {0xDE: 2, 0xDF: 4})

    def is_map(self) -> bool:
        first = self._peek()
        return 0x80 <= first <= 0x8F or first in (0xDE, 0xDF)

    def text(self, what: str) -> str:
        first = self._byte(what)
        if 0xA0 <= first <= 0xBF:
            length = first - 0xA0
        elif first in (0xD9, 0xDA, 0xDB):
            length = self._number({0xD9: 1, 0xDA: 2, 0xDB: 4}[first], what)
        else:
            raise self.wrong(f"type {first:#04x}", f"a text for {what}")
        if length > MAX_TEXT:
            raise self.wrong(f"a text of {length} bytes", f"at most {MAX_TEXT} for {what}")
        try:
            return self._take(length, what).decode("utf-8")
        except UnicodeDecodeError:
            raise self.wrong("bytes that are not UTF-8", f"a text for {what}") from None

    def binary(self, what: str) -> _Span:
        """Bytes, or the raw texts that old versions of msgpack wrote for them: not read, only skipped."""
        first = self._byte(what)
        sizes = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4}
        if 0xA0 <= first <= 0xBF:
            return self._skip(first - 0xA0, what)
        if first not in sizes:
            raise self.wrong(f"type {first:#04x}", f"bytes for {what}")
        return self._skip(self._number(sizes[first], what), what)

    def extension(self, kind: int) -> _Span:
        first = self._byte("an array")
        fixed, sizes = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}, {0xC7: 1, 0xC8: 2, 0xC9: 4}
        if first in fixed:
            length = fixed[first]
        elif first in sizes:
            length = self._number(sizes[first], "an array")
        else:
            raise self.wrong(f"type {first:#04x}", "an array")
        found = self._byte("an array")
        if found != kind:
            raise self.wrong(f"an extension of type {found}", f"type {kind}, an array")
        return self._skip(length, "an array")

    def whole_number(self, what: str) -> int:
        first = self._byte(what)
        if first <= 0x7F:
            return first
        sizes = {0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8}
        if first not in sizes:
            raise self.wrong(f"type {first:#04x}", f"a whole number for {what}")
        return self._number(sizes[first], what)

    def true(self) -> bool:
        return self._byte("a truth value") == 0xC3

    def numbered(self, what: str, limit: int, read: Any) -> list[Any]:
        """The values of {"0": .., "1": ..}, which is how flax writes a tuple; a plain list is taken too."""
        if not self.is_map():
            return [read() for _ in range(self.array(what, limit))]
        found = {self.text(what): read() for _ in range(self.map(what, limit))}
        if sorted(found, key=lambda key: (len(key), key)) != [str(number) for number in range(len(found))]:
            raise self.wrong("other keys", f"numbers from 0 up for {what}")
        return [found[str(number)] for number in range(len(found))]

    def _count(self, what: str, limit: int, fixed: int, sizes: dict[int, int]) -> int:
        first = self._byte(what)
        if fixed <= first <= fixed + 15:
            count = first - fixed
        elif first in sizes:
            count = self._number(sizes[first], what)
        else:
            raise self.wrong(f"type {first:#04x}", what)
        if count > limit:
            raise self.wrong(f"a count of {count}", f"at most {limit} for {what}")
        return count

    def _peek(self) -> int:
        if self.at >= self.end:
            raise self.wrong("the end", "more")
        return int(self.mapped.bytes[self.at])

    def _byte(self, what: str) -> int:
        return self._take(1, what)[0]

    def _number(self, size: int, what: str) -> int:
        return int.from_bytes(self._take(size, what), "big")

    def _take(self, length: int, what: str) -> bytes:
        span = self._skip(length, what)
        return self.mapped.slice(span.at, length).numpy().tobytes()

    def _skip(self, length: int, what: str) -> _Span:
        if length > self.end - self.at:
            raise self.wrong(f"the end after {self.end - self.at} bytes", f"{length} bytes of {what}")
        span = _Span(self.at, length)
        self.at += length
        return span
