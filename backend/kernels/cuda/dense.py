"""Triton: 4-bit weights decoded to bfloat16, for products of many tokens. Imported only through `available.py`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _decode(
    codes, scale, zero, table, out, columns,
    GROUP: tl.constexpr, LOOKED_UP: tl.constexpr, HIGH_FIRST: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    byte = tl.program_id(1) * BYTES + tl.arange(0, BYTES)
    inside = byte < columns // 2
    pair = tl.load(codes + row * (columns // 2) + byte, mask=inside, other=0).to(tl.int32)
    if HIGH_FIRST:
        left, right = pair >> 4, pair & 15
    else:
        left, right = pair & 15, pair >> 4
    at = row * (columns // GROUP) + (2 * byte) // GROUP
    factor = tl.load(scale + at, mask=inside, other=0.0).to(tl.float32)
    if LOOKED_UP:
        first, second = tl.load(table + left) * factor, tl.load(table + right) * factor
    else:
        offset = tl.load(zero + at, mask=inside, other=0.0).to(tl.float32)
        first = (left - 8).to(tl.float32) * factor + offset
        second = (right - 8).to(tl.float32) * factor + offset
    to = out + row * columns + 2 * byte
    tl.store(to, first.to(out.dtype.element_ty), mask=inside)
    tl.store(to + 1, second.to(out.dtype.element_ty), mask=inside)


def decode(
    codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, table: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """4-bit codes as in gemv.py, with `zero` (grouped) or with `table` (looked up) -> (out, in) in `dtype`."""
    rows, columns = codes.shape[0], codes.shape[1] * 2
    out = torch.empty(rows, columns, dtype=dtype, device=codes.device)
    _decode[(rows, triton.cdiv(columns // 2, 1024))](
        codes, scale, scale if zero is None else zero, scale if table is None else table, out, columns,
        GROUP=columns // scale.shape[1], LOOKED_UP=table is not None, HIGH_FIRST=table is not None,
        BYTES=1024, num_warps=4,
    )  # fmt: skip
    return out
