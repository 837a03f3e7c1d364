"""What a GGUF file calls things: names of tensors, and the keys that say a model's sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from backend.convert.output import ConvertError
from backend.model.config import ModelConfig, RopeScaling

_TOP = {
    "tok_embeddings": "token_embd.weight",
    "norm": "output_norm.weight",
    "output": "output.weight",
    "rope_freqs": "rope_freqs.weight",
}
_PARTS = {
    "attention_norm": "attn_norm",
    "wq": "attn_q",
    "wk": "attn_k",
    "wv": "attn_v",
    "wo": "attn_output",
    "ffn_norm": "ffn_norm",
    "w1": "ffn_gate",
    "w2": "ffn_down",
    "w3": "ffn_up",
}
# Keys of a GGUF source that stay true of what is written from it.
_KEPT = ("general.author", "general.organization", "general.description", "general.url", "general.license",
         "general.version", "general.finetune", "general.basename", "general.size_label", "general.languages",
         "general.tags", "general.license.name", "general.license.link", "general.source.url")  # fmt: skip


def tensor_name(canonical: str) -> str:
    """The name a GGUF file gives to a tensor."""
    if canonical in _TOP:
        return _TOP[canonical]
    _, number, part = canonical.split(".")
    kind = "bias" if part.endswith("_bias") else "weight"
    return f"blk.{number}.{_PARTS[part.removesuffix('_bias')]}.{kind}"


def architecture(config: ModelConfig) -> str:
    """GGUF's word: Mistral and the like are `llama` there; only qwen2 has another order of rows."""
    return "qwen2" if config.architecture == "qwen2" else "llama"


def interleaved(config: ModelConfig) -> bool:
    """Whether rotary pairs are interleaved in a GGUF file of this model."""
    return architecture(config) == "llama"


def model_keys(config: ModelConfig, file_type: int, quantized: bool, source: Mapping[str, Any]) -> dict[str, Any]:
    """Everything but the tokenizer. `source`: keys of the file this is made from, where it is a GGUF file."""
    arch = architecture(config)
    keys: dict[str, Any] = {"general.architecture": arch, "general.name": config.name}
    keys |= {key: source[key] for key in _KEPT if key in source}
    keys |= {
        f"{arch}.block_count": config.n_layers,
        f"{arch}.context_length": config.context,
        f"{arch}.embedding_length": config.dim,
        f"{arch}.feed_forward_length": config.ffn_dim,
        f"{arch}.attention.head_count": config.n_heads,
        f"{arch}.attention.head_count_kv": config.n_kv_heads,
        f"{arch}.attention.key_length": config.head_dim,
        f"{arch}.attention.value_length": config.head_dim,
        f"{arch}.attention.layer_norm_rms_epsilon": float(config.norm_eps),
        f"{arch}.rope.dimension_count": config.head_dim,
        f"{arch}.rope.freq_base": float(config.rope_theta),
        f"{arch}.vocab_size": config.vocab_size,
    }
    if config.sliding_window is not None:
        keys[f"{arch}.attention.sliding_window"] = config.sliding_window
    keys |= _rope_keys(arch, config.rope_scaling)
    keys["general.file_type"] = file_type
    if quantized:
        keys["general.quantization_version"] = 2
    return keys


def _rope_keys(arch: str, scaling: RopeScaling | None) -> dict[str, Any]:
    if scaling is None or scaling.kind == "llama3":  # the latter is written as the tensor rope_freqs
        return {}
    if scaling.kind == "linear":
        return {f"{arch}.rope.scaling.type": "linear", f"{arch}.rope.scaling.factor": float(scaling.factor)}
    raise ConvertError(f"rope scaling '{scaling.kind}' cannot be written to a GGUF file")
