"""A checkpoint whose configuration is corrected by hand, for numbers that its file leaves out or has wrong.

ggml files say neither norm_eps nor rope_theta; Meta's Llama 3.2 folders do not say the factor of their scaled rope.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from backend.checkpoint.base import Checkpoint, TensorInfo
from backend.errors import CheckpointError
from backend.model.config import ModelConfig, RopeScaling
from backend.tokenizer.source import TokenizerSource
from backend.weights.stored import Stored


class OverriddenCheckpoint:
    """Everything of `base` but some numbers of its configuration."""

    def __init__(self, base: Checkpoint, config: ModelConfig) -> None:
        self._base, self.config = base, config
        self.path: Path = base.path
        self.files: Sequence[Path] = base.files
        self.format: str = base.format
        self.tensors: Mapping[str, TensorInfo] = base.tensors
        self.tokenizer: TokenizerSource = base.tokenizer

    def read(self, name: str) -> Stored:
        return self._base.read(name)


def with_overrides(checkpoint: Checkpoint, overrides: Mapping[str, float]) -> Checkpoint:
    """`overrides`: norm_eps, rope_theta, rope_factor (of a scaling the model has, or a linear one), context."""
    if not overrides:
        return checkpoint
    config = checkpoint.config
    scaling = config.rope_scaling
    if "rope_factor" in overrides:
        if "rope_freqs" in checkpoint.tensors:
            raise CheckpointError(f"{checkpoint.path}: has its own rope_freqs, so rope_factor cannot be given")
        scaling = dataclasses.replace(scaling or RopeScaling("linear", 1.0), factor=overrides["rope_factor"])
    changed = dataclasses.replace(
        config,
        norm_eps=overrides.get("norm_eps", config.norm_eps),
        rope_theta=overrides.get("rope_theta", config.rope_theta),
        rope_scaling=scaling,
        context=int(overrides.get("context", config.context)),
    )
    return OverriddenCheckpoint(checkpoint, changed)
