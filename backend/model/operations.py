"""What a decoder computes between its products: the residual stream with its norms, and the gate of the feed-forward.

The plain functions are the definition. A device may bring fused ones (`Operations`), which must agree with them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F


def add_norm(
    x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The residual stream x + delta, and its root-mean-square norm times `weight` (arXiv:1910.07467).

    x, delta float32 (tokens, dim); weight float32 (dim,). Returns both, float32 (tokens, dim).
    """
    if delta is not None:
        x = x + delta
    return x, F.rms_norm(x, (x.shape[-1],), weight, eps)


def gated(both: torch.Tensor) -> torch.Tensor:
    """SwiGLU (arXiv:2002.05202): float32 (tokens, 2 * ffn_dim), gate then up -> silu(gate) * up, (tokens, ffn_dim)."""
    gate, up = both.chunk(2, dim=-1)
    return F.silu(gate) * up


@dataclass(frozen=True)
class Operations:
    add_norm: Callable[[torch.Tensor, torch.Tensor | None, torch.Tensor, float], tuple[torch.Tensor, torch.Tensor]]
    gated: Callable[[torch.Tensor], torch.Tensor]


PLAIN = Operations(add_norm, gated)
