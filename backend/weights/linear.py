"""What the model sees of a weight: something that multiplies, and says how many bytes it keeps.

The model never asks how a weight is stored. `twin()` is the slow, obvious float32 matrix a fast path must agree with.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F

from backend.kernels.cpu.plain import plain
from backend.kernels.cuda import products
from backend.weights.blocks import BlockFormat
from backend.weights.decode import dequantize


class Linear(Protocol):
    """y = x W^T. `x` is (tokens, in features) float32; so is the result, (tokens, out features)."""

    out_features: int
    in_features: int

    def __call__(self, x: torch.Tensor) -> torch.Tensor: ...

    def nbytes(self) -> int:
        """Bytes of memory this weight holds."""
        ...

    def twin(self) -> torch.Tensor:
        """The weight as float32 (out, in), as the fast path means it."""
        ...

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All memory it holds, always in the same order."""
        ...

    def with_tensors(self, tensors: Sequence[torch.Tensor]) -> Linear:
        """The same weight reading these instead: same shapes and dtypes, other memory or another device."""
        ...


class PlainLinear:
    """A dense matrix in float32, bfloat16 or float16. The product runs in that type; for few tokens on the CPU in
    float32."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight.contiguous()  # (out, in)
        self.out_features, self.in_features = weight.shape

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if x.is_cuda and (y := products.rows(x, self.weight)) is not None:
            return y
        if x.is_cpu and (y := plain(x, self.weight)) is not None:
            return y
        return F.linear(x.to(self.weight.dtype), self.weight).float()

    def nbytes(self) -> int:
        return self.weight.nbytes

    def twin(self) -> torch.Tensor:
        return self.weight.float()

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.weight,)

    def with_tensors(self, tensors: Sequence[torch.Tensor]) -> PlainLinear:
        return PlainLinear(*tensors)


class SplitLinear:
    """Several weights that read the same input, side by side, when they cannot be stored as one."""

    def __init__(self, parts: list[Linear]) -> None:
        self.parts = parts
        self.out_features = sum(part.out_features for part in parts)
        self.in_features = parts[0].in_features

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([part(x) for part in self.parts], dim=-1)

    def nbytes(self) -> int:
        return sum(part.nbytes() for part in self.parts)

    def twin(self) -> torch.Tensor:
        return torch.cat([part.twin() for part in self.parts])

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return tuple(tensor for part in self.parts for tensor in part.tensors())

    def with_tensors(self, tensors: Sequence[torch.Tensor]) -> SplitLinear:
        left = iter(tensors)
        return SplitLinear([part.with_tensors([next(left) for _ in part.tensors()]) for part in self.parts])


class BiasedLinear:
    """y = x W^T + b. The bias, float32 (out,), is zero where one of several stacked weights has none."""

    def __init__(self, linear: Linear, bias: torch.Tensor) -> None:
        self.linear, self.bias = linear, bias
        self.out_features, self.in_features = linear.out_features, linear.in_features

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + self.bias

    def nbytes(self) -> int:
        return self.linear.nbytes() + self.bias.nbytes

    def twin(self) -> torch.Tensor:
        return self.linear.twin()

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (*self.linear.tensors(), self.bias)

    def with_tensors(self, tensors: Sequence[torch.Tensor]) -> BiasedLinear:
        *inner, bias = tensors
        return BiasedLinear(self.linear.with_tensors(inner), bias)


class Embedding(Protocol):
    """Rows of a table, looked up. `ids` (tokens,) int64 -> float32 (tokens, dim)."""

    def __call__(self, ids: torch.Tensor) -> torch.Tensor: ...

    def nbytes(self) -> int: ...

    def tensors(self) -> tuple[torch.Tensor, ...]: ...

    def with_tensors(self, tensors: Sequence[torch.Tensor]) -> Embedding: ...


class PlainEmbedding:
    def __init__(self, table: torch.Tensor) -> None:
        self.table = table  # (vocabulary, dim)

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        return self.table.index_select(0, ids).float()

    def nbytes(self) -> int:
        return self.table.nbytes

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.table,)

    def with_tensors(self, tensors: Sequence[torch.Tensor]) -> PlainEmbedding:
        return PlainEmbedding(*tensors)


class BlockEmbedding:
    """A packed table whose rows are decoded when they are looked up."""

    def __init__(self, raw: torch.Tensor, fmt: BlockFormat) -> None:
        self.raw, self.format = raw.clone(), fmt  # our own copy: the file may go away or change

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        return dequantize(self.raw.index_select(0, ids), self.format)

    def nbytes(self) -> int:
        return self.raw.nbytes

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.raw,)

    def with_tensors(self, tensors: Sequence[torch.Tensor]) -> BlockEmbedding:
        other = copy.copy(self)  # not a new one, which would copy its bytes
        (other.raw,) = tensors
        return other
