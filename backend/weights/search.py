"""Scales for groups of numbers: searches that minimise the squared error. The arithmetic under `encode`, `encode_k`.

Numbers lie (size, ...groups): each group is a column, so that every step is one pass over memory in order and sums run
over the first dimension. The searches follow the idea of llama.cpp's `make_qx_quants` and `make_qkx2_quants`: for each
of a few scales round to codes, fit the best scale to those codes by least squares, keep what errs least.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

F16_MAX = 65504.0
TINY = 2.0**-60  # far below what float16 scales can hold


def symmetric(x: torch.Tensor, low: int, high: int, reaches: Sequence[float]) -> torch.Tensor:
    """Scales (...groups) for x = code * scale, codes low..high. `reaches`: the codes to try for the largest number."""
    top, bottom = x.amax(0), x.amin(0)
    extreme = inverse(torch.where(top >= -bottom, top, bottom))
    best, scale = torch.full_like(top, -1.0), torch.zeros_like(top)
    for reach in reaches:
        codes = (x * (extreme * reach)).round_().clamp_(low, high)
        product = (codes * x).sum(0)
        square = codes.square_().sum(0)
        fitted = product * inverse(square)
        gain = fitted * product  # what the fit takes off the sum of squares
        better = gain > best
        best, scale = torch.where(better, gain, best), torch.where(better, fitted, scale)
    return scale


def affine(x: torch.Tensor, high: int, reaches: Sequence[float], above_zero: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and minimum (...groups) for x = code * scale + minimum, codes 0..high.

    `reaches`: the number of steps to try between the smallest and the largest. `above_zero` False: the minimum may not
    be above zero, as the K types have it.
    """
    count = x.shape[0]
    centre = x.mean(0) if above_zero else torch.zeros_like(x[0])
    x = x - centre
    bottom, top = x.amin(0), x.amax(0)
    if not above_zero:
        bottom.clamp_(max=0)
    span, total = inverse(top - bottom), x.sum(0)
    from_bottom = x - bottom
    best, scale, minimum = torch.full_like(top, -1.0), torch.zeros_like(top), bottom
    for reach in reaches:
        codes = (from_bottom * (span * reach)).round_().clamp_(0, high)
        ones = codes.sum(0)
        product = (codes * x).sum(0)
        square = codes.square_().sum(0)
        fitted = (count * product - ones * total) * inverse(count * square - ones * ones)
        lowest = (total - fitted * ones) / count
        if not above_zero:
            flat = lowest > 0
            lowest = torch.where(flat, 0, lowest)
            fitted = torch.where(flat, product * inverse(square), fitted)
        gain = fitted * product + lowest * total
        better = (gain > best) & (fitted >= 0)
        best, scale = torch.where(better, gain, best), torch.where(better, fitted, scale)
        minimum = torch.where(better, lowest, minimum)
    return scale, minimum + centre


def inverse(x: torch.Tensor) -> torch.Tensor:
    """1 / x, and 0 for what is next to nothing: its products with codes stay finite."""
    return torch.where(x.abs() > TINY, 1 / x, 0)


def f16(x: torch.Tensor) -> torch.Tensor:
    """Rounded to a finite float16, as float32."""
    return x.clamp(-F16_MAX, F16_MAX).half().float()


def f16_up(x: torch.Tensor) -> torch.Tensor:
    """Numbers above zero rounded up to a float16, those at zero as they are: a scale that still reaches its largest."""
    near = f16(x)
    up = (near.half().view(torch.int16) + 1).view(torch.float16).float()
    return torch.where(near < x, up, near).clamp(max=F16_MAX)


def error(x: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Sum of squared differences over the first dimension; `values` is used up."""
    return values.sub_(x).square_().sum(0)
