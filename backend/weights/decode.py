"""Blocks to float32: the dispatch, the plain types and the blocks of 32. The slow twin of every packed path.

`dequantize` takes the raw bytes of whole rows, uint8 (rows, bytes per row), and returns float32 (rows, columns).
Formulas: docs/formats.md; nibbles are in half order: byte j of a block holds element j (low) and j + 16 (high).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from backend.weights.blocks import BF16, F16, F32, F64, LIBRARY, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, BlockFormat
from backend.weights.codes import Codes, bits, halves, nibbles
from backend.weights.decode_iq import SPLIT_IQ, library_decode
from backend.weights.decode_k import SPLIT_K
from backend.weights.legacy import SPLIT_LEGACY

CHUNK = 1 << 18  # values decoded at a time: 1 MiB of float32, so that all passes but the last stay in the caches
PLAIN_TYPES = {F32: torch.float32, F16: torch.float16, BF16: torch.bfloat16, F64: torch.float64}


def dequantize(raw: torch.Tensor, fmt: BlockFormat) -> torch.Tensor:
    """Decode rows of any format in `blocks.FORMATS` or `legacy.LEGACY` to float32 (rows, columns): a copy beside it."""
    rows, columns = raw.shape[0], raw.shape[1] // fmt.bytes * fmt.elements
    if fmt in PLAIN_TYPES:
        # A view needs its bytes aligned to the type; a slice of a mapped file is promised nothing.
        flat = raw.contiguous()
        typed = (flat if flat.storage_offset() % fmt.bytes == 0 else flat.clone()).view(PLAIN_TYPES[fmt])
        return torch.empty(typed.shape, dtype=torch.float32, device=raw.device).copy_(typed)
    out = torch.empty(rows, columns, device=raw.device)
    blocks, values = raw.reshape(rows * columns // fmt.elements, fmt.bytes), out.view(-1, fmt.elements)
    step = CHUNK // fmt.elements
    for start in range(0, len(blocks), step):
        part, into = blocks[start : start + step], values[start : start + step]
        if fmt in LIBRARY:
            library_decode(part, fmt, into)
        else:
            split(part, fmt).decode(into)
    return out


def split(blocks: torch.Tensor, fmt: BlockFormat) -> Codes:
    """Whole blocks, uint8 (blocks, bytes), of any packed format that is decoded here, as codes."""
    if fmt not in SPLIT:
        raise ValueError(f"no decoder for {fmt.name}")
    return SPLIT[fmt](blocks)


def split_q4_0(blocks: torch.Tensor) -> Codes:
    return Codes(nibbles(blocks[:, 2:])[:, None], halves(blocks[:, :2]), offset=8)


def split_q4_1(blocks: torch.Tensor) -> Codes:
    scale = halves(blocks[:, :4])
    return Codes(nibbles(blocks[:, 4:])[:, None], scale[:, :1], minimum=scale[:, 1:])


def split_q5_0(blocks: torch.Tensor) -> Codes:
    codes = nibbles(blocks[:, 6:])
    codes |= bits(blocks[:, 2:6], 16)
    return Codes(codes[:, None], halves(blocks[:, :2]), offset=16)


def split_q5_1(blocks: torch.Tensor) -> Codes:
    codes, scale = nibbles(blocks[:, 8:]), halves(blocks[:, :4])
    codes |= bits(blocks[:, 4:8], 16)
    return Codes(codes[:, None], scale[:, :1], minimum=scale[:, 1:])


def split_q8_0(blocks: torch.Tensor) -> Codes:
    return Codes((blocks[:, 2:] ^ 128)[:, None], halves(blocks[:, :2]), offset=128)


SPLIT: dict[BlockFormat, Callable[[torch.Tensor], Codes]] = {
    Q4_0: split_q4_0, Q4_1: split_q4_1, Q5_0: split_q5_0, Q5_1: split_q5_1, Q8_0: split_q8_0,
    **SPLIT_K, **SPLIT_IQ, **SPLIT_LEGACY,
}  # fmt: skip
