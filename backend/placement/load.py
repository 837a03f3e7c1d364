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
from backend.model.llama import Layer, Llama
from backend.model.rope import Rope
from backend.placement.linears import build, values
from backend.weights.linear import (
    BiasedLinear,
    BlockEmbedding,
    Embedding,
    Linear,
    PlainEmbedding,
    PlainLinear,
)
from backend.weights.stored import Blocks


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
            embedding = PlainEmbedding(values([stored], self._weights))
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
        linear = build([self._checkpoint.read(name) for name in names], self._weights)
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

    def _count(self, kept: int, *names: str) -> None:
        self._kept += kept
        self._done += sum(self._checkpoint.tensors[name].nbytes for name in names)
        self._progress(LoadProgress(f"Loading {self._label}", self._done, self._total))
