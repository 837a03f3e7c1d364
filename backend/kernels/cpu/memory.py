"""Memory for what stays loaded: in huge pages where the system gives them.

A model's weights are touched from end to end for every token. With pages of 4 KiB that is a hundred thousand page
faults while loading, and a miss in the processor's table of pages every 4 KiB ever after.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence

import torch

_WORTH_IT = 4 << 20


def empty(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Like torch.empty, on the CPU."""
    tensor = torch.empty(tuple(shape), dtype=dtype)
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is not None and tensor.nbytes >= _WORTH_IT:
        start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (tensor.data_ptr() + tensor.nbytes - start) // mmap.PAGESIZE * mmap.PAGESIZE
        # Advice: whether it is taken changes nothing but the speed, so the answer does not matter.
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), ctypes.c_int(advice))
    return tensor
