"""What a preset will take, computed from headers alone. Pure: no torch, nothing is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from backend.model.config import ModelConfig
from backend.presets import Preset
from backend.weights.blocks import Q4_0, Q4_1, Q8_0, BlockFormat

BLOCK_TOKENS = 32
_VALUE_BYTES = {"f32": 4, "bf16": 2, "f16": 2}
# Bytes per block of 32 in the packed 4-bit kernel: 16 of codes and 4 of scale and zero, twice for 8-bit codes.
_PACKED_BYTES = {Q4_0: 20, Q4_1: 20, Q8_0: 40}


class StoredTensor(Protocol):
    """What the plan needs to know of a tensor in a file."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def format(self) -> BlockFormat: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def elements(self) -> int: ...


@dataclass(frozen=True)
class Plan:
    """Sizes in bytes and tokens."""

    context: int
    kv_type: str
    kv_blocks: int
    kv_bytes: int  # reserved; pages are taken as tokens come
    weight_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.kv_bytes


def plan(preset: Preset, config: ModelConfig, tensors: Mapping[str, StoredTensor]) -> Plan:
    """Sizes of a preset on a model. `preset.context` must have been checked against the model's."""
    context = preset.context or config.context
    kv_type = preset.kv_cache if preset.kv_cache != "auto" else ("f32" if preset.weights == "f32" else "bf16")
    # Twice the context: two full chats at once, or one and what others left behind to be found again. Two blocks more,
    # because a chat that begins like another one needs a block of its own where they part.
    kv_tokens = max(preset.kv_tokens or 2 * context, context)
    kv_blocks = -(-kv_tokens // BLOCK_TOKENS) + 2
    return Plan(
        context=context,
        kv_type=kv_type,
        kv_blocks=kv_blocks,
        kv_bytes=kv_blocks * BLOCK_TOKENS * config.kv_bytes_per_token(_VALUE_BYTES[kv_type]),
        weight_bytes=weight_bytes(preset.weights, config, tensors),
    )


def weight_bytes(weights: str, config: ModelConfig, tensors: Mapping[str, StoredTensor]) -> int:
    """Bytes that the loaded weights take, exactly."""
    total = 0
    for name, info in tensors.items():
        if len(info.shape) == 1:
            total += 4 * info.elements
        elif weights != "original":
            total += _VALUE_BYTES[weights] * info.elements  # a tied table serves both its uses as it is
        elif name == "tok_embeddings":
            # A tied plain table serves both uses; of packed blocks the product has its own copy.
            total += info.nbytes + (_linear_bytes(info) if config.tied_output and info.format.elements > 1 else 0)
        else:
            total += _linear_bytes(info)
    return total


def _linear_bytes(info: StoredTensor) -> int:
    packed = _PACKED_BYTES.get(info.format)
    if packed is None or info.shape[0] % 16:
        return info.nbytes
    return info.elements // info.format.elements * packed
