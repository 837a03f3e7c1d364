"""4-bit codes through torch's packed 4-bit product on the CPU: one plane of them, or two for 5- to 8-bit codes.

`aten::_weight_int4pack_mm_for_cpu` multiplies bfloat16 activations by 4-bit weights with one bfloat16 scale and zero
per group of columns: value = (code - 8) * scale + zero. It is fast in bfloat16 only (its float32 and float16 forms are
scalar loops), so scales and zeros are rounded to bfloat16 here: 8 significant bits, as a bf16 copy of the weights has.
The codes themselves are kept exactly. What planes a storage format has: planes.py, grouped.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F

from backend.kernels.cpu.repack import repack
from backend.weights.blocks import BlockFormat
from backend.weights.planes import Planes, block_planes

Packed = list[
    tuple[torch.Tensor, torch.Tensor]
]  # planes: codes in the kernel's layout, scales and zeros (groups, out, 2)
ROW_TILE = 16  # the kernel's rows per tile; fewer are filled up with zeros


def can_stack(parts: Sequence[Planes], rows: Sequence[int]) -> bool:
    """Whether matrices that read the same input fit into one product: the same kind of planes, whole tiles of rows."""
    first = parts[0]
    return all(
        len(part.planes) == len(first.planes) and part.group == first.group and _same(part.order, first.order)
        for part in parts
    ) and (len(parts) == 1 or all(count % ROW_TILE == 0 for count in rows))


class Int4Linear:
    """y = x W^T with W as planes of 4-bit codes."""

    def __init__(
        self, packed: Packed, out_features: int, in_features: int, group: int = 32, order: torch.Tensor | None = None
    ) -> None:
        self._planes, self._group, self._order = packed, group, order
        self.out_features, self.in_features = out_features, in_features

    @classmethod
    def of_planes(cls, parts: Sequence[Planes]) -> Int4Linear:
        """Matrices one above the other; `can_stack` must hold."""
        first = parts[0]
        packed: Packed = []
        for number in range(len(first.planes)):
            packed.append(_pack(*(torch.cat(tensors) for tensors in zip(*(part.planes[number] for part in parts)))))
        rows = sum(part.planes[0][0].shape[0] for part in parts)
        return cls(packed, rows, first.planes[0][0].shape[1], first.group, first.order)

    @classmethod
    def of_blocks(cls, raws: Sequence[torch.Tensor], fmt: BlockFormat) -> Int4Linear | None:
        """The same from blocks as they are in the file, at once and fast; None where only `of_planes` can do it.

        raws: uint8 (rows, bytes per row) of one format.
        """
        packed = repack(raws, fmt, _tile_rows()) if _repacks_rightly(fmt) else None
        if packed is None:
            return None
        columns = raws[0].shape[1] // fmt.bytes * fmt.elements
        return cls(packed, sum(raw.shape[0] for raw in raws), columns)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        x16 = x.bfloat16()
        if self._order is not None:
            x16 = x16.index_select(-1, self._order)
        return self._product(x16)

    def nbytes(self) -> int:
        # Without the order of columns, 8 bytes for each: no weight, and one for all that are stacked.
        return sum(codes.nbytes + scales.nbytes for codes, scales in self._planes)

    def twin(self) -> torch.Tensor:
        # The kernel's own layout is private to torch; multiplying the identity gives back the codes' values.
        eye = torch.eye(self.in_features, dtype=torch.bfloat16)
        if self._order is not None:
            eye = eye.index_select(-1, self._order)
        return self._product(eye).T.contiguous()

    def tensors(self) -> tuple[torch.Tensor, ...]:
        planes = [tensor for plane in self._planes for tensor in plane]
        return tuple(planes) if self._order is None else (*planes, self._order)

    def with_tensors(self, tensors: Sequence[torch.Tensor]) -> Int4Linear:
        planes = list(zip(tensors[0::2], tensors[1::2]))  # an odd one at the end is the order of columns
        order = None if self._order is None else tensors[-1]
        return Int4Linear(planes, self.out_features, self.in_features, self._group, order)

    def _product(self, x16: torch.Tensor) -> torch.Tensor:
        total = self._multiply(x16, *self._planes[0])
        for plane in self._planes[1:]:
            total += self._multiply(x16, *plane)
        return total if total.shape[-1] == self.out_features else total[..., : self.out_features].contiguous()

    def _multiply(self, x16: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x16, codes, self._group, scales).float()


@cache
def _repacks_rightly(fmt: BlockFormat) -> bool:
    """Whether compiled code and the slow way agree on this machine: the layout is private to torch. Asked once."""
    tile = _tile_rows()
    random = torch.Generator().manual_seed(0)
    raw = torch.randint(0, 60, (2 * tile, 2 * fmt.bytes), dtype=torch.uint8, generator=random)
    packed, planes = repack([raw], fmt, tile), block_planes(raw, fmt)
    if packed is None or planes is None:
        return False
    expected = [_pack(*plane) for plane in planes.planes]
    return all(torch.equal(*pair) for found, wanted in zip(packed, expected) for pair in zip(found, wanted))


def _pack(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """codes (rows, columns) 0..15, scale and zero float32 (rows, groups) -> the kernel's two tensors."""
    missing = -codes.shape[0] % ROW_TILE
    if missing:
        codes, scale, zero = (F.pad(tensor, (0, 0, 0, missing)) for tensor in (codes, scale, zero))
    scales = torch.stack([scale.T, zero.T], dim=-1).bfloat16()  # (groups, rows, 2)
    return pack_codes(codes), scales


def pack_codes(codes: torch.Tensor) -> torch.Tensor:
    """uint8 (rows, columns) 0..15 -> the kernel's own layout, uint8 (rows, columns / 2).

    torch's own packing wants int32 and goes value by value; this does whole tiles in bytes, ten times as fast. The
    layout is private to torch, so one tile of each matrix is packed by torch too, and if they differ torch does it all.
    """
    rows, columns = codes.shape
    tile = _tile_rows()
    whole = rows // tile * tile
    if not whole:
        return pack_codes_twin(codes)
    packed = _pack_tiles(codes[:whole].view(-1, tile, columns))
    if not torch.equal(packed[:tile], pack_codes_twin(codes[:tile])):
        return pack_codes_twin(codes)
    return torch.cat([packed, pack_codes_twin(codes[whole:])]) if whole < rows else packed


def _tile_rows() -> int:
    """Rows of a whole tile of torch's kernel on this processor."""
    return 64 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 32


def pack_codes_twin(codes: torch.Tensor) -> torch.Tensor:
    """The same by torch's own packing."""
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)


def _pack_tiles(tiles: torch.Tensor) -> torch.Tensor:
    """(tiles, rows of a tile, columns) -> for each tile and column its rows' codes: row r with row r + half a tile."""
    number, tile, columns = tiles.shape
    low, high = tiles.chunk(2, dim=1)
    pairs = (low | (high << 4)).transpose(1, 2)  # (tiles, columns, tile / 2)
    return pairs.reshape(number * tile, columns // 2).contiguous()


def _same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one, other)
