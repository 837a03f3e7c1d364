"""Quantising while loading, by compiled C. All return None where there is no compiler.

Twins: weights/nf4.py `quantise_twin`, weights/int8.py `quantise_blocks_twin`, weights/encode.py.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
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
    compiled.suri_q4_1.argtypes = compiled.suri_q8_0.argtypes = [pointer, whole, pointer, pointer, ctypes.c_int]
    compiled.suri_nf4.argtypes = [pointer, whole, pointer, pointer, pointer, pointer, ctypes.c_int]
    compiled.suri_q4_1.restype = compiled.suri_q8_0.restype = compiled.suri_nf4.restype = None
    return compiled


def q4_1(values: torch.Tensor) -> torch.Tensor | None:
    """float32 (rows, columns), finite, columns whole groups of 32 -> uint8 (rows, 20 bytes for each 32)."""
    compiled = _functions()
    return None if compiled is None else _blocks(compiled.suri_q4_1, values, 20)


def q8_0(values: torch.Tensor) -> torch.Tensor | None:
    """float32 (rows, columns), finite, columns whole groups of 32 -> uint8 (rows, 34 bytes for each 32)."""
    compiled = _functions()
    return None if compiled is None else _blocks(compiled.suri_q8_0, values, 34)


def _blocks(quantise: Callable[..., None], values: torch.Tensor, block_bytes: int) -> torch.Tensor:
    values = values.contiguous()
    rows, columns = values.shape
    out = torch.empty(rows, columns // 32 * block_bytes, dtype=torch.uint8)
    quantise(values.data_ptr(), rows * columns // 32, out.data_ptr(), pool(), torch.get_num_threads())
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
