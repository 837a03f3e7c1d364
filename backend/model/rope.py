"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), in float32 as complex numbers."""

from __future__ import annotations

import torch


class Rope:
    """Turns queries and keys by their position.

    Pair i of a head turns by position * theta^(-2i / head_dim) / factor_i; `factors`, (head_dim / 2,), come from
    `ModelConfig.rope_scaling` or from the `rope_freqs` tensor some files carry. `interleaved`: see ModelConfig.
    """

    def __init__(
        self,
        head_dim: int,
        theta: float,
        *,
        interleaved: bool = True,
        factors: torch.Tensor | None = None,
    ) -> None:
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
        frequencies = theta ** (-exponents)
        if factors is not None:
            frequencies = frequencies / factors.double()
        self._frequencies = frequencies
        self._interleaved = interleaved

    def turns(self, positions: torch.Tensor) -> torch.Tensor:
        """positions (tokens,) int64 -> complex64 (tokens, 1, head_dim / 2), computed once per step for all layers."""
        # float64 angles: at position 100,000 a float32 angle is already off by 0.004 radians.
        angles = positions.double()[:, None, None] * self._frequencies
        return torch.polar(torch.ones_like(angles), angles).to(torch.complex64)

    def apply(self, x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
        """x float32 (tokens, heads, head_dim) -> the same shape, turned."""
        if self._interleaved:
            pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
            return torch.view_as_real(pairs * turns).flatten(-2)
        first, second = x.chunk(2, dim=-1)
        turned = torch.complex(first, second) * turns
        return torch.cat([turned.real, turned.imag], dim=-1)
