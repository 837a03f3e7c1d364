"""What a preset will take, computed from headers alone. Pure: no torch, nothing is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from backend.model.config import ModelConfig
from backend.presets import Preset
from backend.weights.blocks import BlockFormat, StorageFormat

BLOCK_TOKENS = 32
_VALUE_BYTES = {"f32": 4, "bf16": 2, "f16": 2}
_ROW_TILE = 16  # rows the packed product takes at a time; the last tile is filled up


class StoredTensor(Protocol):
    """What the plan needs to know of a tensor in a file."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def format(self) -> StorageFormat: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def elements(self) -> int: ...
    @property
    def beside(self) -> int: ...


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
            total += _table_bytes(info)
            # A tied table of values serves both uses; of packed blocks the product has its own copy.
            if config.tied_output and isinstance(info.format, BlockFormat) and not info.format.plain:
                total += _linear_bytes(info)
        else:
            total += _linear_bytes(info)
    # Biases of several weights in one product are one vector, with zeros for those that have none.
    for stacked in (("wq", "wk", "wv"), ("w1", "w3")):
        if any(name in config.biases for name in stacked):
            for n in range(config.n_layers):
                missing = [name for name in stacked if name not in config.biases]
                total += sum(4 * tensors[f"layers.{n}.{name}"].shape[0] for name in missing)
    return total


def _table_bytes(info: StoredTensor) -> int:
    """An embedding: ggml's blocks are kept as they are, the rest as values."""
    if isinstance(info.format, BlockFormat):
        return min(info.format.plain, 4) * info.elements if info.format.plain else info.nbytes
    return 2 * info.elements  # decoded to bfloat16


def _linear_bytes(info: StoredTensor) -> int:
    fmt = info.format
    rows, columns = info.shape
    if fmt.plain:
        return min(fmt.plain, 4) * info.elements
    return info.beside + _packed_bytes(fmt, rows, columns)


def _packed_bytes(fmt: StorageFormat, rows: int, columns: int) -> int:
    if fmt.int8:
        return rows * columns + 4 * rows  # a float32 scale for each row
    if fmt.planes:
        padded = -(-rows // _ROW_TILE) * _ROW_TILE
        # Codes, and a scale and a zero in bfloat16 for each group.
        return fmt.planes * (padded * columns // 2 + padded * (columns // fmt.group) * 4)
    return 2 * rows * columns  # decoded to bfloat16
