"""Products of plain bfloat16 and float16 weights with few tokens, by compiled C. The twin: torch's F.linear."""

from __future__ import annotations

import ctypes
from functools import cache

import torch

from backend.kernels.cpu.build import library
from backend.kernels.cpu.products import tiles_library

KINDS = {torch.bfloat16: 1, torch.float16: 2}
MOST_TOKENS = 4  # with more, torch's matrix units win

_POINTER, _SIZE, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int


@cache
def _functions() -> tuple[ctypes.CDLL, int] | None:
    """The library, and where the pool's function is that hands out work; None where there is no compiler."""
    products = tiles_library()
    compiled = library("plain") if products is not None else None
    if products is None or compiled is None:
        return None
    compiled.suri_plain.argtypes = (
        _INT, _POINTER, _SIZE, _SIZE, _POINTER, _SIZE, _POINTER, _SIZE, _POINTER, _INT
    )  # fmt: skip
    compiled.suri_plain.restype = None
    return compiled, ctypes.cast(products.suri_parallel, _POINTER).value or 0


def plain(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor | None:
    """y = x W^T in float32: x float32 (tokens, in), weight bfloat16 or float16 (out, in), both on the CPU.

    None where it does not apply: no compiler, another type, too many tokens.
    """
    kind = KINDS.get(weight.dtype)
    functions = _functions() if kind and 0 < x.shape[0] <= MOST_TOKENS and weight.is_contiguous() else None
    if functions is None:
        return None
    compiled, on_pool = functions
    x = x.float().contiguous()
    (tokens, columns), rows = x.shape, weight.shape[0]
    y = torch.empty(tokens, rows)
    threads = torch.get_num_threads()
    compiled.suri_plain(
        kind, x.data_ptr(), tokens, columns, weight.data_ptr(), rows, y.data_ptr(), rows, on_pool, threads
    )
    return y
