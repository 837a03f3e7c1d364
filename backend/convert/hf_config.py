"""config.json of a Hugging Face folder, written from our own description of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from backend.convert.output import ConvertError
from backend.model.config import ModelConfig, RopeScaling

_CLASSES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}
_TORCH_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_ATTENTION, _MLP = frozenset({"wq", "wk", "wv", "wo"}), frozenset({"w1", "w2", "w3"})
_LLAMA3_FACTORS = (8.0, 32.0)


def model_type(config: ModelConfig) -> str:
    """transformers' word. A sliding window makes a LLaMA a Mistral there, which is the same computation otherwise."""
    if config.architecture == "llama" and config.sliding_window is not None and not config.biases:
        return "mistral"
    if config.architecture not in _CLASSES:
        raise ConvertError(f"architecture '{config.architecture}' cannot be written as a Hugging Face folder")
    return config.architecture


def stored_biases(config: ModelConfig) -> frozenset[str]:
    """The linears that have a bias in transformers' model of this type: what is not stored becomes zeros."""
    if not config.biases:
        return frozenset()
    kind = model_type(config)
    if kind == "llama":
        return (_ATTENTION if config.biases & _ATTENTION else frozenset()) | (
            _MLP if config.biases & _MLP else frozenset()
        )
    if kind == "qwen2" and config.biases <= {"wq", "wk", "wv"}:
        return frozenset({"wq", "wk", "wv"})
    raise ConvertError(f"biases of {', '.join(sorted(config.biases))} cannot be written as a {kind} model")


def config_json(config: ModelConfig, dtype: str, scaling: RopeScaling | None, ids: Mapping[str, int]) -> dict[str, Any]:
    """The object. `dtype`: F32, F16 or BF16; `ids`: bos, eos, pad where they are known."""
    kind = model_type(config)
    biases = stored_biases(config)
    values: dict[str, Any] = {
        "architectures": [_CLASSES[kind]],
        "model_type": kind,
        "hidden_act": "silu",
        "hidden_size": config.dim,
        "intermediate_size": config.ffn_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.context,
        "rms_norm_eps": short(config.norm_eps),
        "rope_theta": short(config.rope_theta),
        "rope_scaling": _scaling(scaling),
        "tie_word_embeddings": config.tied_output,
        "vocab_size": config.vocab_size,
        "torch_dtype": _TORCH_NAMES[dtype],
        "use_cache": True,
    }
    if kind == "llama":
        values |= {"attention_bias": bool(biases & _ATTENTION), "mlp_bias": bool(biases & _MLP)}
    if kind == "mistral":
        values["sliding_window"] = config.sliding_window
    if kind == "qwen2":
        values |= {"use_sliding_window": config.sliding_window is not None, "sliding_window": config.sliding_window}
        values["max_window_layers"] = 0 if config.sliding_window is not None else config.n_layers
    for name in ("bos", "eos", "pad"):
        values[f"{name}_token_id"] = ids.get(name)
    return values


def scaling_of_divisors(divisors: Sequence[float], config: ModelConfig) -> RopeScaling | None:
    """The formula behind a table of frequency divisors (GGUF's rope_freqs), as config.json needs one.

    Raises ConvertError where neither none, linear nor Llama 3.1's scaling gives these numbers.
    """
    if _close(divisors, [1.0] * len(divisors)):
        return None
    if _close(divisors, [divisors[0]] * len(divisors)):
        return RopeScaling("linear", short(divisors[0]))
    for factor in (*_LLAMA3_FACTORS, short(max(divisors))):
        scaling = RopeScaling("llama3", factor, 1.0, 4.0, 8192)
        if _close(divisors, scaling.divisors(config.head_dim, config.rope_theta)):
            return scaling
    raise ConvertError(
        "the tensor 'rope_freqs' follows no formula that a config.json can hold; convert to GGUF instead"
    )


def short(value: float) -> float:
    """The shortest decimal of a number that was a float32, so that 1e-5 is not written as 9.99999974738e-06."""
    single = np.float32(value)
    return float(str(single)) if float(single) == value else value


def _scaling(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    # "type" is what versions of transformers before 4.43 read.
    values: dict[str, Any] = {"rope_type": scaling.kind, "type": scaling.kind, "factor": short(scaling.factor)}
    if scaling.kind == "llama3":
        values |= {
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_context,
        }
    return values


def _close(found: Sequence[float], expected: Sequence[float]) -> bool:
    return len(found) == len(expected) and all(
        abs(one - other) <= 1e-4 * abs(other) for one, other in zip(found, expected)
    )
