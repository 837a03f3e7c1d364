"""Float32 to K types: small whole-number scales for each group, one or two float16 numbers for each block of 256.

Three steps, all by squared error: real scales for each group (`search`); whole-number scales, where neighbours of the
nearest are tried too, since the codes can follow; a least-squares fit of the block's float16 numbers to the whole
numbers and codes so far. The last two are repeated, and what errs least is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from backend.weights.blocks import Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, BlockFormat
from backend.weights.search import affine, error, f16, f16_up, inverse, symmetric

ROUNDS = 2

# What to try for each type: the steps between a group's ends (2, 4, 5), the code of its largest number (3, 6).
REACHES_2 = (2.2, 2.4, 2.6, 2.8, 3.0, 3.2, 3.4, 3.6)
REACHES_4 = (13.6, 14.0, 14.4, 14.8, 15.2, 15.6)
REACHES_5 = (29.8, 30.2, 30.6, 31.0, 31.4, 31.8)
REACHES_3 = (-5.2, -4.6, -4.0, -3.4, -2.8, 2.2, 2.8, 3.4, 4.0)
REACHES_6 = (-33.2, -32.4, -31.6, -30.8, -30.0, 30.6, 31.4)


@dataclass(frozen=True)
class Found:
    """codes (size, groups, blocks); scales, minima (groups, blocks), whole numbers; d, dmin (blocks,): all float32."""

    codes: torch.Tensor
    scales: torch.Tensor
    d: torch.Tensor
    minima: torch.Tensor
    dmin: torch.Tensor


def search_affine(x: torch.Tensor, high: int, most: int, reaches: Sequence[float]) -> Found:
    """x (size, groups, blocks) = d * scale * code - dmin * minimum; codes 0..high, scales and minima 0..most."""
    real, bottom = affine(x, high, reaches, above_zero=False)
    d, dmin = f16_up(real.amax(0) / most), f16_up(-bottom.amin(0) / most)
    scales = (real * inverse(d)).round_().clamp_(0, most)
    minima = (-bottom * inverse(dmin)).round_().clamp_(0, most)
    best: Found | None = None
    least = torch.empty(0)
    for turn in range(ROUNDS):
        codes, scales, minima = _best_affine(x, scales, minima, d, dmin, high, most)
        errs = error(x, codes * (d * scales) - dmin * minima).sum(0)
        now = Found(codes, scales, d, minima, dmin)
        best, least = (now, errs) if best is None else (_keep(errs < least, now, best), torch.minimum(errs, least))
        if turn + 1 < ROUNDS:
            d, dmin = _fit_two(x, now)
    assert best is not None
    return best


def search_symmetric(x: torch.Tensor, low: int, high: int, least_scale: int, reaches: Sequence[float]) -> Found:
    """x (size, groups, blocks) = d * scale * code; codes low..high, scales least_scale..-least_scale - 1."""
    real = symmetric(x, low, high, reaches)
    top, bottom = real.amax(0), real.amin(0)
    # The largest scale takes the one whole number more that there is below zero.
    extreme = torch.where(top >= -bottom, top, bottom)
    d = -f16_up(extreme.abs() / -least_scale) * extreme.sign()
    scales = (real * inverse(d)).round_().clamp_(least_scale, -least_scale - 1)
    best: Found | None = None
    least = torch.empty(0)
    none = torch.zeros_like(d)
    for turn in range(ROUNDS):
        codes, scales = _best_symmetric(x, scales, d, low, high, least_scale)
        errs = error(x, codes * (d * scales)).sum(0)
        now = Found(codes, scales, d, none, none)
        best, least = (now, errs) if best is None else (_keep(errs < least, now, best), torch.minimum(errs, least))
        if turn + 1 < ROUNDS:
            product = ((codes * x).sum(0) * scales).sum(0)
            d = f16(product * inverse((codes.square().sum(0) * scales.square()).sum(0)))
    assert best is not None
    return best


def _best_affine(
    x: torch.Tensor,
    scales: torch.Tensor,
    minima: torch.Tensor,
    d: torch.Tensor,
    dmin: torch.Tensor,
    high: int,
    most: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scales, minima: for each group the best of the scale and its neighbours, each with its own minimum."""
    least = codes = None
    best_scales, best_minima = scales, minima
    per_step = inverse(dmin)
    for change in (0, -1, 1):
        trial = (scales + change).clamp_(0, most)
        step = d * trial
        per_code = inverse(step)
        low = minima
        for again in (False, True):
            new = ((x + dmin * low) * per_code).round_().clamp_(0, high)
            if not again:  # the best minimum for these codes, then codes for it
                low = ((step * new.mean(0) - x.mean(0)) * per_step).round_().clamp_(0, most)
        errs = error(x, new * step - dmin * low)
        if least is None or codes is None:
            least, codes, best_minima = errs, new, low
            continue
        better = errs < least
        least, codes = torch.where(better, errs, least), torch.where(better, new, codes)
        best_scales, best_minima = torch.where(better, trial, best_scales), torch.where(better, low, best_minima)
    assert codes is not None
    return codes, best_scales, best_minima


def _best_symmetric(
    x: torch.Tensor, scales: torch.Tensor, d: torch.Tensor, low: int, high: int, least_scale: int
) -> tuple[torch.Tensor, torch.Tensor]:
    least = codes = None
    best_scales = scales
    for change in (0, -1, 1):
        trial = (scales + change).clamp_(least_scale, -least_scale - 1)
        step = d * trial
        new = (x * inverse(step)).round_().clamp_(low, high)
        errs = error(x, new * step)
        if least is None or codes is None:
            least, codes = errs, new
            continue
        better = errs < least
        least, codes = torch.where(better, errs, least), torch.where(better, new, codes)
        best_scales = torch.where(better, trial, best_scales)
    assert codes is not None
    return codes, best_scales


def _fit_two(x: torch.Tensor, now: Found) -> tuple[torch.Tensor, torch.Tensor]:
    """d and dmin that fit x = d * (scale * code) - dmin * minimum best; as they were where that has no sense."""
    size = x.shape[0]
    ones, square, product = now.codes.sum(0), now.codes.square().sum(0), (now.codes * x).sum(0)
    aa = (square * now.scales.square()).sum(0)
    ab = (ones * now.scales * now.minima).sum(0)
    bb = size * now.minima.square().sum(0)
    ax = (product * now.scales).sum(0)
    bx = (x.sum(0) * now.minima).sum(0)
    both = inverse(aa * bb - ab * ab)
    d, dmin = (ax * bb - bx * ab) * both, (ax * ab - bx * aa) * both
    alone = (both == 0) | (d <= 0) | (dmin < 0)
    d = torch.where(alone, (ax + now.dmin * ab) * inverse(aa), d)
    dmin = torch.where(alone, now.dmin, dmin)
    return f16(torch.where(d > 0, d, now.d)), f16(dmin)


def _keep(better: torch.Tensor, new: Found, old: Found) -> Found:
    return Found(*(torch.where(better, getattr(new, name), getattr(old, name)) for name in Found.__annotations__))


# layouts: docs/formats.md -------------------------------------------------------------------------------------------


def _encode_q2_k(values: torch.Tensor, out: torch.Tensor) -> None:
    found = search_affine(_groups(values, 16), 3, 15, REACHES_2)
    scales, minima = _bytes(found.scales), _bytes(found.minima)
    out[:, :16] = scales | minima << 4
    out[:, 16:80] = _pack_pairs(_elements(found.codes))
    out[:, 80:84] = _halves(found.d, found.dmin)


def _encode_q3_k(values: torch.Tensor, out: torch.Tensor) -> None:
    found = search_symmetric(_groups(values, 16), -4, 3, -32, REACHES_3)
    codes, scales = _elements(found.codes + 4), _bytes(found.scales + 32)
    out[:, :32] = _pack_bits(codes >> 2)
    out[:, 32:96] = _pack_pairs(codes & 3)
    out[:, 96:104] = (scales[:, :8] & 15) | (scales[:, 8:] & 15) << 4
    high = (scales >> 4).view(-1, 4, 4)
    out[:, 104:108] = high[:, 0] | high[:, 1] << 2 | high[:, 2] << 4 | high[:, 3] << 6
    out[:, 108:110] = _halves(found.d)


def _encode_q4_k(values: torch.Tensor, out: torch.Tensor) -> None:
    found = search_affine(_groups(values, 32), 15, 63, REACHES_4)
    out[:, :4] = _halves(found.d, found.dmin)
    out[:, 4:16] = _pack_scales(_bytes(found.scales), _bytes(found.minima))
    out[:, 16:] = _pack_nibbles(_elements(found.codes), 4, 32)


def _encode_q5_k(values: torch.Tensor, out: torch.Tensor) -> None:
    found = search_affine(_groups(values, 32), 31, 63, REACHES_5)
    codes = _elements(found.codes)
    out[:, :4] = _halves(found.d, found.dmin)
    out[:, 4:16] = _pack_scales(_bytes(found.scales), _bytes(found.minima))
    out[:, 16:48] = _pack_bits(codes >> 4)
    out[:, 48:] = _pack_nibbles(codes & 15, 4, 32)


def _encode_q6_k(values: torch.Tensor, out: torch.Tensor) -> None:
    found = search_symmetric(_groups(values, 16), -32, 31, -128, REACHES_6)
    codes = _elements(found.codes + 32)
    out[:, :128] = _pack_nibbles(codes & 15, 2, 64)
    out[:, 128:192] = _pack_pairs(codes >> 4)
    out[:, 192:208] = found.scales.T.to(torch.int8).view(torch.uint8)
    out[:, 208:210] = _halves(found.d)


def _groups(values: torch.Tensor, size: int) -> torch.Tensor:
    """(blocks, 256) -> (size, groups, blocks)."""
    return values.view(len(values), -1, size).permute(2, 1, 0).contiguous()


def _elements(codes: torch.Tensor) -> torch.Tensor:
    """(size, groups, blocks) -> uint8 (blocks, 256)."""
    return codes.to(torch.uint8).permute(2, 1, 0).flatten(1)


def _bytes(scales: torch.Tensor) -> torch.Tensor:
    return scales.T.to(torch.uint8).contiguous()


def _halves(*numbers: torch.Tensor) -> torch.Tensor:
    return torch.stack(numbers, dim=1).half().view(torch.uint8)


def _pack_nibbles(codes: torch.Tensor, chunks: int, half: int) -> torch.Tensor:
    """(blocks, 256) 0..15 -> (blocks, 128): chunks of twice `half` values, their first half in the low nibbles."""
    parts = codes.view(-1, chunks, 2, half)
    return (parts[:, :, 0] | parts[:, :, 1] << 4).flatten(1)


def _pack_pairs(codes: torch.Tensor) -> torch.Tensor:
    """(blocks, 256) 0..3 -> (blocks, 64): element 128 h + 32 k + b is bits 2k of byte 32 h + b."""
    parts = codes.view(-1, 2, 4, 32)
    return (parts[:, :, 0] | parts[:, :, 1] << 2 | parts[:, :, 2] << 4 | parts[:, :, 3] << 6).flatten(1)


def _pack_bits(bits: torch.Tensor) -> torch.Tensor:
    """(blocks, 256) 0..1 -> (blocks, 32): element 32 k + b is bit k of byte b."""
    parts = bits.view(-1, 8, 32)
    packed = parts[:, 0].clone()
    for k in range(1, 8):
        packed |= parts[:, k] << k
    return packed


def _pack_scales(scales: torch.Tensor, minima: torch.Tensor) -> torch.Tensor:
    """8 scales and 8 minima of 6 bits (blocks, 8) -> (blocks, 12): Q4_K and Q5_K."""
    first = scales[:, :4] | (scales[:, 4:] >> 4) << 6
    second = minima[:, :4] | (minima[:, 4:] >> 4) << 6
    last = (scales[:, 4:] & 15) | (minima[:, 4:] & 15) << 4
    return torch.cat([first, second, last], dim=1)


ENCODE_K: dict[BlockFormat, Callable[[torch.Tensor, torch.Tensor], None]] = {
    Q2_K: _encode_q2_k, Q3_K: _encode_q3_k, Q4_K: _encode_q4_k, Q5_K: _encode_q5_k, Q6_K: _encode_q6_k,
}  # fmt: skip
