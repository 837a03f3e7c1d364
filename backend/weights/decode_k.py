"""The K types: super-blocks of 256 with small whole-number scales for groups of 16 or 32. Formulas: docs/formats.md."""

from __future__ import annotations

from collections.abc import Callable

import torch

from backend.weights.blocks import Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, BlockFormat
from backend.weights.codes import Codes, halves, nibbles


def split_q2_k(blocks: torch.Tensor) -> Codes:
    """16 groups of 16: scales and minima of 4 bits, codes of 2; element 128 h + 32 k + b = bits 2k of qs[32 h + b]."""
    scales, d = blocks[:, :16], halves(blocks[:, 80:84])
    codes = _pairs(blocks[:, 16:80])
    return Codes(
        codes.view(-1, 16, 16),
        d[:, :1] * (scales & 15).float(),
        minimum=-(d[:, 1:] * (scales >> 4).float()),
    )


def split_q3_k(blocks: torch.Tensor) -> Codes:
    """16 groups of 16: scales of 6 bits less 32, codes of 3 bits less 4, the third bit in `hmask`."""
    codes = _pairs(blocks[:, 32:96]).view(-1, 8, 32)
    codes |= _bit_planes(blocks[:, :32], 4)
    low, high = nibbles(blocks[:, 96:104]), _shifted(blocks[:, 104:108], 3)  # (n, 16), (n, 4, 4)
    scales = (low | (high.flatten(1) << 4)) - 32
    return Codes(codes.view(-1, 16, 16), halves(blocks[:, 108:110]) * scales.view(torch.int8).float(), offset=4)


def split_q4_k(blocks: torch.Tensor) -> Codes:
    """8 groups of 32: scales and minima of 6 bits, codes of 4; 32-byte chunk c holds groups 2c (low) and 2c + 1."""
    scale, minimum = _scales_and_minima(blocks)
    return Codes(nibbles(blocks[:, 16:].view(-1, 4, 32)).view(-1, 8, 32), scale, minimum=minimum)


def split_q5_k(blocks: torch.Tensor) -> Codes:
    """As Q4_K, with the fifth bit of group g in bit g of qh."""
    scale, minimum = _scales_and_minima(blocks)
    codes = nibbles(blocks[:, 48:].view(-1, 4, 32)).view(-1, 8, 32)
    codes |= _bit_planes(blocks[:, 16:48], 16)
    return Codes(codes, scale, minimum=minimum)


def split_q6_k(blocks: torch.Tensor) -> Codes:
    """16 groups of 16: scales int8, codes of 6 bits less 32: 4 bits in ql, 2 in qh."""
    codes = nibbles(blocks[:, :128].view(-1, 2, 64)).view(-1, 2, 4, 32)
    codes |= _shifted(blocks[:, 128:192].view(-1, 2, 32), 3) << 4
    scales = blocks[:, 192:208].view(torch.int8).float()
    return Codes(codes.view(-1, 16, 16), halves(blocks[:, 208:210]) * scales, offset=32)


def _scales_and_minima(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and minimum of the 8 groups of Q4_K and Q5_K, float32 (n, 8), from 12 bytes of 6-bit numbers."""
    d = halves(blocks[:, :4])
    first, second, last = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = torch.cat([first & 63, (last & 15) | ((first >> 6) << 4)], dim=1)
    minima = torch.cat([second & 63, (last >> 4) | ((second >> 6) << 4)], dim=1)
    return d[:, :1] * scales.float(), -(d[:, 1:] * minima.float())


def _pairs(packed: torch.Tensor) -> torch.Tensor:
    """The 2-bit codes of Q2_K and Q3_K: (n, 64) bytes -> (n, 256)."""
    return _shifted(packed.view(-1, 2, 32), 3).flatten(1)


def _shifted(packed: torch.Tensor, mask: int) -> torch.Tensor:
    """(..., n) bytes -> (..., 4, n): the byte shifted right by 0, 2, 4 and 6, under a mask."""
    out = packed.new_empty(*packed.shape[:-1], 4, packed.shape[-1])
    for k in range(4):
        torch.bitwise_right_shift(packed, 2 * k, out=out[..., k, :])
    out &= mask
    return out


def _bit_planes(packed: torch.Tensor, value: int) -> torch.Tensor:
    """(n, 32) bytes -> (n, 8, 32): `value`, a power of two, where bit g of the byte is set."""
    out = packed.new_empty(packed.shape[0], 8, 32)
    for g in range(8):
        torch.bitwise_right_shift(packed, g, out=out[:, g])
    out &= 1
    out *= value
    return out


SPLIT_K: dict[BlockFormat, Callable[[torch.Tensor], Codes]] = {
    Q2_K: split_q2_k, Q3_K: split_q3_k, Q4_K: split_q4_k, Q5_K: split_q5_k, Q6_K: split_q6_k,
}  # fmt: skip
