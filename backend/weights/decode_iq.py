"""IQ4_NL, IQ4_XS and MXFP4, and the rarer types, which the `gguf` package decodes. Formulas: docs/formats.md."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import gguf
import numpy as np
import torch

from backend.weights.blocks import IQ4_NL, IQ4_XS, MXFP4, BlockFormat
from backend.weights.codes import Codes, halves, nibbles

# The values of the 16 codes.
IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
FP4_VALUES = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # e2m1, doubled


def split_iq4_nl(blocks: torch.Tensor) -> Codes:
    """32 values: d, 16 bytes of nibbles in half order; value = d * table[nibble]."""
    return Codes(_values(nibbles(blocks[:, 2:]), IQ4_VALUES)[:, None], halves(blocks[:, :2]), offset=128)


def split_iq4_xs(blocks: torch.Tensor) -> Codes:
    """8 groups of 32: d, the scales' high bits (u16), their low nibbles (4 bytes), codes; scale d * (s - 32)."""
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=blocks.device)
    high = ((blocks[:, 2:4, None] >> shifts) & 3).flatten(1)  # (n, 8)
    low = torch.stack([blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4], dim=-1).flatten(1)
    scales = ((low | (high << 4)) - 32).view(torch.int8).float()
    codes = _values(nibbles(blocks[:, 8:].view(-1, 8, 16)), IQ4_VALUES)
    return Codes(codes, halves(blocks[:, :2]) * scales, offset=128)


def split_mxfp4(blocks: torch.Tensor) -> Codes:
    """32 values: a power of two as one byte e, 16 bytes of nibbles; value = 2^(e - 128) * doubled e2m1 number."""
    exponent = blocks[:, :1].int()
    # The bits of a float32: below 2 it is subnormal.
    scale = torch.where(exponent < 2, 0x00200000 << exponent, (exponent - 1) << 23).view(torch.float32)
    return Codes(_values(nibbles(blocks[:, 1:]), FP4_VALUES)[:, None], scale, offset=128)


def library_decode(blocks: torch.Tensor, fmt: BlockFormat, out: torch.Tensor) -> None:
    """Whole blocks, uint8 (n, bytes), of a format that the package knows, to `out`, float32 (n, elements)."""
    assert fmt.ggml_id is not None
    raw = blocks.cpu().clone(memory_format=torch.contiguous_format).numpy()
    with np.errstate(all="ignore"):  # scales that are no numbers are the reader's business
        values = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType(fmt.ggml_id))
    out.copy_(torch.from_numpy(values))


def _values(codes: torch.Tensor, values: tuple[int, ...]) -> torch.Tensor:
    """The values of the codes plus 128, so that they are bytes."""
    return _table(values, codes.device).index_select(0, codes.int().flatten()).view(codes.shape)


@cache
def _table(values: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """uint8 (16,), made once: on a GPU, making it means waiting for the device."""
    return torch.tensor([value + 128 for value in values], dtype=torch.uint8, device=device)


SPLIT_IQ: dict[BlockFormat, Callable[[torch.Tensor], Codes]] = {
    IQ4_NL: split_iq4_nl, IQ4_XS: split_iq4_xs, MXFP4: split_mxfp4,
}  # fmt: skip
