"""Tiny random LLaMA models as GGUF files, written by the `gguf` package and not by code of ours.

    path = write_tiny(tmp_path / "tiny.gguf", TinyModel(weights="Q4_1", tied=False))

Two layers, a byte-level vocabulary of about 270 tokens and a ChatML template; the weights come from a seed, so the
same description gives the same bytes. The values as they were before quantising are `TinyModel.values()`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.quants import quantize

CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGES = ("h e", "l l", "he ll", "hell o", "Ġ w", "o r", "Ġw or", "l d", "Ġwor ld", "i n", "t h", "Ġ th")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class TinyModel:
    """What to write. Every row length must be a multiple of 32 for the block formats."""

    weights: str = "F32"  # F32 F16 BF16 Q4_0 Q4_1 Q8_0, of all matrices
    formats: Mapping[str, str] = field(default_factory=dict)  # other formats by tensor name
    tied: bool = True
    rope_freqs: bool = False
    chat_template: str | None = CHAT_TEMPLATE
    metadata: Mapping[str, Any] = field(default_factory=dict)  # key -> value instead of ours; None leaves the key out
    seed: int = 0
    scale: float = 0.1  # standard deviation of the matrices
    n_layers: int = 2
    dim: int = 64
    n_heads: int = 4
    n_kv_heads: int = 2
    head_dim: int = 16
    ffn_dim: int = 96
    context: int = 256
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5

    def values(self) -> dict[str, np.ndarray]:
        """File name -> float32 values, (rows, columns) or (n,), in the file's order and the file's own layout."""
        random = np.random.default_rng(self.seed)
        values: dict[str, np.ndarray] = {}
        for name, shape in self.shapes().items():
            if name == "rope_freqs.weight":
                values[name] = np.linspace(1.0, 8.0, shape[0], dtype=np.float32)
            elif len(shape) == 1:
                values[name] = (1 + 0.1 * random.standard_normal(shape)).astype(np.float32)
            else:
                values[name] = (self.scale * random.standard_normal(shape)).astype(np.float32)
        return values

    def shapes(self) -> dict[str, tuple[int, ...]]:
        query, key, vocabulary = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim, len(tokens())
        shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (vocabulary, self.dim)}
        for n in range(self.n_layers):
            shapes |= {
                f"blk.{n}.attn_norm.weight": (self.dim,),
                f"blk.{n}.attn_q.weight": (query, self.dim),
                f"blk.{n}.attn_k.weight": (key, self.dim),
                f"blk.{n}.attn_v.weight": (key, self.dim),
                f"blk.{n}.attn_output.weight": (self.dim, query),
                f"blk.{n}.ffn_norm.weight": (self.dim,),
                f"blk.{n}.ffn_gate.weight": (self.ffn_dim, self.dim),
                f"blk.{n}.ffn_up.weight": (self.ffn_dim, self.dim),
                f"blk.{n}.ffn_down.weight": (self.dim, self.ffn_dim),
            }
        shapes["output_norm.weight"] = (self.dim,)
        if not self.tied:
            shapes["output.weight"] = (vocabulary, self.dim)
        if self.rope_freqs:
            shapes["rope_freqs.weight"] = (self.head_dim // 2,)
        return shapes

    def format_of(self, name: str) -> str:
        if name in self.formats:
            return self.formats[name]
        return self.weights if len(self.shapes()[name]) > 1 else "F32"

    def keys(self) -> dict[str, Any]:
        """Metadata in the file's order, overrides applied. int becomes uint32, float float32."""
        keys: dict[str, Any] = {
            "general.name": "tiny",
            "llama.block_count": self.n_layers,
            "llama.context_length": self.context,
            "llama.embedding_length": self.dim,
            "llama.feed_forward_length": self.ffn_dim,
            "llama.attention.head_count": self.n_heads,
            "llama.attention.head_count_kv": self.n_kv_heads,
            "llama.attention.key_length": self.head_dim,
            "llama.attention.value_length": self.head_dim,
            "llama.attention.layer_norm_rms_epsilon": self.norm_eps,
            "llama.rope.dimension_count": self.head_dim,
            "llama.rope.freq_base": self.rope_theta,
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "smollm",
            "tokenizer.ggml.tokens": tokens(),
            "tokenizer.ggml.token_type": [3] * len(CONTROL) + [1] * (len(tokens()) - len(CONTROL)),
            "tokenizer.ggml.merges": list(MERGES),
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
            "tokenizer.ggml.add_bos_token": False,
            "tokenizer.chat_template": self.chat_template,
        }
        return {key: value for key, value in (keys | dict(self.metadata)).items() if value is not None}


def tokens() -> list[str]:
    """Three control tokens, the 256 bytes in GPT-2's printable spelling, and what the merges make."""
    return [*CONTROL, *_byte_spellings(), *(merge.replace(" ", "") for merge in MERGES)]


def write_tiny(path: Path, model: TinyModel | None = None) -> Path:
    """Write the file and return its path."""
    model = model or TinyModel()
    keys = model.keys()
    writer = gguf.GGUFWriter(path, keys.pop("general.architecture", "llama"))
    for key, value in keys.items():
        add_key(writer, key, value)
    for name, values in model.values().items():
        add_tensor(writer, name, values, model.format_of(name))
    return finish(writer)


def add_key(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """One key with the type that the Python value suggests; (value, gguf.GGUFValueType) says the type outright."""
    if isinstance(value, tuple):
        writer.add_key_value(key, *value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def add_tensor(writer: gguf.GGUFWriter, name: str, values: np.ndarray, fmt: str) -> None:
    kind = gguf.GGMLQuantizationType[fmt]
    writer.add_tensor(name, quantize(values, kind), raw_dtype=kind)


def finish(writer: gguf.GGUFWriter) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert writer.path is not None
    return writer.path


def _byte_spellings() -> list[str]:
    """The published GPT-2 table (`bytes_to_unicode`): printable Latin-1 stands for itself, the rest from U+0100 on."""
    spellings, shift = [], 0
    for byte in range(256):
        if 0x21 <= byte <= 0x7E or 0xA1 <= byte <= 0xAC or byte >= 0xAE:
            spellings.append(chr(byte))
        else:
            spellings.append(chr(256 + shift))
            shift += 1
    return spellings
