"""Memory for what stays loaded, in huge pages where the system gives them; and pages of a file, brought ahead of use.

A model's weights are touched from end to end for every token. With pages of 4 KiB that is a hundred thousand page
faults while loading, and a miss in the processor's table of pages every 4 KiB ever after.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Sequence

import torch

_WORTH_IT = 4 << 20
_POPULATE_READ, _POPULATE_WRITE = 22, 23  # of madvise, since Linux 5.14; Python's mmap has no names for them
_COLLAPSE = 25  # the same, since Linux 6.1


def empty(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Like torch.empty, on the CPU."""
    tensor = torch.empty(tuple(shape), dtype=dtype)
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is not None and tensor.nbytes >= _WORTH_IT:
        start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        # Advice: whether it is taken changes nothing but the speed, so the answer does not matter.
        _advise(start, (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE, advice)
    return tensor


def bring(tensor: torch.Tensor) -> None:
    """Wait until the pages of a file that a tensor in one piece lies in are in memory: what reads it next need not."""
    first = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    last = -(-(tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE) * mmap.PAGESIZE
    if sys.platform == "linux" and not _advise(first, last, _POPULATE_READ):
        return
    tensor.view(torch.uint8).flatten()[:: mmap.PAGESIZE].sum()  # reads a byte of each page


def populate(address: int, count: int) -> bool:
    """Have the system give all pages that lie in these bytes now, instead of each when it is first written to. What is
    in them stays. Where a huge page fits it becomes one, if the system can. False where the system gives none ahead."""
    first, end = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE, (address + count) // mmap.PAGESIZE * mmap.PAGESIZE
    if sys.platform != "linux":
        return False
    if first < end:
        _advise(first, end, _COLLAPSE)
    return first >= end or not _advise(first, end, _POPULATE_WRITE)


def _advise(first: int, last: int, advice: int) -> int:
    """0: the system took it."""
    answer = ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), ctypes.c_int(advice))
    return int(answer)
