"""ggml blocks multiplied as they are: the bytes of the file in tiles (tiles.py), through compiled code.

Weights are exact: codes, scales and minima are those of the file. Activations are rounded, in groups of 32 columns, to
whole numbers of 12 bits (formats of 4 bits), 11 (5 bits), 10 (6 bits) or 15 (8 bits): so many that a product with AMX
sums their high and low parts at once. A step is the group's largest / (127 * 2^low), low as in kernels/cpu/formats.h.
The result for a token has the same bits however many tokens are multiplied at once, up to 32, on any number of threads.

Where the processor has AMX, more than 32 tokens are multiplied in bfloat16: activations, and weights once they are
decoded, each rounded to 8 significant bits; sums are float32. Elsewhere they are multiplied as few are.
`exact` multiplies by decoded float32 values: slow, and the measure of what rounding costs.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F

from backend.kernels.cpu.products import looked_up, product, retile, tiles_library, values
from backend.weights.blocks import BlockFormat
from backend.weights.decode import dequantize
from backend.weights.tiles import FIELDS, ROWS, Field, is_tiled

log = logging.getLogger(__name__)


class TiledLinear:
    """y = x W^T with W, float (out, in), as ggml blocks in tiles, uint8 (bytes,). On the CPU."""

    def __init__(
        self, tiles: torch.Tensor, fmt: BlockFormat, out_features: int, in_features: int, exact: bool = False
    ) -> None:
        compiled = tiles_library()
        if compiled is None:
            raise RuntimeError("products of tiles need a C compiler")
        self._compiled, self.tiles, self.format, self.exact = compiled, tiles, fmt, exact
        self.out_features, self.in_features = out_features, in_features

    @classmethod
    def of_blocks(cls, raws: Sequence[torch.Tensor], fmt: BlockFormat) -> TiledLinear | None:
        """Matrices of one format, one above the other: raws uint8 (rows, bytes per row).

        None where there is no compiler, where the format has no tiles, and where one that is not the last does not have
        whole tiles of rows.
        """
        compiled = tiles_library()
        whole = all(raw.shape[0] % ROWS == 0 for raw in raws[:-1]) and all(raw.is_contiguous() for raw in raws)
        if compiled is None or not whole or not is_tiled(fmt) or not multiplies_rightly(fmt):
            return None
        columns = raws[0].shape[1] // fmt.bytes * fmt.elements
        return cls(retile(compiled, raws, fmt), fmt, sum(raw.shape[0] for raw in raws), columns)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.exact:
            return F.linear(x, self.decoded())
        return product(self._compiled, self.tiles, self.format, self.out_features, self.in_features, x)

    def nbytes(self) -> int:
        return self.tiles.nbytes

    def decoded(self) -> torch.Tensor:
        """The weight as float32 (out, in), by compiled code."""
        return values(self._compiled, self.tiles, self.format, self.out_features, self.in_features)

    def twin(self) -> torch.Tensor:
        row_bytes = self.format.row_bytes(self.in_features)
        return dequantize(blocks_of_tiles(self.tiles, self.format, row_bytes)[: self.out_features], self.format)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.tiles,)

    def with_tensors(self, tensors: Sequence[torch.Tensor]) -> TiledLinear:
        (tiles,) = tensors
        return TiledLinear(tiles, self.format, self.out_features, self.in_features, self.exact)


class TiledEmbedding:
    """Rows of a product's weight, looked up where that is: one table for both uses. ids int64 (tokens,) -> float32
    (tokens, dim). Raises IndexError for an id that is no row."""

    def __init__(self, weight: TiledLinear) -> None:
        self._weight = weight

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        weight = self._weight
        low, high = (int(end) for end in torch.aminmax(ids)) if len(ids) else (0, 0)
        if low < 0 or high >= weight.out_features:
            raise IndexError(f"ids are from 0 to {weight.out_features - 1}, found {low} to {high}")
        return looked_up(weight._compiled, weight.tiles, weight.format, weight.in_features, ids)

    def nbytes(self) -> int:
        """Beside the product: nothing."""
        return 0

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self._weight.tensors()

    def with_tensors(self, tensors: Sequence[torch.Tensor]) -> TiledEmbedding:
        return TiledEmbedding(self._weight.with_tensors(tensors))


@cache
def multiplies_rightly(fmt: BlockFormat) -> bool:
    """Whether compiled code and torch agree on this machine about tiles, values and products. Asked once a format."""
    compiled = tiles_library()
    if compiled is None:
        return False
    random = torch.Generator().manual_seed(0)
    raw = torch.randint(0, 60, (ROWS, 2 * fmt.bytes), dtype=torch.uint8, generator=random)
    tiles, expected, columns = retile(compiled, [raw], fmt), dequantize(raw, fmt), 2 * fmt.elements
    x = torch.randint(-127, 128, (3, columns), generator=random).float()
    x[:, ::32] = 127.0  # so that whole numbers stay what they are
    found, wanted = product(compiled, tiles, fmt, ROWS, columns, x).double(), x.double() @ expected.double().T
    right = (
        torch.equal(tiles, tiles_of_blocks(raw, fmt))
        and torch.equal(values(compiled, tiles, fmt, ROWS, columns), expected)
        and bool(((found - wanted).abs() <= 1e-5 * (x.abs().double() @ expected.abs().double().T)).all())
    )
    if not right:
        log.warning("compiled products of %s are wrong on this machine: the slower path is used", fmt.name)
    return right


# The layout in plain torch, as tiles.py says it. -------------------------------------------------------------------


def tiles_of_blocks(raw: torch.Tensor, fmt: BlockFormat) -> torch.Tensor:
    """uint8 (rows, bytes per row), rows a multiple of 16 -> tiles, uint8 (bytes,). The slow twin of `retile`."""
    blocks = raw.view(raw.shape[0] // ROWS, ROWS, -1, fmt.bytes).transpose(1, 2)  # (tiles, blocks, 16, bytes)
    parts = [
        _turned(blocks[..., field.start : field.stop], field, 8, 4)
        .unflatten(-1, (-1, field.unit))
        .transpose(2, 3)
        .flatten(2)
        for field in FIELDS[fmt]
    ]
    return torch.cat(parts, dim=-1).flatten()


def blocks_of_tiles(tiles: torch.Tensor, fmt: BlockFormat, row_bytes: int) -> torch.Tensor:
    """The way back: uint8 (rows filled up to a multiple of 16, bytes per row)."""
    records = tiles.view(-1, row_bytes // fmt.bytes, ROWS * fmt.bytes)
    out, at = records.new_empty(*records.shape[:2], ROWS, fmt.bytes), 0
    for field in FIELDS[fmt]:
        size = field.stop - field.start
        part = records[..., at : at + ROWS * size].unflatten(-1, (-1, ROWS, field.unit)).transpose(2, 3).flatten(3)
        out[..., field.start : field.stop] = _turned(part, field, 4, 8)
        at += ROWS * size
    return out.transpose(1, 2).reshape(-1, row_bytes)


def _turned(part: torch.Tensor, field: Field, columns: int, rows: int) -> torch.Tensor:
    """The 32 bits of four bytes as a table of rows and columns, turned over; other fields as they are."""
    if not field.turned:
        return part.contiguous()
    shifts = torch.arange(8, dtype=torch.uint8)
    bits = (part[..., None] >> shifts & 1).flatten(-2).unflatten(-1, (columns, rows)).transpose(-1, -2)
    return (bits.flatten(-2).unflatten(-1, (4, 8)) << shifts).sum(-1, dtype=torch.uint8)
