"""Stored blocks as planes of 4-bit codes, exact in the codes: the one form the packed 4-bit product takes.

value = sum over planes of (code - 8) * scale + zero

* codes of 4 bits, groups of 32 (Q4_0, Q4_1, Q4_K): one plane; (q - o) d + m  ->  scale d, zero m + (8 - o) d
* codes of up to 8 bits, q = 16 h + l, o = 16 p (Q5_0, Q5_1, Q5_K, Q8_0, IQ4_NL, IQ4_XS, MXFP4): two planes,
        (h - p) 16 d  +  ((l - 8) d + 8 d + m)
* small codes of groups of 16 without a minimum (Q3_K, Q4_2): two planes, each with one half of every 32 columns and
  nothing, code 8 and zero 0, in the other half.

Where two planes share a scale, it is rounded to bfloat16 here, as the packed product would: both use the same value,
and their sum stays q times one scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from backend.weights.blocks import BlockFormat
from backend.weights.codes import Codes
from backend.weights.decode import CHUNK, split

Plane = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # codes, scale, zero
GROUP = 32


@dataclass(frozen=True)
class Planes:
    """codes uint8 0..15 (rows, columns); scale, zero float32 (rows, columns / group).

    `order` int64 (columns,): column j of the planes is column order[j] of the matrix (GPTQ with act-order); None: as
    they are.
    """

    planes: tuple[Plane, ...]
    group: int = GROUP
    order: torch.Tensor | None = None


def block_planes(raw: torch.Tensor, fmt: BlockFormat) -> Planes | None:
    """Whole rows, uint8 (rows, bytes per row), as planes; None for a format that has no such form."""
    rows, count = raw.shape[0], raw.shape[1] // fmt.bytes
    columns = count * fmt.elements
    if not fmt.planes or columns % GROUP:
        return None
    blocks = raw.reshape(rows * count, fmt.bytes)
    planes: tuple[Plane, ...] = tuple(
        (
            torch.empty(rows, columns, dtype=torch.uint8),
            torch.empty(rows, columns // GROUP),
            torch.empty(rows, columns // GROUP),
        )
        for _ in range(fmt.planes)
    )
    step = CHUNK // fmt.elements
    for start in range(0, len(blocks), step):
        part = split(blocks[start : start + step], fmt)
        groups = slice(start * fmt.elements // GROUP, (start + step) * fmt.elements // GROUP)
        into = tuple(
            (codes.view(-1, GROUP)[groups], scale.view(-1)[groups], zero.view(-1)[groups])
            for codes, scale, zero in planes
        )
        if part.codes.shape[-1] < GROUP:
            _half_groups(part, into)
        elif fmt.planes == 1:
            _one(part, into[0])
        else:
            _two(part, into)
    return Planes(planes)


def _one(part: Codes, into: Plane) -> None:
    codes, scale, zero = into
    codes.copy_(part.codes.view(codes.shape))
    scale.copy_(part.scale.view(scale.shape))
    torch.mul(scale, 8 - part.offset, out=zero)
    if part.minimum is not None:
        zero += part.minimum.reshape(zero.shape)


def _two(part: Codes, into: tuple[Plane, ...]) -> None:
    (high, high_scale, high_zero), (low, low_scale, low_zero) = into
    quants = part.codes.view(high.shape)
    torch.bitwise_right_shift(quants, 4, out=high)
    high += 8 - part.offset // 16  # in 0..15: at most 8 + 1 for codes of 5 bits, and 8 is taken off those of 8 bits
    torch.bitwise_and(quants, 15, out=low)
    low_scale.copy_(part.scale.view(low_scale.shape).bfloat16())
    torch.mul(low_scale, 16, out=high_scale)
    torch.mul(low_scale, 8, out=low_zero)
    if part.minimum is None:
        high_zero.zero_()
    else:
        # What bfloat16 cannot hold of the zero, the other plane's zero can.
        low_zero += part.minimum.reshape(low_zero.shape)
        high_zero.copy_(low_zero.bfloat16())
        low_zero -= high_zero


def _half_groups(part: Codes, into: tuple[Plane, ...]) -> None:
    size = part.codes.shape[-1]
    for half, (codes, scale, zero) in enumerate(into):
        codes.fill_(8)
        columns = slice(half * size, (half + 1) * size)
        torch.add(part.codes.view(codes.shape)[:, columns], 8 - part.offset, out=codes[:, columns])
        scale.copy_(part.scale.view(-1, len(into))[:, half])
        zero.zero_()
