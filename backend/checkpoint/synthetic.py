"""Random weights of a named shape in any storage format, made when they are asked for: speed and memory of a model can
be measured without having it.

Every tensor is cut from a quarter of a megabyte of random values that repeats, beginning at another place for each
name. So a tensor costs no more than a copy, and two openings give the same bytes. Values are scaled to keep what flows
through the model of ordinary size. Nothing but these pieces is kept between reads.
"""

from __future__ import annotations

import functools
import math
import mmap
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from backend.checkpoint.base import TensorInfo
from backend.errors import CheckpointError
from backend.model.config import ModelConfig, tensor_shapes
from backend.model.shapes import parse_shape
from backend.tokenizer.source import TokenizerSource
from backend.weights.blocks import F32, BlockFormat
from backend.weights.encode import QUANTIZERS, quantize
from backend.weights.stored import PLAIN_DTYPES, Blocks, Plain, Stored

POOL_BYTES = 1 << 18


class SyntheticCheckpoint:
    """An open model that is only a shape: `shape:NAME[:FORMAT][:KEY=NUMBER ...]`, see `model/shapes.py`.

    Matrices have the format that was asked for, vectors (norms) are ones in float32.
    """

    def __init__(self, path: Path) -> None:
        shape = parse_shape(str(path))
        self.path = path
        self.files: Sequence[Path] = ()
        self.format = f"random weights in {shape.format.name}"
        self.config: ModelConfig = shape.config
        self.tokenizer = TokenizerSource("bytes", path)
        if shape.format not in QUANTIZERS:
            raise CheckpointError(f"{path}: no random weights can be made in {shape.format.name}; try q4_0 or q4_k")
        self._format = shape.format
        self.tensors: Mapping[str, TensorInfo] = {
            name: _info(path, name, size, shape.format if len(size) > 1 else F32)
            for name, size in tensor_shapes(shape.config).items()
        }

    def read(self, name: str) -> Stored:
        info = self.tensors[name]
        if len(info.shape) == 1:
            return Plain(torch.ones(info.shape))
        raw = _tiled(name, info, self._format, self._deviation(name))
        dtype = PLAIN_DTYPES.get(self._format)
        if dtype is not None:
            return Plain(raw.view(dtype).view(info.shape))
        return Blocks(raw.view(info.shape[0], -1), self._format)

    def _deviation(self, name: str) -> float:
        """Standard deviation of a matrix's values: outputs of about the size of the inputs, and what is added to the
        residual stream small enough that all layers together do not drown the embedding."""
        if name == "tok_embeddings" and not self.config.tied_output:
            return 1.0
        deviation = self.tensors[name].shape[1] ** -0.5
        return deviation / math.sqrt(2 * self.config.n_layers) if name.endswith((".wo", ".w2")) else deviation


def _info(path: Path, name: str, shape: tuple[int, ...], fmt: BlockFormat) -> TensorInfo:
    try:
        return TensorInfo(name, shape, fmt, math.prod(shape[:-1]) * fmt.row_bytes(shape[-1]))
    except ValueError as error:
        raise CheckpointError(f"{path}: tensor '{name}': {error}") from None


def _tiled(name: str, info: TensorInfo, fmt: BlockFormat, deviation: float) -> torch.Tensor:
    """uint8 (info.nbytes,): the pool again and again, from a block that the name decides."""
    pool = _pool(fmt, deviation)
    start = zlib.crc32(name.encode()) % (len(pool) // fmt.bytes) * fmt.bytes
    turned = torch.cat([pool[start:], pool[:start]])
    # Pages of its own, as those of a mapped file: they return at once, where the allocator would keep them for later.
    out = torch.frombuffer(mmap.mmap(-1, info.nbytes), dtype=torch.uint8)
    whole = len(out) // len(pool)
    out[: whole * len(pool)].view(whole, len(pool)).copy_(turned.expand(whole, -1))
    out[whole * len(pool) :] = turned[: len(out) - whole * len(pool)]
    return out


@functools.lru_cache(maxsize=8)
def _pool(fmt: BlockFormat, deviation: float) -> torch.Tensor:
    """A quarter of a megabyte of normally distributed values in this format, uint8 (bytes,).

    An odd number of blocks: rows are a power of two of them, or near it, so that no two rows begin alike for long.
    """
    blocks = max(1, POOL_BYTES // fmt.bytes) | 1
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(blocks, fmt.elements, generator=generator) * deviation
    return quantize(values, fmt).flatten()
