"""Layers that bitsandbytes quantised, as Hugging Face checkpoints hold them: LLM.int8 rows, NF4 and FP4."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import torch

from backend.checkpoint.base import TensorInfo
from backend.checkpoint.container import RawTensor
from backend.checkpoint.gptq import LinearPlace
from backend.errors import CheckpointError
from backend.weights.blocks import StorageFormat
from backend.weights.bnb import Codebook4, Int8Rows, nested_absmax
from backend.weights.stored import Stored

INT8 = StorageFormat("LLM.int8", int8=True)
_TILED = {1: "col32", 2: "col_turing", 3: "col_ampere"}
_STATE = "weight.quant_state.bitsandbytes__"
_MAX_STATE = 4096  # bytes of JSON; a real one has under 300
_MAX_BLOCK = 1 << 16
Opened = tuple[TensorInfo, Callable[[], Stored]]


def int8_linear(place: LinearPlace) -> Opened:
    """weight int8 [out, in], SCB float32 [out], weight_format 0 (rows) or absent."""
    weight = place.checked("weight", (place.rows, place.columns), (torch.int8,))
    scb = place.checked("SCB", (place.rows,), (torch.float32, torch.float16, torch.bfloat16))
    if place.has("weight_format"):
        raw = place.raw("weight_format")
        value = int(raw.view().reshape(-1)[0]) if raw.nbytes and math.prod(raw.shape) == 1 else -1
        if value != 0:
            raise CheckpointError(
                f"{place.path}: tensor '{raw.name}' is {_TILED.get(value, value)}, a tiling for one kind of GPU; only "
                "0 (row) can be opened"
            )

    def release() -> None:
        weight.release()
        scb.release()

    return place.info("weight", INT8, [weight, scb]), lambda: Int8Rows(weight.view(), scb.view(), release)


def codebook_linear(place: LinearPlace) -> Opened:
    """4-bit blocks: packed weight, absmax, quant_map, perhaps nested_*, and the quant_state as JSON in a tensor."""
    kind = next((kind for kind in ("nf4", "fp4") if place.has(_STATE + kind)), None)
    if kind is None:
        raise CheckpointError(
            f"{place.path}: tensor '{place.prefix}.{_STATE}nf4' (or ...fp4) is missing; without it the 4-bit layer "
            "cannot be read"
        )
    state = _State(place, place.raw(_STATE + kind), kind)
    values = place.rows * place.columns
    weight = place.raw("weight")
    if weight.nbytes != -(-values // 2):  # of any type: the bytes may be stored as another type for sharding
        raise CheckpointError(
            f"{place.path}: tensor '{weight.name}' has {weight.nbytes} bytes, expected {-(-values // 2)} for 4-bit "
            f"values of shape {(place.rows, place.columns)}"
        )
    block = state.block("blocksize")
    blocks = -(-values // block)
    book = place.checked("weight.quant_map", (16,), (torch.float32,))
    used = [weight, book]
    if place.has("weight.nested_absmax"):
        nested_block, offset = state.block("nested_blocksize"), state.number("nested_offset")
        absmax = place.checked("weight.absmax", (blocks,), (torch.uint8,))
        nested_book = place.checked("weight.nested_quant_map", (256,), (torch.float32,))
        nested = place.checked("weight.nested_absmax", (-(-blocks // nested_block),), (torch.float32,))
        used += [absmax, nested_book, nested]
    else:
        absmax = place.checked("weight.absmax", (blocks,), (torch.float32,))
        used.append(absmax)

    def release() -> None:
        for raw in used:
            raw.release()

    def read() -> Stored:
        scale = absmax.view()
        if absmax.dtype == torch.uint8:
            scale = nested_absmax(scale, nested_book.view(), nested.view(), nested_block, offset)
        packed = weight.view().reshape(-1).view(torch.uint8)
        return Codebook4(packed, (place.rows, place.columns), book.view(), scale, block, release)

    return place.info("weight", StorageFormat(kind.upper(), codebook=block), used), read


class _State:
    """The JSON of quant_state, read with checks."""

    def __init__(self, place: LinearPlace, raw: RawTensor, kind: str) -> None:
        self._path, self._name = place.path, raw.name
        if raw.dtype != torch.uint8 or not 1 <= raw.nbytes <= _MAX_STATE:
            raise CheckpointError(f"{self._path}: tensor '{raw.name}' is no short text of bytes")
        try:
            values = json.loads(bytes(raw.view().reshape(-1).tolist()))
        except (ValueError, RecursionError):
            values = None
        if not isinstance(values, dict):
            raise CheckpointError(f"{self._path}: tensor '{raw.name}' is no JSON object")
        self._values: dict[str, Any] = values
        shape, expected = values.get("shape"), [place.rows, place.columns]
        if shape != expected:
            raise CheckpointError(f"{self._path}: 'shape' in tensor '{raw.name}' is {shape!r}, expected {expected}")
        if values.get("quant_type", kind) != kind:
            raise CheckpointError(
                f"{self._path}: 'quant_type' in tensor '{raw.name}' is {values['quant_type']!r}, expected '{kind}'"
            )

    def block(self, key: str) -> int:
        """A block length: an even number, so that blocks start at bytes."""
        value = self._values.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or not 2 <= value <= _MAX_BLOCK or value % 2:
            raise CheckpointError(
                f"{self._path}: '{key}' in tensor '{self._name}' is {value!r}, expected an even number from 2 to "
                f"{_MAX_BLOCK}"
            )
        return value

    def number(self, key: str) -> float:
        value = self._values.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e6:
            raise CheckpointError(f"{self._path}: '{key}' in tensor '{self._name}' is {value!r}, expected a number")
        return float(value)
