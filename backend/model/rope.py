"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), in float32.

On the CPU turns are complex numbers, which torch multiplies in one pass. On other devices, where complex numbers are
slow or missing, they are pairs (cosine, sine); both forms hold the same bytes.
"""

from __future__ import annotations

import copy

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

    @property
    def interleaved(self) -> bool:
        return self._interleaved

    def to(self, device: torch.device | str) -> Rope:
        """The same with its frequencies where the positions will be; those of "mps" stay here, it has no float64."""
        moved = copy.copy(self)
        if torch.device(device).type != "mps":
            moved._frequencies = self._frequencies.to(device)
        return moved

    def turns(self, positions: torch.Tensor) -> torch.Tensor:
        """positions (tokens,) int64 -> complex64 (tokens, 1, head_dim / 2), computed once per step for all layers.

        On a device that is not the CPU: float32 (tokens, 1, head_dim / 2, 2), cosine and sine, on that device.
        """
        # float64 angles: at position 100,000 a float32 angle is already off by 0.004 radians.
        angles = positions.to(self._frequencies.device).double()[:, None, None] * self._frequencies
        if positions.device.type != "cpu":
            return torch.stack([angles.cos(), angles.sin()], dim=-1).float().to(positions.device)
        return torch.polar(torch.ones_like(angles), angles).to(torch.complex64)

    def apply(self, x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
        """x float32 (tokens, heads, head_dim) -> the same shape, turned. `turns` in either form."""
        if not turns.is_complex():
            return turned_by_pairs(x, turns, self._interleaved)
        if self._interleaved:
            pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
            return torch.view_as_real(pairs * turns).flatten(-2)
        first, second = x.chunk(2, dim=-1)
        turned = torch.complex(first, second) * turns
        return torch.cat([turned.real, turned.imag], dim=-1)


def turned_by_pairs(x: torch.Tensor, pairs: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """x (tokens, heads, head_dim), turned by (cosine, sine), pairs (tokens, 1, head_dim / 2, 2): real numbers only."""
    cosine, sine = pairs.unbind(-1)
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    turned = first * cosine - second * sine, first * sine + second * cosine
    return torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)
