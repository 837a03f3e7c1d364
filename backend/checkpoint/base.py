"""What every reader gives: a description, named tensors that are read only when asked for, and where the tokenizer is.

Canonical tensor names are those of `backend.model.config.tensor_shapes` plus the optional `rope_freqs`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from backend.errors import CheckpointError
from backend.model.config import ModelConfig, tensor_shapes
from backend.tokenizer.source import TokenizerSource
from backend.weights.blocks import BlockFormat, StorageFormat
from backend.weights.stored import Stored

# No tensor of a model that fits on one machine has more values than this; a larger product is a lie or an attack.
MAX_ELEMENTS = 1 << 40


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor before it is read. `shape` is (rows, columns) or (n,); rows are the slow dimension."""

    name: str  # as in the file
    shape: tuple[int, ...]
    format: StorageFormat
    nbytes: int  # in the file or files
    beside: int = 0  # bytes of adapters that stay in memory beside a packed weight (on a plain one they are merged)

    @property
    def elements(self) -> int:
        product = 1
        for size in self.shape:
            product *= size
        return product


class Checkpoint(Protocol):
    """An open model file or folder."""

    @property
    def path(self) -> Path:
        """What the user pointed at."""
        ...

    @property
    def files(self) -> Sequence[Path]:
        """The files the weights are in."""
        ...

    @property
    def format(self) -> str:
        """For people, e.g. "GGUF v3", "Meta, 2 shards", "Hugging Face safetensors, 3 shards"."""
        ...

    @property
    def config(self) -> ModelConfig: ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """By canonical name."""
        ...

    @property
    def tokenizer(self) -> TokenizerSource: ...

    def read(self, name: str) -> Stored:
        """A tensor by canonical name, as views of the mapped file: decode or copy what must outlive it."""
        ...


def checked_extent(
    path: Path, name: str, shape: Sequence[int], fmt: BlockFormat, offset: int, file_size: int, start: int = 0
) -> int:
    """Bytes of a tensor, after checking shape x format x offset against the file. Every reader goes through here.

    `start`: where in the file the part begins that tensors may lie in.
    """
    elements = 1
    for size in shape:
        if size < 1:
            raise CheckpointError(
                f"{path}: tensor '{name}' has shape {tuple(shape)}; every dimension must be at least 1"
            )
        elements *= size
    if elements > MAX_ELEMENTS:
        raise CheckpointError(f"{path}: tensor '{name}' claims {elements} values, more than any model has")
    try:
        row = fmt.row_bytes(shape[-1])
    except ValueError as error:
        raise CheckpointError(f"{path}: tensor '{name}': {error}") from None
    nbytes = elements // shape[-1] * row
    if offset < start or offset + nbytes > file_size:
        raise CheckpointError(
            f"{path}: tensor '{name}' needs bytes {offset} to {offset + nbytes}, but the file has {file_size}; "
            "it is incomplete or damaged, download it again"
        )
    return nbytes


def check_tensors(
    path: Path,
    config: ModelConfig,
    tensors: Mapping[str, TensorInfo],
    file_name: Callable[[str], str] = lambda name: name,
) -> None:
    """Every tensor the model needs is there, and those that are there have the right shape.

    `file_name`: canonical name -> the name the file would give it, for the message.
    """
    optional = {"rope_freqs": (config.head_dim // 2,)}
    for name, shape in (tensor_shapes(config) | optional).items():
        info = tensors.get(name)
        if info is None and name in optional:
            continue
        if info is None:
            raise CheckpointError(f"{path}: tensor '{file_name(name)}' is missing; the model needs it")
        if info.shape != shape:
            raise CheckpointError(f"{path}: tensor '{info.name}' has shape {info.shape}, expected {shape}")
