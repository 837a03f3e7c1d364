"""From an open checkpoint to a model in memory, as the preset says: packed, bf16, f16 or f32.

Peak memory is the finished model plus one tensor's conversion: values go from the mapped file straight to their final
place, and its pages are given back at once. Weights are never widened beyond what was asked.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import torch

from backend.checkpoint.base import Checkpoint
from backend.checkpoint.mapped import read_ahead
from backend.events import LoadProgress
from backend.kernels.cpu.memory import empty
from backend.model.llama import Layer, Llama
from backend.model.rope import Rope
from backend.weights.bnb import Int8Rows
from backend.weights.int4 import Int4Linear, can_stack
from backend.weights.int8 import Int8Linear
from backend.weights.linear import (
    BiasedLinear,
    BlockEmbedding,
    Embedding,
    Linear,
    PlainEmbedding,
    PlainLinear,
    SplitLinear,
)
from backend.weights.lora import LowRank, lora_linear
from backend.weights.stored import Blocks, Stored, copy_values

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


class Loaded:
    """A model, the bytes its weights take, and how many of these one token reads (all but a table looked up in)."""

    def __init__(self, model: Llama, weight_bytes: int, bytes_per_token: int, output_bytes: int) -> None:
        self.model, self.weight_bytes, self.bytes_per_token = model, weight_bytes, bytes_per_token
        self.output_bytes = output_bytes


def load_model(
    checkpoint: Checkpoint, weights: str, label: str, progress: Callable[[LoadProgress], None] = lambda _: None
) -> Loaded:
    """Read all tensors. `weights`: original | bf16 | f16 | f32. `progress` is told about bytes of the file."""
    return _Loader(checkpoint, weights, label, progress).load()


class _Loader:
    def __init__(
        self, checkpoint: Checkpoint, weights: str, label: str, progress: Callable[[LoadProgress], None]
    ) -> None:
        self._checkpoint, self._weights, self._label, self._progress = checkpoint, weights, label, progress
        self._done, self._total = 0, sum(info.nbytes for info in checkpoint.tensors.values())
        self._kept = 0

    def load(self) -> Loaded:
        config = self._checkpoint.config
        # The call returns when all is asked for, not when it has come; that alone takes a while for a large file.
        threading.Thread(target=read_ahead, args=(self._checkpoint.files,), name="read ahead", daemon=True).start()
        embedding = self._embedding()
        layers = []
        for n in range(config.n_layers):
            at = f"layers.{n}."
            layers.append(
                Layer(
                    attention_norm=self._vector(at + "attention_norm"),
                    wqkv=self._linear(at + "wq", at + "wk", at + "wv"),
                    wo=self._linear(at + "wo"),
                    ffn_norm=self._vector(at + "ffn_norm"),
                    w13=self._linear(at + "w1", at + "w3"),
                    w2=self._linear(at + "w2"),
                )
            )
        output = self._output(embedding)
        model = Llama(config, embedding, tuple(layers), self._vector("norm"), output, self._rope())
        shared = isinstance(embedding, PlainEmbedding) and config.tied_output
        read = self._kept - (0 if shared else embedding.nbytes())
        return Loaded(model, self._kept, read, output.nbytes())

    # parts ------------------------------------------------------------------------------------------------------------

    def _rope(self) -> Rope:
        config = self._checkpoint.config
        factors = None
        if config.rope_scaling is not None:
            divisors = config.rope_scaling.divisors(config.head_dim, config.rope_theta)
            factors = torch.tensor(divisors, dtype=torch.float64)
        if "rope_freqs" in self._checkpoint.tensors:
            table = self._vector("rope_freqs").double()
            factors = table if factors is None else factors * table
        return Rope(config.head_dim, config.rope_theta, interleaved=config.rope_interleaved, factors=factors)

    def _vector(self, name: str) -> torch.Tensor:
        """A norm, a bias or a table of factors: small, and always float32, as every LLaMA keeps them in computation."""
        stored = self._checkpoint.read(name)
        vector = stored.float32().flatten()
        self._count(vector.nbytes, name)
        return vector

    def _embedding(self) -> Embedding:
        name = "tok_embeddings"
        stored = self._checkpoint.read(name)
        embedding: Embedding
        if self._weights == "original" and isinstance(stored, Blocks):
            embedding = BlockEmbedding(stored.raw, stored.format)
            stored.release()
        else:
            embedding = PlainEmbedding(self._values([stored]))
        self._count(embedding.nbytes(), name)
        return embedding

    def _output(self, embedding: Embedding) -> Linear:
        if not self._checkpoint.config.tied_output:
            return self._linear("output")
        if isinstance(embedding, PlainEmbedding):
            return PlainLinear(embedding.table)  # one table for both uses
        return self._linear("tok_embeddings", count=False)

    def _linear(self, *names: str, count: bool = True) -> Linear:
        """One weight, or several that read the same input stacked into one product; with their biases."""
        linear = self._stacked([self._checkpoint.read(name) for name in names])
        self._kept += linear.nbytes()
        if count:
            self._count(0, *names)
        return self._with_bias(linear, names)

    def _with_bias(self, linear: Linear, names: Sequence[str]) -> Linear:
        tensors = self._checkpoint.tensors
        if not any(f"{name}_bias" in tensors for name in names):
            return linear
        parts = [
            self._vector(f"{name}_bias") if f"{name}_bias" in tensors else torch.zeros(tensors[name].shape[0])
            for name in names
        ]
        return BiasedLinear(linear, torch.cat(parts))

    def _stacked(self, parts: list[Stored]) -> Linear:
        if self._weights != "original" or (None not in (kinds := {part.dtype for part in parts}) and len(kinds) == 1):
            return PlainLinear(self._values(parts))
        if any(isinstance(part, LowRank) for part in parts):
            # Packed weights are kept as they are, with their adapters beside them.
            linears = [lora_linear(part, lambda base: self._stacked([base])) for part in parts]
            return SplitLinear(linears) if len(linears) > 1 else linears[0]
        packed = _packed(parts)
        if packed is not None:
            for part in parts:
                part.release()
            return packed
        if len(parts) > 1:
            return SplitLinear([self._stacked([part]) for part in parts])
        return PlainLinear(self._values(parts))

    def _values(self, parts: Sequence[Stored]) -> torch.Tensor:
        """All rows of all parts, (rows, columns), in the preset's type; with `original` in their own, or bfloat16."""
        dtype = DTYPES.get(self._weights) or _kept_as(parts[0].dtype)
        out = empty((sum(part.shape[0] for part in parts), parts[0].shape[1]), dtype)
        at = 0
        for part in parts:
            copy_values(part, out[at : at + part.shape[0]])
            part.release()
            at += part.shape[0]
        return out

    def _count(self, kept: int, *names: str) -> None:
        self._kept += kept
        self._done += sum(self._checkpoint.tensors[name].nbytes for name in names)
        self._progress(LoadProgress(f"Loading {self._label}", self._done, self._total))


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
