"""Keys and values in 8 bits: symmetric codes -127 .. 127 and one float32 scale for each token and head.

The twin of what a compiled step does (kernels/cpu: `keep` of step.c, `widen` of attend.h); their codes and scales are
the same to the bit. Rounding moves a value by at most half a step: 1/254 of the largest in its head.
"""

from __future__ import annotations

import torch

SMALLEST = 1e-30  # a head whose largest value is below counts as zero: its inverse would be no number


def quantised(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 (..., head_dim) -> codes int8 (..., head_dim), scales float32 (...).

    scale = largest / 127, code = value * (127 / largest) to the nearest, half to even. Where a value is NaN or
    infinite the scale is NaN, so that it is not lost.
    """
    largest = values.abs().amax(dim=-1)
    none = largest < SMALLEST
    inverse = torch.where(none, 0.0, 127.0 / largest)
    codes = (values * inverse[..., None]).round().nan_to_num(0.0, 0.0, 0.0).clamp(-127, 127).to(torch.int8)
    scales = torch.where(none, 0.0, largest / 127.0)
    return codes, torch.where(largest.isfinite(), scales, torch.nan)


def values_of(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """codes (..., head_dim), scales (...) -> values (..., head_dim); computed in float32."""
    return (codes.float() * scales[..., None]).to(dtype)
