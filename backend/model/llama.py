"""The LLaMA decoder (Touvron et al. 2023, arXiv:2302.13971): pre-norm blocks of attention and SwiGLU feed-forward.

Works on a flat row of tokens that may belong to several sequences; what belongs together is the business of `attend`,
which stores keys and values and returns the mixed values. Knows nothing of storage formats, caches or text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from backend.model.config import ModelConfig
from backend.model.rope import Rope

Multiply = Callable[[torch.Tensor], torch.Tensor]  # (tokens, in) float32 -> (tokens, out) float32
# attend(layer, query, key, value) -> mixed values; query and result (tokens, n_heads, head_dim), key and value
# (tokens, n_kv_heads, head_dim), all float32, rotary turn already applied.
Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


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

    def forward(self, ids: torch.Tensor, positions: torch.Tensor, attend: Attend, rows: torch.Tensor) -> torch.Tensor:
        """ids, positions (tokens,) int64; rows: which tokens' logits are wanted. Returns float32 (rows, vocab)."""
        x = self.embedding(ids)  # (tokens, dim); the residual stream stays in float32
        turns = self.rope.turns(positions)
        for number, layer in enumerate(self.layers):
            x = x + self._attention(number, layer, x, turns, attend)
            x = x + self._feed_forward(layer, x)
        return self.output(self._rms_norm(x.index_select(0, rows), self.norm))

    def _attention(
        self, number: int, layer: Layer, x: torch.Tensor, turns: torch.Tensor, attend: Attend
    ) -> torch.Tensor:
        config = self.config
        heads = layer.wqkv(self._rms_norm(x, layer.attention_norm)).view(x.shape[0], -1, config.head_dim)
        turned = self.rope.apply(heads[:, : config.n_heads + config.n_kv_heads], turns)
        query, key = turned.split([config.n_heads, config.n_kv_heads], dim=1)
        mixed = attend(number, query, key, heads[:, config.n_heads + config.n_kv_heads :])
        return layer.wo(mixed.flatten(1))

    def _feed_forward(self, layer: Layer, x: torch.Tensor) -> torch.Tensor:
        gate, up = layer.w13(self._rms_norm(x, layer.ffn_norm)).chunk(2, dim=-1)
        return layer.w2(F.silu(gate) * up)

    def _rms_norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight, self.config.norm_eps)
