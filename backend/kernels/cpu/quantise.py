"""Quantising while loading, by compiled C. Both return None where there is no compiler.

Twins: weights/nf4.py `quantise_twin`, weights/encode.py.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch

from backend.kernels.cpu.build import library
from backend.kernels.cpu.rows import pool


@cache
def _functions() -> ctypes.CDLL | None:
    compiled = library("quantise")
    return None if compiled is None else with_types(compiled)


def with_types(compiled: ctypes.CDLL) -> ctypes.CDLL:
    """The library with the types of its arguments, so that plain numbers can be passed."""
    pointer, whole = ctypes.c_void_p, ctypes.c_int64
    compiled.suri_q4_1.argtypes = [pointer, whole, pointer, pointer, ctypes.c_int]
    compiled.suri_nf4.argtypes = [pointer, whole, pointer, pointer, pointer, pointer, ctypes.c_int]
    compiled.suri_q4_1.restype = compiled.suri_nf4.restype = None
    return compiled


def q4_1(values: torch.Tensor) -> torch.Tensor | None:
    """float32 (rows, columns), finite, columns whole groups of 32 -> uint8 (rows, 20 bytes for each 32)."""
    compiled = _functions()
    if compiled is None:
        return None
    values = values.contiguous()
    rows, columns = values.shape
    out = torch.empty(rows, columns // 32 * 20, dtype=torch.uint8)
    compiled.suri_q4_1(values.data_ptr(), rows * columns // 32, out.data_ptr(), pool(), torch.get_num_threads())
    return out


def nf4(values: torch.Tensor, midpoints: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """float32 (rows, columns), in blocks of 64 -> packed uint8 (rows, columns / 2) and absmax (rows, blocks)."""
    compiled = _functions()
    if compiled is None:
        return None
    values = values.contiguous()
    rows, columns = values.shape
    packed, absmax = torch.empty(rows, columns // 2, dtype=torch.uint8), torch.empty(rows, columns // 64)
    compiled.suri_nf4(
        values.data_ptr(), rows * columns // 64, midpoints.data_ptr(), packed.data_ptr(), absmax.data_ptr(), pool(),
        torch.get_num_threads(),
    )  # fmt: skip
    return packed, absmax
