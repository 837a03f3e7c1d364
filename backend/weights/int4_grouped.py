"""4-bit codes with a scale and a zero for each group of columns, in an open layout: the canonical form of int4.

    W[out, in] = sum over planes of (code - 8) * scale + zero

One plane holds codes of up to 4 bits, two those of 5 to 8 bits (planes.py). GPTQ, AWQ, Q4_0, Q4_1 and Q4_K come into it
with their codes; scale and zero are float16: what a file has as such stays as it is, products and sums of it are
rounded to 11 significant bits. On the CPU, weights are in the layouts of compiled code or of torch instead (tiled.py,
int4.py); this one is for every other device, and in plain torch it works on any.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from backend.kernels.cpu.quantise import q4_1
from backend.kernels.cuda import products
from backend.weights.blocks import Q4_1
from backend.weights.encode import LARGEST, quantize
from backend.weights.planes import Planes

_CHUNK = 1 << 22  # values decoded at once: 8 MiB of bfloat16


@dataclass(frozen=True)
class GroupedPlane:
    """codes uint8 (out, in / 2): of byte j column 2 j in the low and 2 j + 1 in the high bits; scale, zero float16
    (out, in / group)."""

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor


class GroupedInt4Linear:
    """x float32 (tokens, in) -> float32 (tokens, out). `order` int64 (in,): column j of the planes is column order[j]
    of the matrix; None: as they are."""

    def __init__(self, planes: Sequence[GroupedPlane], order: torch.Tensor | None = None) -> None:
        self.planes, self.order = tuple(planes), order
        first = self.planes[0]
        self.out_features, self.in_features = first.codes.shape[0], 2 * first.codes.shape[1]
        self.group = self.in_features // first.scale.shape[1]

    @classmethod
    def of_planes(cls, parts: Sequence[Planes]) -> GroupedInt4Linear:
        """Matrices one above the other, of as many planes, the same groups and the same order."""
        numbers = range(len(parts[0].planes))
        planes = [_stacked([_plane(*part.planes[number]) for part in parts]) for number in numbers]
        return cls(planes, parts[0].order)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if x.is_cuda and (y := self._by_kernels(x)) is not None:
            return y
        return self.product(x)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """The product in bfloat16 by torch, on any device."""
        x16, step = x.bfloat16(), max(1, _CHUNK // self.in_features)
        if self.order is not None:
            x16 = x16.index_select(-1, self.order)
        parts = [F.linear(x16, self._rows(at, at + step).bfloat16()) for at in range(0, self.out_features, step)]
        return torch.cat(parts, dim=-1).float()

    def nbytes(self) -> int:
        # Without the order of columns, as in int4.py.
        return sum(part.codes.nbytes + part.scale.nbytes + part.zero.nbytes for part in self.planes)

    def twin(self) -> torch.Tensor:
        values = self._rows(0, self.out_features)
        return values if self.order is None else torch.empty_like(values).index_copy_(1, self.order, values)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        own = [tensor for part in self.planes for tensor in (part.codes, part.scale, part.zero)]
        return tuple(own) if self.order is None else (*own, self.order)

    def with_tensors(self, tensors: Sequence[torch.Tensor]) -> GroupedInt4Linear:
        triples = zip(tensors[0::3], tensors[1::3], tensors[2::3], strict=False)  # the order of columns is left over
        order = None if self.order is None else tensors[-1]
        return GroupedInt4Linear([GroupedPlane(*three) for three in triples], order)

    def _by_kernels(self, x: torch.Tensor) -> torch.Tensor | None:
        """The sum of the planes' products on a CUDA device; None where there are no kernels."""
        if self.order is not None:
            x = x.index_select(-1, self.order)
        total: torch.Tensor | None = None
        for plane in self.planes:
            y = products.grouped4(x, plane.codes, plane.scale, plane.zero)
            if y is None:
                return None
            total = y if total is None else total + y
        return total

    def _rows(self, start: int, stop: int) -> torch.Tensor:
        """float32 (rows, in), columns in the order of the planes."""
        total: torch.Tensor | None = None
        for part in self.planes:
            packed = part.codes[start:stop]
            codes = torch.stack([packed & 15, packed >> 4], dim=-1).view(packed.shape[0], -1, self.group)
            scale, zero = part.scale[start:stop, :, None].float(), part.zero[start:stop, :, None].float()
            values = ((codes.float() - 8) * scale + zero).flatten(1)
            total = values if total is None else total + values
        assert total is not None
        return total


def quantise(values: torch.Tensor) -> torch.Tensor:
    """float32 (rows, columns), columns whole groups of 32 -> Q4_1 blocks, uint8 (rows, 20 bytes for each 32).

    Scale and minimum are searched for, as the writer of GGUF files does (encode.py): a tenth less error than the
    nearest to the ends. Raises ValueError for numbers that are not finite.
    """
    fits = bool(values.abs().amax() < LARGEST)  # also not, where one is no number
    compiled = q4_1(values) if fits else None
    return quantize(values, Q4_1) if compiled is None else compiled


def _plane(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> GroupedPlane:
    """codes uint8 0..15 (rows, columns), scale and zero float32 (rows, groups); value = (code - 8) * scale + zero."""
    return GroupedPlane(codes[:, 0::2] | codes[:, 1::2] << 4, scale.half(), zero.half())


def _stacked(planes: Sequence[GroupedPlane]) -> GroupedPlane:
    return GroupedPlane(
        torch.cat([plane.codes for plane in planes]),
        torch.cat([plane.scale for plane in planes]),
        torch.cat([plane.zero for plane in planes]),
    )
