"""From an open checkpoint to a model in memory, as the preset says: packed, bf16, f16 or f32.

Peak memory is the finished model plus one tensor's conversion. Weights are never widened beyond what was asked.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from backend.checkpoint.base import Checkpoint
from backend.events import LoadProgress
from backend.model.llama import Layer, Llama
from backend.model.rope import Rope
from backend.weights import blocks
from backend.weights.blocks import BlockFormat
from backend.weights.decode import dequantize
from backend.weights.int4 import Int4Linear, can_pack
from backend.weights.linear import BlockLinear, Embedding, Linear, PlainLinear, SplitLinear

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
_PLAIN = {blocks.F32: torch.float32, blocks.F16: torch.float16, blocks.BF16: torch.bfloat16}


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
        rope = Rope(
            config.head_dim,
            config.rope_theta,
            interleaved=config.rope_interleaved,
            linear_scale=config.rope_linear_scale,
            factors=self._vector("rope_freqs") if "rope_freqs" in self._checkpoint.tensors else None,
        )
        model = Llama(config, embedding, tuple(layers), self._vector("norm"), output, rope)
        shared = isinstance(output, PlainLinear) and output.weight.data_ptr() == embedding.raw.data_ptr()
        read = self._kept - (0 if shared else embedding.nbytes())
        return Loaded(model, self._kept, read, output.nbytes())

    # parts ------------------------------------------------------------------------------------------------------------

    def _vector(self, name: str) -> torch.Tensor:
        """A norm or a table of factors: small, and always float32, as every LLaMA keeps them in computation."""
        vector = dequantize(self._raw(name), self._format(name)).flatten()
        self._count(vector.nbytes, name)
        return vector

    def _embedding(self) -> Embedding:
        name = "tok_embeddings"
        fmt, raw = self._format(name), self._raw(name)
        if self._weights != "original":
            fmt = {"bf16": blocks.BF16, "f16": blocks.F16, "f32": blocks.F32}[self._weights]
            raw = self._converted(name).view(torch.uint8)
        embedding = Embedding(raw, fmt)
        self._count(embedding.nbytes(), name)
        return embedding

    def _output(self, embedding: Embedding) -> Linear:
        if not self._checkpoint.config.tied_output:
            return self._linear("output")
        if embedding.format in _PLAIN:
            # One table for both uses: the rows looked up are the rows multiplied by.
            return PlainLinear(embedding.raw.view(_PLAIN[embedding.format]))
        return self._linear("tok_embeddings", count=False)

    def _linear(self, *names: str, count: bool = True) -> Linear:
        """One weight, or several that read the same input stacked into one product."""
        linear = self._stacked(names)
        self._kept += linear.nbytes()
        if count:
            self._count(0, *names)
        return linear

    def _stacked(self, names: tuple[str, ...]) -> Linear:
        if self._weights != "original":
            return PlainLinear(torch.cat([self._converted(name) for name in names]))
        tensors = [self._checkpoint.tensors[name] for name in names]
        kinds = {(info.format, can_pack(info.format, info.shape[0])) for info in tensors}
        if len(kinds) > 1:
            return SplitLinear([self._stacked((name,)) for name in names])
        fmt, packed = kinds.pop()
        raw = torch.cat([self._raw(name) for name in names])
        if fmt in _PLAIN:
            return PlainLinear(raw.view(_PLAIN[fmt]))
        return Int4Linear.from_blocks(raw, fmt) if packed else BlockLinear(raw, fmt)

    # reading ----------------------------------------------------------------------------------------------------------

    def _raw(self, name: str) -> torch.Tensor:
        return self._checkpoint.raw(name)

    def _format(self, name: str) -> BlockFormat:
        return self._checkpoint.tensors[name].format

    def _converted(self, name: str) -> torch.Tensor:
        """The tensor as (out, in) in the preset's type, a slice of rows at a time so that no float32 copy exists."""
        raw, fmt, dtype = self._raw(name), self._format(name), DTYPES[self._weights]
        return torch.cat([dequantize(rows, fmt).to(dtype) for rows in raw.split(4096)])

    def _count(self, kept: int, *names: str) -> None:
        self._kept += kept
        self._done += sum(self._checkpoint.tensors[name].nbytes for name in names)
        self._progress(LoadProgress(f"Loading {self._label}", self._done, self._total))
