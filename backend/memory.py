"""Memory of the machine: how much is free, giving back what nobody uses, and knowing an allocation that failed."""

from __future__ import annotations

import ctypes
import gc
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch

_M_MMAP_THRESHOLD = -3  # of mallopt(3)
# What torch and its libraries say in plain RuntimeErrors when there is no memory.
_FAILED_ALLOCATION = ("can't allocate memory", "not enough memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def is_allocation_failure(error: BaseException) -> bool:
    """Whether an exception means that memory ran out, on whatever device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _FAILED_ALLOCATION)


def free_bytes(device: torch.device | str = "cpu") -> int:
    """Bytes that can still be had on a device. One that shares the host's memory counts as the host."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(torch.device(device))[0])
    return psutil.virtual_memory().available


def give_back() -> None:
    """Return to the system what nothing refers to any more.

    Large tensors on the CPU are mapped one by one and return when they are freed; what is smaller stays with the C
    library's allocator unless it is told to trim. CUDA memory stays with torch's own allocator unless it is told to.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if _has_c_library() else None
    if trim is not None:  # glibc has it, others return memory by themselves
        trim(0)
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


@contextmanager
def mapping_temporaries() -> Iterator[None]:
    """While this lasts, blocks of 1 MiB and more are mapped one by one, so that a freed one returns at once.

    glibc stops doing so after the first large block that is freed, and then what a load needed for a moment leaves
    holes of many megabytes. Elsewhere nothing changes.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None) if _has_c_library() else None
    if set_option is None:
        yield
        return
    set_option(_M_MMAP_THRESHOLD, 1 << 20)
    try:
        yield
    finally:
        set_option(_M_MMAP_THRESHOLD, 32 << 20)  # what glibc would have raised it to by itself


def without_frames(error: BaseException | None) -> None:
    """Let go of everything that an exception's stack refers to: half a model, when it ended a load."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if error.__traceback__ is not None:
            traceback.clear_frames(error.__traceback__)
            error.__traceback__ = None
        error = error.__cause__ or error.__context__


def _has_c_library() -> bool:
    """Windows has no handle that stands for everything loaded, and no malloc_trim."""
    try:
        ctypes.CDLL(None)
    except (OSError, TypeError):
        return False
    return True
