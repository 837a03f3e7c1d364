"""How a weight is kept: from what its file holds (`Stored`) to what the model multiplies with (`Linear`).

One function, `build`, decides it for every value of the preset's key `weights`. What a file has quantised to the asked
form already is taken over, code by code; anything else is decoded and quantised, some rows at a time (quantised.py).
Where a linear lives (device, resident or streamed) is the loader's business, not this file's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from backend.kernels.cpu.memory import bring, empty
from backend.placement.quantised import int8_for, is_int4, kept_linear, llm_int8_linear, nf4_linear, quantised_int4
from backend.weights.blocks import Q4_1
from backend.weights.in_rows import RowsLinear, ViewsLinear
from backend.weights.int4 import ROW_TILE, Int4Linear, can_stack
from backend.weights.int4_grouped import GroupedInt4Linear
from backend.weights.linear import Linear, PlainLinear, SplitLinear
from backend.weights.lora import LowRank, lora_linear
from backend.weights.stored import Blocks, Plain, Stored, copy_values
from backend.weights.tiled import TiledLinear, multiplies_rightly
from backend.weights.tiles import is_tiled

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
# Forms of rows that are the same on every device.
ROW_FORMS: dict[str, Callable[[Sequence[Stored]], Linear | None]] = {
    "llm-int8": llm_int8_linear,
    "nf4": nf4_linear,
}


def build(parts: list[Stored], weights: str, device: str = "cpu") -> Linear:
    """One product of weights that read the same input, one above the other; their file pages are given back.

    `weights`: how they are kept, a value of the preset's key. `device`: the type of device that will multiply, because
    layouts for the CPU mean nothing elsewhere. The result is on the CPU.
    """
    if weights in DTYPES or (weights == "original" and _plain(parts)):
        return PlainLinear(values(parts, weights))
    if any(isinstance(part, LowRank) and part.dtype is None for part in parts):
        # Packed weights are kept packed, with their adapters beside them.
        linears = [lora_linear(part, lambda base: build([base], weights, device)) for part in parts]
        return SplitLinear(linears) if len(linears) > 1 else linears[0]
    linear = ROW_FORMS[weights](parts) if weights in ROW_FORMS else _packed_form(parts, weights, device)
    if linear is not None:
        for part in parts:
            part.release()
        return linear
    if len(parts) > 1:
        return SplitLinear([build([part], weights, device) for part in parts])
    return PlainLinear(values(parts, "original" if weights == "original" else "bf16"))


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


def _plain(parts: Sequence[Stored]) -> bool:
    """Whether all are numbers of one type."""
    kinds = {part.dtype for part in parts}
    return None not in kinds and len(kinds) == 1


def _packed_form(parts: Sequence[Stored], weights: str, device: str) -> Linear | None:
    """Packed weights as they are in the file where the device has products of them, or (int8, int4) made here."""
    if weights == "int8":
        return int8_for(parts, device)
    if weights == "int4":
        if parts[0].shape[1] % Q4_1.elements:
            return None
        parts = [part if is_int4(part) else quantised_int4(part) for part in parts]
    kept = kept_linear(parts)
    if kept is not None:
        return kept
    if device == "cpu":
        return _packed(parts)
    planes = [planes for part in parts if (planes := part.planes()) is not None]
    if len(planes) < len(parts) or not can_stack(planes, [ROW_TILE] * len(parts)):
        return None
    return GroupedInt4Linear.of_planes(planes)


def borrow(parts: Sequence[Stored], weights: str) -> Linear | None:
    """Like `build`, for one use: a product that reads the weights where the file is mapped, all of them in memory now.

    None where such a product does not exist: then `build` it is. When it goes, the pages are given back.
    """

    def release() -> None:
        for part in parts:
            part.release()

    linear: Linear | None = None
    blocks = [part for part in parts if isinstance(part, Blocks)]
    plain = [part.values for part in parts if isinstance(part, Plain)]
    if weights == "original" and len(blocks) == len(parts) and len({part.format for part in blocks}) == 1:
        linear = RowsLinear.of_blocks([part.raw for part in blocks], blocks[0].format, release)
    elif len(plain) == len(parts) and all(values.dtype == DTYPES.get(weights, values.dtype) for values in plain):
        linear = ViewsLinear.of_views(plain, release) if weights in (*DTYPES, "original") else None
    for tensor in () if linear is None else linear.tensors():
        bring(tensor)
    return linear


def _packed(parts: Sequence[Stored]) -> Linear | None:
    """One product of weights as they are packed in the file; None where there is no packed product for them."""
    blocks = [part for part in parts if isinstance(part, Blocks)]
    if len(blocks) == len(parts) and len({part.format for part in blocks}) == 1:
        linear = TiledLinear.of_blocks([part.raw for part in blocks], blocks[0].format)
        if linear is not None:
            return linear
    if len(parts) > 1 and any(multiplies_rightly(part.format) for part in blocks if is_tiled(part.format)):
        return None  # each for itself: planes are the slower way
    planes = [planes for part in parts if (planes := part.planes()) is not None]
    if len(planes) == len(parts) and can_stack(planes, [part.shape[0] for part in parts]):
        return Int4Linear.of_planes(planes)
    return None


def _kept_as(dtype: torch.dtype | None) -> torch.dtype:
    """Plain types stay, but for float64; what is packed and has no packed product becomes bfloat16."""
    if dtype is None:
        return torch.bfloat16
    return torch.float32 if dtype == torch.float64 else dtype
