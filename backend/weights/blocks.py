"""The storage formats of tensors in files, as plain facts: names, ids and sizes. Level 0: no torch.

Block layouts: ggml's `ggml-common.h`, restated in docs/formats.md. A block holds `elements` consecutive values of one
row in `bytes` bytes; plain formats are blocks of one element.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StorageFormat:
    """How values are stored. What it becomes in memory with `weights: original` follows from the fields:

    a plain format stays as it is; `planes` > 0: that many planes of 4-bit codes with a scale and zero per `group`
    columns; `int8`: one byte per value and a scale per row; `codebook`: 4-bit codes with a scale for so many values
    of a row, where rows are whole blocks; none of these: decoded to bfloat16.
    """

    name: str
    planes: int = 0
    group: int = 32
    plain: int = 0  # bytes per value of a plain format
    int8: bool = False
    codebook: int = 0


@dataclass(frozen=True)
class BlockFormat(StorageFormat):
    """A format of whole blocks along each row. `ggml_id` None: a layout of old ggml files without an id today."""

    ggml_id: int | None = None
    elements: int = 1
    bytes: int = 1

    def row_bytes(self, columns: int) -> int:
        """Bytes of one row of `columns` values. Raises ValueError when the row is not whole blocks."""
        if columns % self.elements:
            raise ValueError(f"a row of {columns} values is not a multiple of the {self.name} block ({self.elements})")
        return columns // self.elements * self.bytes


F32 = BlockFormat("F32", plain=4, ggml_id=0, elements=1, bytes=4)
F16 = BlockFormat("F16", plain=2, ggml_id=1, elements=1, bytes=2)
BF16 = BlockFormat("BF16", plain=2, ggml_id=30, elements=1, bytes=2)
F64 = BlockFormat("F64", plain=8, ggml_id=28, elements=1, bytes=8)
Q4_0 = BlockFormat("Q4_0", planes=1, ggml_id=2, elements=32, bytes=18)
Q4_1 = BlockFormat("Q4_1", planes=1, ggml_id=3, elements=32, bytes=20)
Q5_0 = BlockFormat("Q5_0", planes=2, ggml_id=6, elements=32, bytes=22)
Q5_1 = BlockFormat("Q5_1", planes=2, ggml_id=7, elements=32, bytes=24)
Q8_0 = BlockFormat("Q8_0", planes=2, ggml_id=8, elements=32, bytes=34)
# Q2_K has a minimum per 16 columns, the planes one zero per 32: it would take three planes, 15 bits a value.
Q2_K = BlockFormat("Q2_K", ggml_id=10, elements=256, bytes=84)
Q3_K = BlockFormat("Q3_K", planes=2, ggml_id=11, elements=256, bytes=110)
Q4_K = BlockFormat("Q4_K", planes=1, ggml_id=12, elements=256, bytes=144)
Q5_K = BlockFormat("Q5_K", planes=2, ggml_id=13, elements=256, bytes=176)
Q6_K = BlockFormat("Q6_K", ggml_id=14, elements=256, bytes=210)
IQ4_NL = BlockFormat("IQ4_NL", planes=2, ggml_id=20, elements=32, bytes=18)
IQ4_XS = BlockFormat("IQ4_XS", planes=2, ggml_id=23, elements=256, bytes=136)
MXFP4 = BlockFormat("MXFP4", planes=2, ggml_id=39, elements=32, bytes=17)
# Decoded by the gguf package.
IQ2_XXS = BlockFormat("IQ2_XXS", ggml_id=16, elements=256, bytes=66)
IQ2_XS = BlockFormat("IQ2_XS", ggml_id=17, elements=256, bytes=74)
IQ3_XXS = BlockFormat("IQ3_XXS", ggml_id=18, elements=256, bytes=98)
IQ1_S = BlockFormat("IQ1_S", ggml_id=19, elements=256, bytes=50)
IQ3_S = BlockFormat("IQ3_S", ggml_id=21, elements=256, bytes=110)
IQ2_S = BlockFormat("IQ2_S", ggml_id=22, elements=256, bytes=82)
IQ1_M = BlockFormat("IQ1_M", ggml_id=29, elements=256, bytes=56)
TQ1_0 = BlockFormat("TQ1_0", ggml_id=34, elements=256, bytes=54)
TQ2_0 = BlockFormat("TQ2_0", ggml_id=35, elements=256, bytes=66)
NVFP4 = BlockFormat("NVFP4", ggml_id=40, elements=64, bytes=36)

PLAIN: tuple[BlockFormat, ...] = (F32, F16, BF16, F64)
LIBRARY: tuple[BlockFormat, ...] = (IQ2_XXS, IQ2_XS, IQ3_XXS, IQ1_S, IQ3_S, IQ2_S, IQ1_M, TQ1_0, TQ2_0, NVFP4)
FORMATS: tuple[BlockFormat, ...] = (
    *PLAIN, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS, MXFP4, *LIBRARY,
)  # fmt: skip
BY_GGML_ID: dict[int, BlockFormat] = {fmt.ggml_id: fmt for fmt in FORMATS if fmt.ggml_id is not None}
BY_NAME: dict[str, BlockFormat] = {fmt.name: fmt for fmt in FORMATS}

# Names of the ids we know of but cannot open, so that an error can say what a file holds.
OTHER_GGML_NAMES: dict[int, str] = {
    9: "Q8_1", 15: "Q8_K", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 41: "Q1_0",
}  # fmt: skip
