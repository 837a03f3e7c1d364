"""Tiles: the layout in which compiled code multiplies packed weights. Which formats have it and the bytes it takes.

A tile is 16 rows, and a record one block of each of them: every field of the block in turn, for all 16 rows, in units
of 2 or 4 bytes, row after row. So tiles hold the very bytes of the file in another order, and take as many, but for
rows of zeros that fill up the last tile. `kernels/cpu/formats.h` reads what this table says. Level 0: no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from backend.weights.blocks import (
    IQ4_NL,
    IQ4_XS,
    Q4_0,
    Q4_1,
    Q4_K,
    Q5_0,
    Q5_1,
    Q5_K,
    Q6_K,
    Q8_0,
    BlockFormat,
    StorageFormat,
)

ROWS = 16


@dataclass(frozen=True)
class Field:
    """Bytes `start` to `stop` of a block, moved in units of `unit` bytes.

    `turned`: 32 bits, of which bit 4 u + b becomes bit 8 b + u: one shift and a mask give four columns their fifth bit.
    """

    start: int
    stop: int
    unit: int
    turned: bool = False


FIELDS: dict[BlockFormat, tuple[Field, ...]] = {
    Q4_0: (Field(0, 2, 2), Field(2, 18, 4)),
    Q4_1: (Field(0, 4, 2), Field(4, 20, 4)),
    Q5_0: (Field(0, 2, 2), Field(2, 6, 4, turned=True), Field(6, 22, 4)),
    Q5_1: (Field(0, 4, 2), Field(4, 8, 4, turned=True), Field(8, 24, 4)),
    Q8_0: (Field(0, 2, 2), Field(2, 34, 4)),
    Q4_K: (Field(0, 4, 2), Field(4, 144, 4)),
    Q5_K: (Field(0, 4, 2), Field(4, 176, 4)),
    Q6_K: (Field(208, 210, 2), Field(192, 208, 4), Field(0, 192, 4)),
    IQ4_NL: (Field(0, 2, 2), Field(2, 18, 4)),
    IQ4_XS: (Field(0, 4, 2), Field(4, 136, 4)),
}


def is_tiled(fmt: StorageFormat) -> bool:
    """Whether compiled code multiplies this format in tiles."""
    return isinstance(fmt, BlockFormat) and fmt in FIELDS


def tiled_bytes(fmt: BlockFormat, rows: int, columns: int) -> int:
    """Bytes of a matrix in tiles."""
    return -(-rows // ROWS) * ROWS * fmt.row_bytes(columns)
