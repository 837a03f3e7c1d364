"""The numbers that make a LLaMA: one frozen value that every reader fills and the model is built from. Level 0."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a LLaMA-family decoder.

    Linear weights have shape (out features, in features). `rope_interleaved` True: pair (2i, 2i+1) of each head turns
    together (Meta, and GGUF of architecture llama); False: pair (i, i + head_dim/2) (Hugging Face).
    """

    architecture: str
    name: str
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn_dim: int
    vocab_size: int
    context: int  # tokens the model was trained for
    norm_eps: float
    rope_theta: float = 10000.0
    rope_linear_scale: float = 1.0  # positions are divided by this
    rope_interleaved: bool = True
    tied_output: bool = False  # the output projection is the embedding table

    def kv_bytes_per_token(self, bytes_per_value: int) -> int:
        """Bytes of keys and values that one token keeps in all layers together."""
        return 2 * self.n_layers * self.n_kv_heads * self.head_dim * bytes_per_value

    def parameters(self) -> int:
        """Number of weights, the embedding counted once when it is tied."""
        attention = self.dim * self.head_dim * (2 * self.n_heads + 2 * self.n_kv_heads)
        layer = attention + 3 * self.dim * self.ffn_dim + 2 * self.dim
        tables = self.vocab_size * self.dim * (1 if self.tied_output else 2)
        return self.n_layers * layer + tables + self.dim


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Canonical tensor names of one file and their shapes: `tok_embeddings`, `layers.N.wq`, ..., `norm`, `output`."""
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings": (config.vocab_size, config.dim), "norm": (config.dim,)}
    if not config.tied_output:
        shapes["output"] = (config.vocab_size, config.dim)
    for n in range(config.n_layers):
        shapes |= {
            f"layers.{n}.attention_norm": (config.dim,),
            f"layers.{n}.wq": (q, config.dim),
            f"layers.{n}.wk": (kv, config.dim),
            f"layers.{n}.wv": (kv, config.dim),
            f"layers.{n}.wo": (config.dim, q),
            f"layers.{n}.ffn_norm": (config.dim,),
            f"layers.{n}.w1": (config.ffn_dim, config.dim),
            f"layers.{n}.w2": (config.dim, config.ffn_dim),
            f"layers.{n}.w3": (config.ffn_dim, config.dim),
        }
    return shapes
