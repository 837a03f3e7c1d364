"""Tiny random models in Meta's layout, cut into model-parallel shards and written by torch.save.

The cuts are those of fairscale's layers in llama's model.py, written down here a second time: a reader that joins
along a wrong dimension must not find its own mistake in the fixture.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

# leaf name -> what a rank gets of dimension 0 or 1; None: a copy
CUT = {
    "tok_embeddings.weight": 1,
    "output.weight": 0,
    "norm.weight": None,
    "attention_norm.weight": None,
    "ffn_norm.weight": None,
    "attention.wq.weight": 0,
    "attention.wk.weight": 0,
    "attention.wv.weight": 0,
    "attention.wo.weight": 1,
    "feed_forward.w1.weight": 0,
    "feed_forward.w2.weight": 1,
    "feed_forward.w3.weight": 0,
    "rope.freqs": None,
}
CANONICAL = {
    "tok_embeddings.weight": "tok_embeddings",
    "output.weight": "output",
    "norm.weight": "norm",
    "attention_norm.weight": "attention_norm",
    "ffn_norm.weight": "ffn_norm",
    "attention.wq.weight": "wq",
    "attention.wk.weight": "wk",
    "attention.wv.weight": "wv",
    "attention.wo.weight": "wo",
    "feed_forward.w1.weight": "w1",
    "feed_forward.w2.weight": "w2",
    "feed_forward.w3.weight": "w3",
}


@dataclass(frozen=True)
class MetaModel:
    """A model; `params` overrides what params.json says (None leaves a key out)."""

    dim: int = 64
    n_layers: int = 2
    n_heads: int = 8
    n_kv_heads: int = 8
    ffn_dim: int = 192
    vocab_size: int = 320
    multiple_of: int = 32
    dtype: torch.dtype = torch.float16
    rope_freqs: bool = True
    tied: bool = False
    embeddings_by_rows: bool = False  # as Llama 3 has them
    params: Mapping[str, Any] = field(default_factory=dict)

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    def shapes(self) -> dict[str, tuple[int, ...]]:
        kv = self.n_kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (self.vocab_size, self.dim)}
        for n in range(self.n_layers):
            shapes |= {
                f"layers.{n}.attention.wq.weight": (self.dim, self.dim),
                f"layers.{n}.attention.wk.weight": (kv, self.dim),
                f"layers.{n}.attention.wv.weight": (kv, self.dim),
                f"layers.{n}.attention.wo.weight": (self.dim, self.dim),
                f"layers.{n}.feed_forward.w1.weight": (self.ffn_dim, self.dim),
                f"layers.{n}.feed_forward.w2.weight": (self.dim, self.ffn_dim),
                f"layers.{n}.feed_forward.w3.weight": (self.ffn_dim, self.dim),
                f"layers.{n}.attention_norm.weight": (self.dim,),
                f"layers.{n}.ffn_norm.weight": (self.dim,),
            }
        shapes |= {"norm.weight": (self.dim,)}
        shapes |= {} if self.tied else {"output.weight": (self.vocab_size, self.dim)}
        shapes |= {"rope.freqs": (self.head_dim // 2,)} if self.rope_freqs else {}
        return shapes

    def values(self) -> dict[str, torch.Tensor]:
        random = torch.Generator().manual_seed(0)
        return {name: torch.randn(shape, generator=random).to(self.dtype) for name, shape in self.shapes().items()}

    def written_params(self) -> dict[str, Any]:
        usual = {
            "dim": self.dim,
            "multiple_of": self.multiple_of,
            "n_heads": self.n_heads,
            "n_kv_heads": self.n_kv_heads,
            "n_layers": self.n_layers,
            "norm_eps": 1e-5,
            "vocab_size": -1,
        }
        return {key: value for key, value in (usual | dict(self.params)).items() if value is not None}


def leaf(name: str) -> str:
    return name.split(".", 2)[2] if name.startswith("layers.") else name


def canonical(name: str) -> str:
    layer = ".".join(name.split(".")[:2]) + "." if name.startswith("layers.") else ""
    return layer + CANONICAL[leaf(name)]


def shard(model: MetaModel, values: Mapping[str, torch.Tensor], rank: int, ranks: int) -> dict[str, torch.Tensor]:
    """What rank `rank` of `ranks` holds. With more ranks than key and value heads each head is on several of them."""
    own = {}
    for name, value in values.items():
        cut = CUT[leaf(name)]
        if leaf(name) == "tok_embeddings.weight" and model.embeddings_by_rows:
            cut = 0
        if leaf(name) in ("attention.wk.weight", "attention.wv.weight") and ranks > model.n_kv_heads:
            head = rank * model.n_kv_heads // ranks
            own[name] = value[head * model.head_dim : (head + 1) * model.head_dim].clone()
        else:
            own[name] = value.clone() if cut is None else value.chunk(ranks, dim=cut)[rank].clone()
    return own


def write_meta(folder: Path, model: MetaModel, ranks: int = 1) -> dict[str, torch.Tensor]:
    """Write the folder; returns the whole tensors by canonical name."""
    folder.mkdir(parents=True, exist_ok=True)
    values = model.values()
    for rank in range(ranks):
        torch.save(shard(model, values, rank, ranks), folder / f"consolidated.{rank:02}.pth")
    (folder / "params.json").write_text(json.dumps(model.written_params()))
    return {canonical(name): value for name, value in values.items() if name != "rope.freqs"}
