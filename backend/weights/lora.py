"""Low-rank adapters: W' = W + scale * B A (LoRA, https://arxiv.org/abs/2106.09685), merged into values or beside them.

`LowRank` is the stored form: reading it gives merged values. A loader that wants to keep a packed W as it is takes
`lora_linear` instead: x W'^T = x W^T + scale * (x A^T) B^T.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from backend.weights.linear import Linear
from backend.weights.planes import Planes
from backend.weights.stored import Stored


class LowRank:
    """A stored matrix (rows, columns) plus scale * b a. `a` float32 (r, columns), `b` float32 (rows, r).

    `dtype` is the base's: None where that is packed. It has no planes, for a sum of codes and floats is not codes.
    """

    def __init__(self, base: Stored, a: torch.Tensor, b: torch.Tensor, scale: float) -> None:
        if base.shape != (b.shape[0], a.shape[1]) or a.shape[0] != b.shape[1]:
            raise ValueError(f"B {tuple(b.shape)} and A {tuple(a.shape)} do not make a matrix of shape {base.shape}")
        self.base, self.a, self.b, self.scale = base, a, b, scale

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def dtype(self) -> torch.dtype | None:
        return self.base.dtype

    def float32(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        return self.base.float32(start, stop).addmm_(self.b[start:stop], self.a, alpha=self.scale)

    def planes(self) -> Planes | None:
        return None

    def release(self) -> None:
        self.base.release()


class LoraLinear:
    """A linear of any kind with an adapter beside it: twice r times (in + out) more operations for each token."""

    def __init__(self, base: Linear, a: torch.Tensor, b: torch.Tensor, scale: float) -> None:
        self.base, self.a, self.b, self.scale = base, a, b, scale
        self.out_features, self.in_features = base.out_features, base.in_features

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.scale * F.linear(F.linear(x, self.a), self.b)

    def nbytes(self) -> int:
        return self.base.nbytes() + self.a.nbytes + self.b.nbytes

    def twin(self) -> torch.Tensor:
        return self.base.twin() + self.scale * (self.b @ self.a)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (*self.base.tensors(), self.a, self.b)

    def with_tensors(self, tensors: Sequence[torch.Tensor]) -> LoraLinear:
        *inner, a, b = tensors
        return LoraLinear(self.base.with_tensors(inner), a, b, self.scale)


def lora_linear(stored: Stored, build: Callable[[Stored], Linear]) -> Linear:
    """`build` of what is under all adapters, with the adapters beside it; `build(stored)` where there are none."""
    if not isinstance(stored, LowRank):
        return build(stored)
    return LoraLinear(lora_linear(stored.base, build), stored.a, stored.b, stored.scale)
