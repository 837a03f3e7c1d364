"""Triton: up to 16 tokens times a weight, which is still read once: the tokens become the rows of a matrix unit's tile.

Weights that are no floating point numbers are decoded to bfloat16 for that unit: int8 exactly, with the scale applied
after the sum; 4-bit values rounded to 8 significant bits. Imported only through `available.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

TOKENS = 16  # rows of the smallest tile that a matrix unit takes


@triton.jit
def _rows(
    x, weight, scale, y, tokens, rows, columns,
    OPERAND: tl.constexpr, SCALED: tl.constexpr, TOKENS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    start = (row % rows).to(tl.int64) * columns
    token = tl.arange(0, TOKENS)
    total = tl.zeros((TOKENS, BLOCK_ROWS), tl.float32)
    for first in range(0, columns, BLOCK_COLUMNS):
        column = first + tl.arange(0, BLOCK_COLUMNS)
        there = (token[:, None] < tokens) & (column[None, :] < columns)
        values = tl.load(x + token[:, None] * columns + column[None, :], mask=there, other=0.0)
        tile = tl.load(weight + start[:, None] + column[None, :], mask=column[None, :] < columns, other=0.0)
        # "ieee": float32 weights are meant as such, and not rounded to the 10 bits of tf32.
        total = tl.dot(values.to(OPERAND), tl.trans(tile.to(OPERAND)), total, input_precision="ieee")
    if SCALED:
        total = total * tl.load(scale + row % rows)[None, :]
    at = y + token[:, None] * rows + row[None, :]
    tl.store(at, total, mask=(token[:, None] < tokens) & (row[None, :] < rows))


@triton.jit
def _codes(
    x, codes, scale, zero, table, y, tokens, rows, columns,
    OPERAND: tl.constexpr, GROUP: tl.constexpr, LOOKED_UP: tl.constexpr, HIGH_FIRST: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_GROUPS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    safe = (row % rows).to(tl.int64)
    groups = columns // GROUP
    token = tl.arange(0, TOKENS)
    byte = tl.arange(0, GROUP // 2)
    total = tl.zeros((TOKENS, BLOCK_ROWS), tl.float32)
    for first in range(0, groups, BLOCK_GROUPS):
        group = first + tl.arange(0, BLOCK_GROUPS)
        inside = group < groups
        place = safe[:, None, None] * (columns // 2) + group[None, :, None] * (GROUP // 2) + byte[None, None, :]
        pair = tl.load(codes + place, mask=inside[None, :, None], other=0).to(tl.int32)
        if HIGH_FIRST:
            left, right = pair >> 4, pair & 15
        else:
            left, right = pair & 15, pair >> 4
        factor_at = safe[:, None] * groups + group[None, :]
        factor = tl.load(scale + factor_at, mask=inside[None, :], other=0.0).to(tl.float32)[:, :, None]
        if LOOKED_UP:
            left_value = tl.load(table + left) * factor
            right_value = tl.load(table + right) * factor
        else:
            offset = (
                tl.load(zero + factor_at, mask=inside[None, :], other=0.0).to(tl.float32)[:, :, None] - 8.0 * factor
            )
            left_value = left.to(tl.float32) * factor + offset
            right_value = right.to(tl.float32) * factor + offset
        # Side by side as the columns are: the activations then come in one piece.
        tile = tl.reshape(tl.join(left_value, right_value), (BLOCK_ROWS, BLOCK_GROUPS * GROUP))
        column = first * GROUP + tl.arange(0, BLOCK_GROUPS * GROUP)
        there = (token[:, None] < tokens) & (column[None, :] < columns)
        values = tl.load(x + token[:, None] * columns + column[None, :], mask=there, other=0.0)
        total = tl.dot(values.to(OPERAND), tl.trans(tile.to(OPERAND)), total, input_precision="ieee")
    at = y + token[:, None] * rows + row[None, :]
    tl.store(at, total, mask=(token[:, None] < tokens) & (row[None, :] < rows))


def operand(dtype: torch.dtype) -> tl.dtype:
    """The type a matrix unit gets for weights of this type. Triton's interpreter has no bfloat16 product."""
    kind = {torch.float32: tl.float32, torch.float16: tl.float16}.get(dtype, tl.bfloat16)
    return tl.float32 if kind is tl.bfloat16 and triton.knobs.runtime.interpret else kind


def rows(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
    """x float32 (tokens <= 16, in); otherwise as in gemv.py. Returns float32 (tokens, out)."""
    tokens, (count, columns) = x.shape[0], weight.shape
    y = torch.empty(tokens, count, dtype=torch.float32, device=x.device)
    high = 16
    _rows[(triton.cdiv(count, high),)](
        x, weight, x if scale is None else scale, y, tokens, count, columns,
        OPERAND=operand(weight.dtype), SCALED=scale is not None, TOKENS=TOKENS,
        BLOCK_ROWS=high, BLOCK_COLUMNS=256 // weight.itemsize, num_warps=4, num_stages=3,
    )  # fmt: skip
    return y


def grouped4(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """x float32 (tokens <= 16, in); otherwise as in gemv.py. Returns float32 (tokens, out)."""
    return _launch(x, codes, scale, zero, None, high_first=False)


def looked_up4(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """x float32 (tokens <= 16, in); otherwise as in gemv.py. Returns float32 (tokens, out)."""
    return _launch(x, codes, scale, None, table, high_first=True)


def _launch(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    table: torch.Tensor | None,
    *,
    high_first: bool,
) -> torch.Tensor:
    tokens, count, columns = x.shape[0], codes.shape[0], codes.shape[1] * 2
    group = columns // scale.shape[1]
    y = torch.empty(tokens, count, dtype=torch.float32, device=x.device)
    high = 16
    _codes[(triton.cdiv(count, high),)](
        x, codes, scale, scale if zero is None else zero, x if table is None else table, y, tokens, count, columns,
        OPERAND=operand(torch.bfloat16), GROUP=group, LOOKED_UP=table is not None, HIGH_FIRST=high_first,
        TOKENS=TOKENS, BLOCK_ROWS=high, BLOCK_GROUPS=max(1, 128 // group), num_warps=4, num_stages=3,
    )  # fmt: skip
    return y
