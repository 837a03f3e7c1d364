"""The storage formats of tensors in files, as plain facts: names, ids and sizes. Level 0: no torch.

Block layouts: ggml's `ggml-common.h`, restated in docs/formats.md. A block holds `elements` consecutive values of one
row in `bytes` bytes; plain formats are blocks of one element.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BlockFormat:
    name: str
    ggml_id: int
    elements: int
    bytes: int

    def row_bytes(self, columns: int) -> int:
        """Bytes of one row of `columns` values. Raises ValueError when the row is not whole blocks."""
        if columns % self.elements:
            raise ValueError(f"a row of {columns} values is not a multiple of the {self.name} block ({self.elements})")
        return columns // self.elements * self.bytes


F32 = BlockFormat("F32", 0, 1, 4)
F16 = BlockFormat("F16", 1, 1, 2)
Q4_0 = BlockFormat("Q4_0", 2, 32, 18)
Q4_1 = BlockFormat("Q4_1", 3, 32, 20)
Q8_0 = BlockFormat("Q8_0", 8, 32, 34)
BF16 = BlockFormat("BF16", 30, 1, 2)

FORMATS: tuple[BlockFormat, ...] = (F32, F16, BF16, Q4_0, Q4_1, Q8_0)
BY_GGML_ID: dict[int, BlockFormat] = {fmt.ggml_id: fmt for fmt in FORMATS}
BY_NAME: dict[str, BlockFormat] = {fmt.name: fmt for fmt in FORMATS}

# Names of the ids we know of but cannot open yet, so that an error can say what a file holds.
OTHER_GGML_NAMES: dict[int, str] = {
    6: "Q5_0", 7: "Q5_1", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K",
    16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS",
    24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip
