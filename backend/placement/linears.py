"""How a weight is kept: from what its file holds (`Stored`) to what the model multiplies with (`Linear`).

One function, `build`, decides it for every value of the preset's key `weights`. Where a linear lives (device, resident
or streamed) is the loader's business, not this file's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from backend.kernels.cpu.memory import empty
from backend.weights.bnb import Int8Rows
from backend.weights.int4 import Int4Linear, can_stack
from backend.weights.int8 import Int8Linear
from backend.weights.linear import Linear, PlainLinear, SplitLinear
from backend.weights.lora import LowRank, lora_linear
from backend.weights.stored import Blocks, Stored, copy_values

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


def build(parts: list[Stored], weights: str) -> Linear:
    """One product of weights that read the same input, one above the other; their file pages are given back."""
    if weights != "original" or (None not in (kinds := {part.dtype for part in parts}) and len(kinds) == 1):
        return PlainLinear(values(parts, weights))
    if any(isinstance(part, LowRank) for part in parts):
        # Packed weights are kept as they are, with their adapters beside them.
        linears = [lora_linear(part, lambda base: build([base], weights)) for part in parts]
        return SplitLinear(linears) if len(linears) > 1 else linears[0]
    packed = _packed(parts)
    if packed is not None:
        for part in parts:
            part.release()
        return packed
    if len(parts) > 1:
        return SplitLinear([build([part], weights) for part in parts])
    return PlainLinear(values(parts, weights))


def values(parts: Sequence[Stored], weights: str) -> torch.Tensor:
    """All rows of all parts, (rows, columns), in the preset's type; with `original` in their own, or bfloat16."""
    dtype = DTYPES.get(weights) or _kept_as(parts[0].dtype)
    out = empty((sum(part.shape[0] for part in parts), parts[0].shape[1]), dtype)
    at = 0
    for part in parts:
        copy_values(part, out[at : at + part.shape[0]])
        part.release()
        at += part.shape[0]
    return out


def _packed(parts: Sequence[Stored]) -> Linear | None:
    """One product of weights as they are packed in the file; None where there is no packed product for them."""
    blocks = [part for part in parts if isinstance(part, Blocks)]
    if len(blocks) == len(parts) and len({part.format for part in blocks}) == 1:
        linear = Int4Linear.of_blocks([part.raw for part in blocks], blocks[0].format)
        if linear is not None:
            return linear
    rows = [part for part in parts if isinstance(part, Int8Rows)]
    if len(rows) == len(parts):
        return Int8Linear(torch.cat([part.codes for part in rows]), torch.cat([part.scale for part in rows]))
    planes = [planes for part in parts if (planes := part.planes()) is not None]
    if len(planes) == len(parts) and can_stack(planes, [part.shape[0] for part in parts]):
        return Int4Linear.of_planes(planes)
    return None


def _kept_as(dtype: torch.dtype | None) -> torch.dtype:
    """Plain types stay, but for float64; what is packed and has no packed product becomes bfloat16."""
    if dtype is None:
        return torch.bfloat16
    return torch.float32 if dtype == torch.float64 else dtype
