"""Running a checkpoint without text: ids in, logits out; and an independent forward pass in float64 to compare with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from backend.cache.kv import KVPool
from backend.checkpoint.base import Checkpoint
from backend.engine.runner import Runner, _Span
from backend.model.config import ModelConfig
from backend.placement.linears import DTYPES
from backend.placement.load import load_model

BLOCK = 32


class Session:
    """A loaded checkpoint with a cache of its own for one sequence. `placing`: where its parts are, as `load_model`."""

    def __init__(
        self, checkpoint: Checkpoint, weights: str = "f32", tokens: int = 256, kv: str = "f32", **placing: Any
    ) -> None:
        self.loaded = load_model(checkpoint, weights, "test", **placing)
        blocks = -(-tokens // BLOCK)
        self._blocks = list(range(blocks))
        pool = KVPool(checkpoint.config, blocks, BLOCK, DTYPES[kv])
        self._runner = Runner(self.loaded.model, pool)

    def logits(self, ids: Sequence[int], start: int = 0, chunk: int = 64) -> torch.Tensor:
        """float32 (tokens, vocab) at each of `ids`, which follow `start` tokens given before; `chunk` at a time."""
        rows = []
        with torch.inference_mode():
            for at in range(0, len(ids), chunk):
                piece = torch.tensor(ids[at : at + chunk])
                first, last = start + at, start + at + len(piece)
                span = _Span(0, len(piece), self._runner.pool.table(self._blocks, first, last))
                attend = self._runner._attend([span])
                positions, every = torch.arange(first, last), torch.arange(len(piece))
                rows.append(self._runner.model.forward(piece, positions, attend, every))
        return torch.cat(rows)

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        """The next `count` tokens, one at a time."""
        logits = self.logits(prompt)[-1]
        found: list[int] = []
        while len(found) < count:
            found.append(int(logits.argmax()))
            logits = self.logits([found[-1]], start=len(prompt) + len(found) - 1)[-1]
        return found


def greedy(checkpoint: Checkpoint, prompt: Sequence[int], count: int = 32, weights: str = "f32") -> list[int]:
    return Session(checkpoint, weights, len(prompt) + count).greedy(prompt, count)


def logits(checkpoint: Checkpoint, ids: Sequence[int], weights: str = "f32", chunk: int = 64) -> torch.Tensor:
    return Session(checkpoint, weights, len(ids)).logits(ids, chunk=chunk)


def float64_logits(
    values: Mapping[str, torch.Tensor], config: ModelConfig, ids: Sequence[int], frequencies: torch.Tensor | None = None
) -> torch.Tensor:
    """The decoder written out once more, in float64 and without a cache, from tensors by canonical name.

    Rotary pairs (2i, 2i + 1), Meta's order. `frequencies`: instead of theta^(-2i / head_dim).
    """
    weights = {name: value.double() for name, value in values.items()}
    hd, heads, kv_heads = config.head_dim, config.n_heads, config.n_kv_heads
    if frequencies is None:
        frequencies = config.rope_theta ** (-torch.arange(0, hd, 2, dtype=torch.float64) / hd)
    count = len(ids)
    angle = torch.arange(count, dtype=torch.float64)[:, None] * frequencies.double()
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + config.norm_eps).sqrt() * weight

    def turned(x: torch.Tensor) -> torch.Tensor:  # (tokens, heads, head_dim)
        even, odd = x[..., 0::2], x[..., 1::2]
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)

    x = weights["tok_embeddings"][torch.tensor(ids)]
    hidden = torch.full((count, count), float("-inf"), dtype=torch.float64).triu(1)
    for n in range(config.n_layers):
        layer = {name.split(".", 2)[2]: w for name, w in weights.items() if name.startswith(f"layers.{n}.")}
        h = norm(x, layer["attention_norm"])
        q = turned((h @ layer["wq"].T).view(count, heads, hd))
        k = turned((h @ layer["wk"].T).view(count, kv_heads, hd))
        v = (h @ layer["wv"].T).view(count, kv_heads, hd)
        mixed = []
        for head in range(heads):
            own = head // (heads // kv_heads)
            scores = q[:, head] @ k[:, own].T / hd**0.5 + hidden
            mixed.append(scores.softmax(-1) @ v[:, own])
        x = x + torch.cat(mixed, dim=-1) @ layer["wo"].T
        h = norm(x, layer["ffn_norm"])
        gate = h @ layer["w1"].T
        x = x + (gate * torch.sigmoid(gate) * (h @ layer["w3"].T)) @ layer["w2"].T
    return norm(x, weights["norm"]) @ weights.get("output", weights["tok_embeddings"]).T
