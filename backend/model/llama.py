"""The LLaMA decoder (Touvron et al. 2023, arXiv:2302.13971): pre-norm blocks of attention and SwiGLU feed-forward.

Works on a flat row of tokens that may belong to several sequences; what belongs together is the business of `attend`,
which stores keys and values and returns the mixed values. Knows nothing of storage formats, caches or text, and
computes on the device where its tensors are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from backend.model.config import ModelConfig
from backend.model.operations import PLAIN, Operations
from backend.model.rope import Rope

Multiply = Callable[[torch.Tensor], torch.Tensor]  # (tokens, in) float32 -> (tokens, out) float32
# attend(layer, heads, turns) -> mixed values (tokens, n_heads, head_dim). heads (tokens, n_heads + 2 n_kv_heads,
# head_dim): queries, keys, values, before the rotary turn (`Llama.turned` is that). All float32.
Attend = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Layer:
    attention_norm: torch.Tensor  # (dim,) float32
    wqkv: Multiply  # dim -> (n_heads + 2 n_kv_heads) * head_dim
    wo: Multiply
    ffn_norm: torch.Tensor
    w13: Multiply  # dim -> 2 * ffn_dim: gate, then up
    w2: Multiply


@dataclass(frozen=True)
class Llama:
    config: ModelConfig
    embedding: Multiply  # (tokens,) int64 -> (tokens, dim)
    layers: tuple[Layer, ...]
    norm: torch.Tensor
    output: Multiply
    rope: Rope
    operations: Operations = PLAIN

    def forward(self, ids: torch.Tensor, positions: torch.Tensor, attend: Attend, rows: torch.Tensor) -> torch.Tensor:
        """ids, positions (tokens,) int64; rows: which tokens' logits are wanted. Returns float32 (rows, vocab)."""
        return next(logits for logits in self.in_parts(ids, positions, attend, rows) if logits is not None)

    def in_parts(
        self, ids: torch.Tensor, positions: torch.Tensor, attend: Attend, rows: torch.Tensor
    ) -> Iterator[torch.Tensor | None]:
        """`forward` in parts: None after each layer's attention and after its feed-forward, and in the end the logits.
        Between two of them anything else may be computed."""
        add_norm, eps = self.operations.add_norm, self.config.norm_eps
        x = self.embedding(ids)  # (tokens, dim); the residual stream stays in float32
        turns = self.rope.turns(positions)
        delta = None  # what the block before adds to the residual stream: added where it is read next
        for number, layer in enumerate(self.layers):
            x, read = add_norm(x, delta, layer.attention_norm, eps)
            delta = self._attention(number, layer, read, turns, attend)
            yield None
            x, read = add_norm(x, delta, layer.ffn_norm, eps)
            delta = layer.w2(self.operations.gated(layer.w13(read)))
            yield None
        last = None if delta is None else delta.index_select(0, rows)
        yield self.output(add_norm(x.index_select(0, rows), last, self.norm, eps)[1])

    def turned(self, heads: torch.Tensor, turns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query and key with their rotary turn, and value: (tokens, n_heads or n_kv_heads, head_dim) each."""
        config = self.config
        both = config.n_heads + config.n_kv_heads
        turned = self.rope.apply(heads[:, :both], turns)
        query, key = turned.split([config.n_heads, config.n_kv_heads], dim=1)
        return query, key, heads[:, both:]

    def _attention(
        self, number: int, layer: Layer, x: torch.Tensor, turns: torch.Tensor, attend: Attend
    ) -> torch.Tensor:
        heads = layer.wqkv(x).view(x.shape[0], -1, self.config.head_dim)
        return layer.wo(attend(number, heads, turns).flatten(1))
