"""Blocks to float32, in plain torch: the slow, obvious twin of every packed path.

Each function takes the raw bytes of whole rows, uint8 (rows, bytes per row), and returns float32 (rows, columns).
Formulas: docs/formats.md; nibbles are in half order: byte j of a block holds element j (low) and j + 16 (high).
"""

from __future__ import annotations

import torch

from backend.weights.blocks import BF16, F16, F32, Q4_0, Q4_1, Q8_0, BlockFormat


def dequantize(raw: torch.Tensor, fmt: BlockFormat) -> torch.Tensor:
    """Decode rows of any format in `blocks.FORMATS` to float32 (rows, columns)."""
    raw = raw.contiguous()
    if fmt is F32:
        return _typed(raw, torch.float32).clone()
    if fmt is F16:
        return _typed(raw, torch.float16).float()
    if fmt is BF16:
        return _typed(raw, torch.bfloat16).float()
    if fmt is Q4_0:
        scale, quants = split_q4_0(raw)
        return ((quants.float() - 8) * scale[..., None]).flatten(1)
    if fmt is Q4_1:
        scale, minimum, quants = split_q4_1(raw)
        return (quants.float() * scale[..., None] + minimum[..., None]).flatten(1)
    if fmt is Q8_0:
        scale, quants = split_q8_0(raw)
        return (quants.float() * scale[..., None]).flatten(1)
    raise ValueError(f"no decoder for {fmt.name}")


def split_q4_0(raw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale float32 (rows, blocks), quants uint8 0..15 (rows, blocks, 32)); value = (quant - 8) * scale."""
    blocks = raw.view(raw.shape[0], -1, Q4_0.bytes)
    return _halves(blocks[..., 0:2]), _nibbles(blocks[..., 2:])


def split_q4_1(raw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(scale, minimum float32 (rows, blocks), quants uint8 0..15 (rows, blocks, 32)); value = quant * scale + min."""
    blocks = raw.view(raw.shape[0], -1, Q4_1.bytes)
    return _halves(blocks[..., 0:2]), _halves(blocks[..., 2:4]), _nibbles(blocks[..., 4:])


def split_q8_0(raw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale float32 (rows, blocks), quants int8 (rows, blocks, 32)); value = quant * scale."""
    blocks = raw.view(raw.shape[0], -1, Q8_0.bytes)
    return _halves(blocks[..., 0:2]), blocks[..., 2:].view(torch.int8)


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    """(..., 16) bytes -> (..., 32) values 0..15."""
    return torch.cat([packed & 15, packed >> 4], dim=-1)


def _halves(pair: torch.Tensor) -> torch.Tensor:
    """(..., 2) bytes -> (...) float32 of the float16 they spell."""
    return pair.contiguous().view(torch.float16).squeeze(-1).float()


def _typed(raw: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    # A view needs its bytes aligned to the type; a slice of a mapped file is only promised 32-byte tensor starts.
    return (raw if raw.storage_offset() % dtype.itemsize == 0 else raw.clone()).view(dtype)
