"""Products of weights kept row by row, by compiled C: int8, LLM.int8 and 4-bit code books.

Every function returns None where there is no compiler. Twins: weights/int8.py, weights/llm_int8.py, weights/nf4.py.
All tensors lie in one piece on the CPU; activations are made so.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch

from backend.kernels.cpu.build import library

# Kinds of arguments: p pointer, i 64-bit whole number, f float, t int (threads).
_ARGUMENTS = {
    "suri_int8": "pii" + "ppp" + "i" + "pt",
    "suri_llm_int8_quantise": "piif" + "ppppp",
    "suri_llm_int8": "ppppp" + "iii" + "ppp" + "i" + "pt",
    "suri_deal": "pip",
    "suri_codebook": "pii" + "ppp" + "ipi" + "pt",
    "suri_codebook_decode": "ippp" + "ip" + "ii" + "pt",
}
_KINDS = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_float, "t": ctypes.c_int}


@cache
def _functions() -> ctypes.CDLL | None:
    compiled = library("rows")
    return None if compiled is None else with_types(compiled)


def with_types(compiled: ctypes.CDLL) -> ctypes.CDLL:
    """The library with the types of its arguments, so that plain numbers can be passed."""
    for name, kinds in _ARGUMENTS.items():
        function = getattr(compiled, name)
        function.argtypes = [_KINDS[kind] for kind in kinds]
        function.restype = ctypes.c_int64 if name == "suri_llm_int8_quantise" else None
    return compiled


def int8(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor | None:
    """y = scale * x codes^T in float32. x float32 (tokens, in), codes int8 (out, in), scale float32 (out,)."""
    compiled = _functions()
    if compiled is None:
        return None
    x = x.contiguous()
    (tokens, columns), count = x.shape, codes.shape[0]
    y = torch.empty(tokens, count)
    arguments = (x.data_ptr(), tokens, columns, codes.data_ptr(), scale.data_ptr(), y.data_ptr(), count)
    compiled.suri_int8(*arguments, pool(), torch.get_num_threads())
    return y


def llm_int8_codes(x: torch.Tensor, threshold: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """Activations float32 (tokens, in) as int8 codes, scales (tokens,) and outlier columns: see weights/llm_int8.py."""
    quantised = _quantised(x, threshold)
    if quantised is None:
        return None
    codes, scale, _, outliers = quantised
    return codes, scale, outliers


def llm_int8(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, threshold: float) -> torch.Tensor | None:
    """The product of weights/llm_int8.py in one pass. x float32 (tokens, in), codes int8 (out, in), scale (out,)."""
    compiled, x = _functions(), x.contiguous()
    quantised = _quantised(x, threshold)
    if compiled is None or quantised is None:
        return None
    x_codes, x_scale, sums, outliers = quantised
    (tokens, columns), count = x.shape, codes.shape[0]
    y = torch.empty(tokens, count)
    arguments = (
        x.data_ptr(), x_codes.data_ptr(), x_scale.data_ptr(), sums.data_ptr(), outliers.data_ptr(), outliers.numel(),
        tokens, columns, codes.data_ptr(), scale.data_ptr(), y.data_ptr(), count,
    )  # fmt: skip
    compiled.suri_llm_int8(*arguments, pool(), torch.get_num_threads())
    return y


def _quantised(x: torch.Tensor, threshold: float) -> tuple[torch.Tensor, ...] | None:
    """Codes int8 (tokens, in), their scale float32 and sum int32 (tokens,), outlier columns int64."""
    compiled = _functions()
    if compiled is None:
        return None
    x = x.contiguous()
    tokens, columns = x.shape
    codes = torch.empty(tokens, columns, dtype=torch.int8)
    scale, sums = torch.empty(tokens), torch.empty(tokens, dtype=torch.int32)
    outliers, marks = torch.empty(columns, dtype=torch.int64), torch.empty(columns, dtype=torch.uint8)
    found = compiled.suri_llm_int8_quantise(
        x.data_ptr(), tokens, columns, threshold, codes.data_ptr(), scale.data_ptr(), sums.data_ptr(),
        outliers.data_ptr(), marks.data_ptr(),
    )  # fmt: skip
    return codes, scale, sums, outliers[:found]


def codebook(
    x: torch.Tensor, packed: torch.Tensor, book: torch.Tensor, absmax: torch.Tensor, block: int
) -> torch.Tensor | None:
    """y = x W^T, W = book[code] * absmax. x float32 (tokens, in), packed uint8 (out, in / 2) with the first of two
    codes in the high bits, book float32 (16,), absmax float32 (out, in / block); block a multiple of 32."""
    compiled = _functions()
    if compiled is None:
        return None
    dealt = torch.empty(x.shape)
    x = x.contiguous()
    compiled.suri_deal(x.data_ptr(), x.numel(), dealt.data_ptr())
    (tokens, columns), count = x.shape, packed.shape[0]
    y = torch.empty(tokens, count)
    arguments = (
        dealt.data_ptr(), tokens, columns, packed.data_ptr(), book.data_ptr(), absmax.data_ptr(), block, y.data_ptr(),
        count,
    )  # fmt: skip
    compiled.suri_codebook(*arguments, pool(), torch.get_num_threads())
    return y


def codebook_values(
    packed: torch.Tensor, book: torch.Tensor, absmax: torch.Tensor, block: int, start: int, stop: int
) -> torch.Tensor | None:
    """Rows start to stop of such a weight as bfloat16."""
    compiled = _functions()
    if compiled is None:
        return None
    columns = 2 * packed.shape[1]
    out = torch.empty(stop - start, columns, dtype=torch.bfloat16)
    compiled.suri_codebook_decode(
        columns, packed.data_ptr(), book.data_ptr(), absmax.data_ptr(), block, out.data_ptr(), start, stop - start,
        pool(), torch.get_num_threads(),
    )  # fmt: skip
    return out


@cache
def pool() -> int | None:
    """The address of the pool's function: one pool for all libraries of the process. None: this thread alone."""
    compiled = library("product")
    return None if compiled is None else ctypes.cast(compiled.suri_parallel, ctypes.c_void_p).value
