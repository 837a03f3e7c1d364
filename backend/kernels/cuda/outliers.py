"""Triton: LLM.int8 (Dettmers et al. 2022, arXiv:2208.07339) in one pass over the int8 weight, without asking the host.

    y = s_w * ( s_x * sum over ordinary columns of q_x q_w  +  sum over outlier columns of x q_w )

Both sums read the same codes. The first is exact in int32 (127 * 127 * 11008 does not fit float32); a column is an
outlier when any token of the step has |x| >= threshold there; x is rounded to float16 before it is quantised: both as
in bitsandbytes. The twin is `backend.weights.llm_int8.product`. Imported only through `available.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from backend.kernels.cuda.skinny import TOKENS, operand


@triton.jit
def _quantize(
    x, codes, loose, scale, tokens, columns, threshold,
    TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    own = tl.program_id(0)
    token = tl.arange(0, TOKENS)
    highest = 0.0
    for first in range(0, columns, BLOCK):
        column = first + tl.arange(0, BLOCK)
        value = tl.load(x + own * columns + column, mask=column < columns, other=0.0)
        size = tl.abs(value.to(tl.float16).to(tl.float32))
        # NaN is not below the threshold, so its column is an outlier and it reaches the result.
        highest = tl.maximum(highest, tl.max(tl.where(size < threshold, size, 0.0), axis=0))
    step = 127.0 / tl.where(highest > 0.0, highest, 1.0)
    for first in range(0, columns, BLOCK):
        column = first + tl.arange(0, BLOCK)
        there = (token[:, None] < tokens) & (column[None, :] < columns)
        everyone = tl.load(x + token[:, None] * columns + column[None, :], mask=there, other=0.0)
        everyone = tl.abs(everyone.to(tl.float16).to(tl.float32))
        outlier = tl.max(tl.where(everyone < threshold, 0, 1), axis=0) > 0
        value = tl.load(x + own * columns + column, mask=column < columns, other=0.0)
        scaled = tl.where(outlier, 0.0, value.to(tl.float16).to(tl.float32) * step)
        below = tl.floor(scaled)  # to the nearest, and halves to the even one, as torch.round does
        rest = scaled - below
        odd = below - 2.0 * tl.floor(below * 0.5)
        up = (rest > 0.5) | ((rest == 0.5) & (odd > 0.5))
        rounded = below + tl.where(up, 1.0, 0.0)
        tl.store(codes + own * columns + column, rounded.to(tl.int8), mask=column < columns)
        tl.store(loose + own * columns + column, tl.where(outlier, value, 0.0), mask=column < columns)
    tl.store(scale + own, highest / 127.0)


@triton.jit
def _one_token(
    codes, loose, x_scale, weight, scale, y, rows, columns,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    start = (row % rows).to(tl.int64) * columns
    whole = tl.zeros((BLOCK_ROWS,), tl.int32)
    total = tl.zeros((BLOCK_ROWS,), tl.float32)
    for first in range(0, columns, BLOCK_COLUMNS):
        column = first + tl.arange(0, BLOCK_COLUMNS)
        inside = column < columns
        tile = tl.load(weight + start[:, None] + column[None, :], mask=inside[None, :], other=0).to(tl.int32)
        code = tl.load(codes + column, mask=inside, other=0).to(tl.int32)
        value = tl.load(loose + column, mask=inside, other=0.0)
        whole += tl.sum(tile * code[None, :], axis=1)
        total += tl.sum(tile.to(tl.float32) * value[None, :], axis=1)
    result = (whole.to(tl.float32) * tl.load(x_scale) + total) * tl.load(scale + row % rows)
    tl.store(y + row, result, mask=row < rows)


@triton.jit
def _few_tokens(
    codes, loose, x_scale, weight, scale, y, tokens, rows, columns,
    OPERAND: tl.constexpr, TOKENS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    start = (row % rows).to(tl.int64) * columns
    token = tl.arange(0, TOKENS)
    whole = tl.zeros((TOKENS, BLOCK_ROWS), tl.int32)
    total = tl.zeros((TOKENS, BLOCK_ROWS), tl.float32)
    for first in range(0, columns, BLOCK_COLUMNS):
        column = first + tl.arange(0, BLOCK_COLUMNS)
        there = (token[:, None] < tokens) & (column[None, :] < columns)
        at = token[:, None] * columns + column[None, :]
        tile = tl.trans(tl.load(weight + start[:, None] + column[None, :], mask=column[None, :] < columns, other=0))
        whole += tl.dot(tl.load(codes + at, mask=there, other=0), tile, out_dtype=tl.int32)
        # Two halves of 8 significant bits each: what the first leaves of a value goes through the second.
        value = tl.load(loose + at, mask=there, other=0.0)
        high = value.to(OPERAND)
        low = (value - high.to(tl.float32)).to(OPERAND)
        total = tl.dot(high, tile.to(OPERAND), total, input_precision="ieee")
        total = tl.dot(low, tile.to(OPERAND), total, input_precision="ieee")
    own = tl.load(x_scale + token, mask=token < tokens, other=0.0)
    result = (whole.to(tl.float32) * own[:, None] + total) * tl.load(scale + row % rows)[None, :]
    tl.store(y + token[:, None] * rows + row[None, :], result, mask=(token[:, None] < tokens) & (row[None, :] < rows))


def llm_int8(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, threshold: float) -> torch.Tensor:
    """x float32 (tokens <= 16, in); weight int8 (out, in); scale float32 (out,): what a code is worth.

    `threshold`: 6.0 in bitsandbytes; infinity for no outliers. Returns float32 (tokens, out).
    """
    tokens, (count, columns) = x.shape[0], weight.shape
    codes = torch.empty(tokens, columns, dtype=torch.int8, device=x.device)
    loose = torch.empty(tokens, columns, dtype=torch.float32, device=x.device)
    x_scale = torch.empty(tokens, dtype=torch.float32, device=x.device)
    _quantize[(tokens,)](
        x, codes, loose, x_scale, tokens, columns, threshold, TOKENS=triton.next_power_of_2(tokens), BLOCK=1024
    )
    y = torch.empty(tokens, count, dtype=torch.float32, device=x.device)
    if tokens == 1:
        block = min(1024, triton.next_power_of_2(columns))
        high = max(1, 4096 // block)
        _one_token[(triton.cdiv(count, high),)](
            codes, loose, x_scale, weight, scale, y, count, columns,
            BLOCK_ROWS=high, BLOCK_COLUMNS=block, num_warps=4,
        )  # fmt: skip
    else:
        high = 16
        _few_tokens[(triton.cdiv(count, high),)](
            codes, loose, x_scale, weight, scale, y, tokens, count, columns,
            OPERAND=operand(torch.bfloat16), TOKENS=TOKENS, BLOCK_ROWS=high, BLOCK_COLUMNS=128,
            num_warps=4, num_stages=3,
        )  # fmt: skip
    return y
