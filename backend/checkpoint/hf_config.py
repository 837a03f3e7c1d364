"""config.json of Hugging Face folders -> ModelConfig: a closed parse.

Only the keys read here mean anything; all others, `auto_map` and its like included, are ignored, and no class that a
file names is ever looked up. Every value has a type and a range. Defaults are those of transformers' LlamaConfig,
MistralConfig and Qwen2Config.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backend.checkpoint.strictjson import read_json
from backend.errors import CheckpointError
from backend.model.config import ModelConfig, RopeScaling

CONFIG_FILE = "config.json"
ATTENTION = ("wq", "wk", "wv", "wo")
MLP = ("w1", "w2", "w3")


@dataclass(frozen=True)
class Family:
    """What transformers assumes where a config of this model type says nothing."""

    context: int
    kv_heads: int | None = None  # None: as many as there are query heads


FAMILIES = {
    "llama": Family(context=2048),
    "mistral": Family(context=131072, kv_heads=8),
    "qwen2": Family(context=32768, kv_heads=32),
}
CLASSES = {
    "LlamaForCausalLM": "llama",
    "LLaMAForCausalLM": "llama",  # the first conversions, before transformers had the model
    "LlamaModel": "llama",
    "MistralForCausalLM": "mistral",
    "MistralModel": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen2Model": "qwen2",
}

OPENS = "this version opens LlamaForCausalLM, MistralForCausalLM and Qwen2ForCausalLM"


def hf_config(path: Path) -> ModelConfig:
    """The configuration from config.json alone, without weights. `path`: the folder or the file.

    Vocabulary size, tied output and biases are as the file says. Raises CheckpointError.
    """
    file = path / CONFIG_FILE if path.is_dir() else path
    values = read_json(file)
    keys = Keys(file, values)
    return model_config(file, values, keys.integer("vocab_size", 1, 1 << 24))


def model_config(file: Path, values: Mapping[str, Any], vocab_size: int) -> ModelConfig:
    """`values`: the object of config.json, `file`: where it is from, for messages and the model's name."""
    keys = Keys(file, values)
    family = _family(file, values)
    dim = keys.integer("hidden_size", 1, 1 << 20)
    n_layers = keys.integer("num_hidden_layers", 1, 1 << 12)
    n_heads = keys.integer("num_attention_heads", 1, 1 << 14)
    kv_default = n_heads if "num_key_value_heads" in values else FAMILIES[family].kv_heads or n_heads
    n_kv_heads = keys.integer("num_key_value_heads", 1, n_heads, default=kv_default)
    if n_heads % n_kv_heads:
        raise CheckpointError(f"{file}: {n_heads} attention heads cannot be shared by {n_kv_heads} key-value heads")
    if values.get("head_dim") is None and dim % n_heads:
        raise CheckpointError(f"{file}: hidden_size {dim} cannot be shared by {n_heads} attention heads")
    head_dim = keys.integer("head_dim", 2, 1 << 14, default=dim // n_heads)
    if head_dim % 2:
        raise CheckpointError(f"{file}: head_dim is {head_dim}, expected an even number")
    activation = values.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise CheckpointError(f"{file}: hidden_act is {_shown(activation)}; this version computes 'silu'")
    longest = keys.integer("max_sequence_length", 1, 1 << 30, default=FAMILIES[family].context)
    context = keys.integer("max_position_embeddings", 1, 1 << 30, default=longest)
    theta, scaling = _rope(file, values)
    if scaling is not None and scaling.kind == "linear" and "max_sequence_length" in values:
        context = max(context, longest)  # Vicuna 16k: 4096 positions stretched by 4, and the length said beside them
    return ModelConfig(
        architecture=family,
        name=_name(file),
        dim=dim,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        ffn_dim=keys.integer("intermediate_size", 1, 1 << 22),
        vocab_size=vocab_size,
        context=context,
        norm_eps=keys.number("rms_norm_eps", 0.0, 1.0, default=1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        rope_interleaved=False,
        tied_output=keys.flag("tie_word_embeddings"),
        sliding_window=_sliding_window(file, values, family, n_layers),
        biases=_biases(keys, family),
    )


def _family(file: Path, values: Mapping[str, Any]) -> str:
    kind = values.get("model_type")
    classes = values.get("architectures")
    if classes is not None and (not isinstance(classes, list) or len(classes) > 16):
        raise CheckpointError(f"{file}: architectures is {_shown(classes)}, expected a list of names")
    for name in classes or ():
        if not isinstance(name, str) or name not in CLASSES:
            raise CheckpointError(f"{file}: the architecture is {_shown(name)}; {OPENS}")
        if kind not in (None, CLASSES[name]):
            raise CheckpointError(f"{file}: model_type is {_shown(kind)}, but the architecture is '{name}'; {OPENS}")
    if kind is None and classes:
        return CLASSES[classes[0]]
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise CheckpointError(f"{file}: model_type is {_shown(kind)}; {OPENS}")
    return kind


def _biases(keys: Keys, family: str) -> frozenset[str]:
    names: set[str] = {"wq", "wk", "wv"} if family == "qwen2" else set()
    if family == "llama" and keys.flag("attention_bias"):
        names |= set(ATTENTION)
    if family == "llama" and keys.flag("mlp_bias"):
        names |= set(MLP)
    return frozenset(names)


def _sliding_window(file: Path, values: Mapping[str, Any], family: str, n_layers: int) -> int | None:
    """The window all layers have, or None. LLaMA ignores these keys, as transformers does."""
    keys = Keys(file, values)
    if family == "llama" or (family == "qwen2" and not keys.flag("use_sliding_window")):
        return None
    if "sliding_window" in values and values["sliding_window"] is None:
        return None
    window = keys.integer("sliding_window", 1, 1 << 30, default=4096)
    if family == "qwen2":
        first = keys.integer("max_window_layers", 0, 1 << 30, default=28)
        sliding = [n >= first for n in range(n_layers)]
        if (kinds := values.get("layer_types")) is not None:
            allowed = ("full_attention", "sliding_attention")
            if not isinstance(kinds, list) or len(kinds) != n_layers or any(kind not in allowed for kind in kinds):
                raise CheckpointError(f"{file}: layer_types is no list of {' or '.join(allowed)} for {n_layers} layers")
            sliding = [kind == "sliding_attention" for kind in kinds]
        if not any(sliding):
            return None
        if not all(sliding):
            raise CheckpointError(
                f"{file}: {sum(sliding)} of {n_layers} layers have a sliding window; this version computes all or none"
            )
    return window


def _rope(file: Path, values: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """theta and scaling, from `rope_parameters` (transformers 5) or from rope_theta and `rope_scaling` (before)."""
    name = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
    inner = values.get(name) or {}
    if not isinstance(inner, dict) or any(isinstance(value, dict) for value in inner.values()):
        raise CheckpointError(f"{file}: {name} is {_shown(inner)}, expected one object of numbers")
    keys = Keys(file, inner, name + ".")
    where = keys if inner.get("rope_theta") is not None else Keys(file, values)
    theta = where.number("rope_theta", 1.0, 1e15, default=10000.0)
    for outer in (keys, Keys(file, values)):
        if (part := outer.number("partial_rotary_factor", 0.0, 1.0, default=1.0)) != 1.0:
            raise CheckpointError(f"{file}: partial_rotary_factor is {part:g}; this version turns whole heads")
    kind = inner.get("rope_type", inner.get("type", "default"))
    if kind == "linear":
        return theta, RopeScaling("linear", keys.number("factor", 1e-6, 1e6))
    if kind == "llama3":
        low = keys.number("low_freq_factor", 1e-6, 1e6)
        high = keys.number("high_freq_factor", 1e-6, 1e6)
        if high <= low:
            raise CheckpointError(
                f"{file}: {name} has high_freq_factor {high:g}, expected more than low_freq_factor {low:g}"
            )
        original = keys.integer("original_max_position_embeddings", 1, 1 << 30)
        return theta, RopeScaling("llama3", keys.number("factor", 1e-6, 1e6), low, high, original)
    # "dynamic" acts beyond max_position_embeddings only, which is where our context ends.
    if kind not in ("default", "dynamic"):
        raise CheckpointError(
            f"{file}: rope scaling of type {_shown(kind)}; this version computes default, linear, dynamic and llama3"
        )
    return theta, None


def _name(file: Path) -> str:
    """The folder's name; in the Hugging Face cache (models--org--name/snapshots/revision) the repository's."""
    folder = file.parent.resolve()
    if folder.parent.name == "snapshots":
        return folder.parent.parent.name.split("--")[-1]
    return folder.name


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:80] + "…"


class Keys:
    """Typed, bounded reads of an object from JSON. A key that is null counts as absent where there is a default."""

    def __init__(self, file: Path, values: Mapping[str, Any], prefix: str = "") -> None:
        self._file, self._values, self._prefix = file, values, prefix

    def integer(self, key: str, low: int, high: int, default: int | None = None) -> int:
        value = self._get(key, default)
        if type(value) is not int or not low <= value <= high:
            raise self._wrong(key, value, f"a whole number from {low} to {high}")
        return value

    def number(self, key: str, low: float, high: float, default: float | None = None) -> float:
        value = self._get(key, default)
        if type(value) not in (int, float) or not math.isfinite(value) or not low <= value <= high:
            raise self._wrong(key, value, f"a number from {low:g} to {high:g}")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, value, "true or false")
        return value

    def _get(self, key: str, default: Any) -> Any:
        value = self._values.get(key)
        if value is None and default is None:
            raise CheckpointError(f"{self._file}: the key '{self._prefix}{key}' is missing")
        return default if value is None else value

    def _wrong(self, key: str, value: Any, expected: str) -> CheckpointError:
        return CheckpointError(f"{self._file}: {self._prefix}{key} is {_shown(value)}, expected {expected}")
