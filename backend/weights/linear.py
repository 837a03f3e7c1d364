"""What the model sees of a weight: something that multiplies, and says how many bytes it keeps.

The model never asks how a weight is stored. `twin()` is the slow, obvious float32 matrix a fast path must agree with.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F

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


class PlainLinear:
    """A dense matrix in float32, bfloat16 or float16; the multiplication runs in that type."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight.contiguous()  # (out, in)
        self.out_features, self.in_features = weight.shape

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x.to(self.weight.dtype), self.weight).float()

    def nbytes(self) -> int:
        return self.weight.nbytes

    def twin(self) -> torch.Tensor:
        return self.weight.float()


class BlockLinear:
    """Packed blocks kept as they are in the file and decoded a few rows at a time for each product.

    Slow, exact (float32 arithmetic on the file's own values), for shapes and formats without a packed kernel.
    """

    CHUNK_ELEMENTS = 1 << 22  # decoded at once: 16 MiB of float32

    def __init__(self, raw: torch.Tensor, fmt: BlockFormat) -> None:
        self.raw, self.format = raw.clone(), fmt  # our own copy: the file may go away or change
        self.out_features = raw.shape[0]
        self.in_features = raw.shape[1] // fmt.bytes * fmt.elements

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        step = max(1, self.CHUNK_ELEMENTS // self.in_features)
        parts = [F.linear(x, dequantize(rows, self.format)) for rows in self.raw.split(step)]
        return torch.cat(parts, dim=-1)

    def nbytes(self) -> int:
        return self.raw.nbytes

    def twin(self) -> torch.Tensor:
        return dequantize(self.raw, self.format)


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


class Embedding:
    """Rows of a packed or plain table, decoded when looked up. `ids` (tokens,) int64 -> float32 (tokens, dim)."""

    def __init__(self, raw: torch.Tensor, fmt: BlockFormat) -> None:
        self.raw, self.format = raw.clone(), fmt

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        return dequantize(self.raw.index_select(0, ids), self.format)

    def nbytes(self) -> int:
        return self.raw.nbytes
