"""Triton: 1 to 4 tokens times a weight. Reading the weight once, at the memory's speed, is all there is to do.

A program has a few rows and walks along their columns; sums are float32. More tokens are worth a
matrix unit (skinny.py). Imported only through `available.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Bytes of weights that a program asks for at once: several loads of 16 bytes for each of its 128 threads.
_TILE_BYTES = 8192
MOST = 4  # tokens


@triton.jit
def _rows(
    x, weight, scale, y, tokens, rows, columns,
    X_TYPE: tl.constexpr, SCALED: tl.constexpr, TOKENS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    start = (row % rows).to(tl.int64) * columns  # rows beyond the last read one that is there, and are not stored
    place = tl.arange(0, TOKENS)
    total = tl.zeros((BLOCK_ROWS, TOKENS), tl.float32)
    for first in range(0, columns, BLOCK_COLUMNS):
        column = first + tl.arange(0, BLOCK_COLUMNS)
        inside = column < columns
        tile = tl.load(weight + start[:, None] + column[None, :], mask=inside[None, :], other=0.0).to(tl.float32)
        for token in tl.static_range(TOKENS):
            there = inside & (token < tokens)
            values = tl.load(x + token * columns + column, mask=there, other=0.0).to(X_TYPE).to(tl.float32)
            sums = tl.sum(tile * values[None, :], axis=1)
            total += tl.where(place[None, :] == token, sums[:, None], 0.0)
    if SCALED:
        total = total * tl.load(scale + row % rows)[:, None]
    at = y + place[None, :] * rows + row[:, None]
    tl.store(at, total, mask=(row[:, None] < rows) & (place[None, :] < tokens))


@triton.jit
def _codes(
    x, codes, scale, zero, table, y, tokens, rows, columns,
    GROUP: tl.constexpr, LOOKED_UP: tl.constexpr, HIGH_FIRST: tl.constexpr, TOKENS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_GROUPS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    safe = (row % rows).to(tl.int64)
    groups = columns // GROUP
    byte = tl.arange(0, GROUP // 2)
    place = tl.arange(0, TOKENS)
    total = tl.zeros((BLOCK_ROWS, TOKENS), tl.float32)
    for first in range(0, groups, BLOCK_GROUPS):
        group = first + tl.arange(0, BLOCK_GROUPS)
        inside = group < groups
        code_at = safe[:, None, None] * (columns // 2) + group[None, :, None] * (GROUP // 2) + byte[None, None, :]
        pair = tl.load(codes + code_at, mask=inside[None, :, None], other=0).to(tl.int32)
        if HIGH_FIRST:
            left, right = pair >> 4, pair & 15
        else:
            left, right = pair & 15, pair >> 4
        factor_at = safe[:, None] * groups + group[None, :]
        factor = tl.load(scale + factor_at, mask=inside[None, :], other=0.0).to(tl.float32)  # (rows, groups)
        if LOOKED_UP:
            # Sixteen floats are one line of the cache: no two threads wait for each other.
            first_value, second_value = tl.load(table + left), tl.load(table + right)
        else:
            first_value, second_value = left.to(tl.float32), right.to(tl.float32)
            offset = tl.load(zero + factor_at, mask=inside[None, :], other=0.0).to(tl.float32) - 8.0 * factor
        for token in tl.static_range(TOKENS):
            there = (inside & (token < tokens))[:, None]
            at = x + token * columns + group[:, None] * GROUP + 2 * byte[None, :]  # (groups, bytes of a group)
            even = tl.load(at, mask=there, other=0.0).to(tl.bfloat16).to(tl.float32)
            odd = tl.load(at + 1, mask=there, other=0.0).to(tl.bfloat16).to(tl.float32)
            products = first_value * even[None, :, :] + second_value * odd[None, :, :]
            by_group = tl.sum(products, axis=2) * factor
            if not LOOKED_UP:
                by_group += offset * tl.sum(even + odd, axis=1)[None, :]
            total += tl.where(place[None, :] == token, tl.sum(by_group, axis=1)[:, None], 0.0)
    at = y + place[None, :] * rows + row[:, None]
    tl.store(at, total, mask=(row[:, None] < rows) & (place[None, :] < tokens))


def rows(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
    """x float32 (tokens <= 4, in); weight (out, in) float32, bfloat16, float16, or int8 with `scale` float32 (out,).

    x is rounded to the weight's type, to bfloat16 beside int8. Returns float32 (tokens, out).
    """
    tokens, (count, columns) = x.shape[0], weight.shape
    y = torch.empty(tokens, count, dtype=torch.float32, device=x.device)
    block = min(2048 // weight.itemsize, triton.next_power_of_2(columns))
    high = max(1, _TILE_BYTES // (block * weight.itemsize))
    kind = {torch.float32: tl.float32, torch.float16: tl.float16}.get(weight.dtype, tl.bfloat16)
    _rows[(triton.cdiv(count, high),)](
        x, weight, x if scale is None else scale, y, tokens, count, columns,
        X_TYPE=kind, SCALED=scale is not None, TOKENS=triton.next_power_of_2(tokens),
        BLOCK_ROWS=high, BLOCK_COLUMNS=block, num_warps=4,
    )  # fmt: skip
    return y


def grouped4(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """x float32 (tokens <= 4, in), rounded to bfloat16; codes uint8 (out, in / 2), column 2j in the low half of byte j.

    scale, zero (out, in / group): value = (code - 8) * scale + zero. Returns float32 (tokens, out).
    """
    return _launch(x, codes, scale, zero, None, high_first=False)


def looked_up4(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """As `grouped4` with value = table[code] * scale, table float32 (16,), and column 2j in the high half of byte j."""
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
    groups = scale.shape[1]
    group = columns // groups
    y = torch.empty(tokens, count, dtype=torch.float32, device=x.device)
    block = min(triton.next_power_of_2(groups), max(1, 2048 // group))
    high = max(1, _TILE_BYTES // (block * group))
    _codes[(triton.cdiv(count, high),)](
        x, codes, scale, scale if zero is None else zero, x if table is None else table, y, tokens, count, columns,
        GROUP=group, LOOKED_UP=table is not None, HIGH_FIRST=high_first, TOKENS=triton.next_power_of_2(tokens),
        BLOCK_ROWS=high, BLOCK_GROUPS=block, num_warps=4,
    )  # fmt: skip
    return y
