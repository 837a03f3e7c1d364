"""A file mapped into memory, read-only in effect: pages come when touched and can be given back after use."""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch


class MappedFile:
    """`bytes`: uint8 (size,), a private mapping, so that nothing we do can write to the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with open(path, "rb") as file:
            self.size = os.fstat(file.fileno()).st_size
            self._map = _private_map(file.fileno())
        self.bytes = torch.frombuffer(self._map, dtype=torch.uint8)

    def slice(self, offset: int, nbytes: int) -> torch.Tensor:
        """uint8 (nbytes,), a view. The caller has checked the extent."""
        return self.bytes[offset : offset + nbytes]

    def typed(self, offset: int, nbytes: int, dtype: torch.dtype) -> torch.Tensor:
        """The bytes as (n,) numbers; a view where the offset is aligned to the type, else a copy."""
        part = self.slice(offset, nbytes)
        return (part if offset % dtype.itemsize == 0 else part.clone()).view(dtype)

    def releaser(self, offset: int, nbytes: int) -> Callable[[], None]:
        """A function that gives the whole pages of this part back to the operating system."""

        def release() -> None:
            first = -(-offset // mmap.PAGESIZE) * mmap.PAGESIZE
            last = (offset + nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
            if hasattr(mmap, "MADV_DONTNEED") and last > first:
                self._map.madvise(mmap.MADV_DONTNEED, first, last - first)

        return release


def read_ahead(files: Sequence[Path]) -> None:
    """Ask the system to read files soon, while we still work on what came before; for what memory has room for."""
    if not hasattr(os, "posix_fadvise"):
        return
    room = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    for path in files:
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size <= room:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
                    room -= size
        except OSError:  # advice: reading will say what is wrong
            continue


def _private_map(descriptor: int) -> mmap.mmap:
    """Writable in name, because torch wants that, and private: what is written never reaches the file.

    No swap is reserved for it (NORESERVE), or a file larger than the memory could not even be looked at.
    """
    if not hasattr(mmap, "MAP_PRIVATE"):  # Windows
        return mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)
    flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
    return mmap.mmap(descriptor, 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
