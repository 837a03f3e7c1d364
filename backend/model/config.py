"""The numbers that make a LLaMA: one frozen value that every reader fills and the model is built from. Level 0."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are changed for contexts longer than those of the first training.

    * "linear": every frequency divided by `factor`.
    * "llama3" (Llama 3.1, `use_scaled_rope`): wavelengths above original_context / low_freq_factor are divided by
      `factor`, those below original_context / high_freq_factor stay, between them a straight mix.
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192

    def divisors(self, head_dim: int, theta: float) -> list[float]:
        """What each of the head_dim / 2 inverse frequencies is divided by."""
        if self.kind == "linear":
            return [self.factor] * (head_dim // 2)
        divisors = []
        for index in range(head_dim // 2):
            frequency = theta ** (-2 * index / head_dim)
            wavelength = 2 * math.pi / frequency
            if wavelength < self.original_context / self.high_freq_factor:
                divisors.append(1.0)
            elif wavelength > self.original_context / self.low_freq_factor:
                divisors.append(self.factor)
            else:
                smooth = (self.original_context / wavelength - self.low_freq_factor) / (
                    self.high_freq_factor - self.low_freq_factor
                )
                divisors.append(1 / ((1 - smooth) / self.factor + smooth))
        return divisors


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a LLaMA-family decoder.

    Linear weights have shape (out features, in features). `rope_interleaved` True: pair (2i, 2i+1) of each head turns
    together (Meta, and GGUF of architecture llama); False: pair (i, i + head_dim/2) (Hugging Face).
    """

    architecture: str  # llama | mistral | qwen2: the same computation, said for people
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
    rope_scaling: RopeScaling | None = None
    rope_interleaved: bool = True
    tied_output: bool = False  # the output projection is the embedding table
    sliding_window: int | None = None  # a token sees itself and the window - 1 before it; None: everything before it
    biases: frozenset[str] = frozenset()  # of wq wk wv wo w1 w2 w3: which linears add a bias

    def kv_bytes_per_token(self, bytes_per_value: int) -> int:
        """Bytes of keys and values that one token keeps in all layers together."""
        return 2 * self.n_layers * self.n_kv_heads * self.head_dim * bytes_per_value

    def parameters(self) -> int:
        """Number of weights, the embedding counted once when it is tied."""
        return sum(math.prod(shape) for shape in tensor_shapes(self).values())


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Canonical tensor names of one model and their shapes.

    `tok_embeddings`, `norm`, `output` (absent when tied), and for each layer N `layers.N.` with `attention_norm`, `wq`,
    `wk`, `wv`, `wo`, `ffn_norm`, `w1` (gate), `w2` (down), `w3` (up), and `wq_bias`, ... for the linears in
    `config.biases`.
    """
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings": (config.vocab_size, config.dim), "norm": (config.dim,)}
    if not config.tied_output:
        shapes["output"] = (config.vocab_size, config.dim)
    linears = {
        "wq": (q, config.dim),
        "wk": (kv, config.dim),
        "wv": (kv, config.dim),
        "wo": (config.dim, q),
        "w1": (config.ffn_dim, config.dim),
        "w2": (config.dim, config.ffn_dim),
        "w3": (config.ffn_dim, config.dim),
    }
    for n in range(config.n_layers):
        at = f"layers.{n}."
        shapes |= {at + "attention_norm": (config.dim,), at + "ffn_norm": (config.dim,)}
        shapes |= {at + name: shape for name, shape in linears.items()}
        shapes |= {f"{at}{name}_bias": (linears[name][0],) for name in linears if name in config.biases}
    return shapes
