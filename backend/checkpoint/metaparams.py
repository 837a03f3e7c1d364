"""params.json of Meta's checkpoints -> the numbers that make the model. No weights are needed.

Keys, defaults and the feed-forward formula: `ModelArgs` and `FeedForward` of llama v1, v2 and llama3 (`model.py`).
Some copies nest everything under "model". Unknown keys are ignored; known ones must have the right type and range.
Mistral's files have the same names and add head_dim, hidden_dim and sliding_window.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backend.errors import CheckpointError
from backend.model.config import ModelConfig, RopeScaling

FILE = "params.json"
MAX_BYTES = 1 << 16
USUAL_VOCAB = 32000  # LLaMA 1 and 2 say -1: as many as the tokenizer has
_MISSING = object()

# Keys of models that compute something else under the same file layout.
_OTHER_MODELS = ("moe", "moe_args", "use_qk_norm")


@dataclass(frozen=True)
class MetaParams:
    """What params.json says. `ffn_dim` comes from a formula; the shape of w1 is the truth where there is one."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn_dim: int
    vocab_size: int | None
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    sliding_window: int | None

    def config(self, name: str, vocab_size: int, ffn_dim: int, tied_output: bool) -> ModelConfig:
        return ModelConfig(
            architecture="llama" if self.sliding_window is None else "mistral",
            name=name,
            dim=self.dim,
            n_layers=self.n_layers,
            n_heads=self.n_heads,
            n_kv_heads=self.n_kv_heads,
            head_dim=self.head_dim,
            ffn_dim=ffn_dim,
            vocab_size=vocab_size,
            context=self.context(vocab_size),
            norm_eps=self.norm_eps,
            rope_theta=self.rope_theta,
            rope_scaling=self.rope_scaling,
            rope_interleaved=True,
            tied_output=tied_output,
            sliding_window=self.sliding_window,
        )

    def context(self, vocab_size: int) -> int:
        """Tokens the model was trained for, which the file does not say; told from what it does say, in this order:

        * a sliding window: Mistral, 32768; scaled rotary frequencies: Llama 3.1 and later, 131072;
        * rope_theta 10^6 and more with a vocabulary under 40000: Code Llama, 16384 (32768 if the vocabulary is 32768,
          which is Mistral without a window);
        * a vocabulary of 100000 or more, or a rope_theta above 10000: Llama 3, 8192;
        * norm_eps under 5e-6: LLaMA 1, 2048. So is 80 layers without grouped heads: the 65B has norm_eps 1e-5;
        * all others: Llama 2, 4096.
        """
        if self.sliding_window is not None:
            return 32768
        if self.rope_scaling is not None:
            return 131072
        if self.rope_theta >= 1e6 and vocab_size < 40000:
            return 32768 if vocab_size == 32768 else 16384
        if vocab_size >= 100000 or self.rope_theta > 10000:
            return 8192
        if self.norm_eps < 5e-6 or (self.n_layers == 80 and self.n_kv_heads == self.n_heads):
            return 2048
        return 4096


def meta_config(path: Path) -> ModelConfig:
    """The model that a params.json (or the folder it is in) describes, with no weights at hand.

    A vocabulary of -1 counts as 32000, and the output projection as a matrix of its own: only the weights can say
    otherwise. Raises CheckpointError.
    """
    folder = path if path.is_dir() else path.parent
    params = read_params(path)
    return params.config(folder.resolve().name, params.vocab_size or USUAL_VOCAB, params.ffn_dim, tied_output=False)


def read_params(path: Path) -> MetaParams:
    """Parse and check a params.json, given by itself or by its folder. Raises CheckpointError."""
    path = path / FILE if path.is_dir() else path
    raw = _read_object(path)
    if "dim" not in raw and isinstance(raw.get("model"), dict):
        raw = raw["model"]
    for key in _OTHER_MODELS:
        if raw.get(key):
            raise CheckpointError(
                f"{path}: has '{key}', so it is no plain LLaMA (mixtures of experts cannot be opened)"
            )
    fields = _Fields(path, raw)
    dim = fields.integer("dim", 1, 1 << 20)
    n_heads = fields.integer("n_heads", 1, 1 << 14)
    n_layers = fields.integer("n_layers", 1, 1 << 12)
    n_kv_heads = fields.integer("n_kv_heads", 1, n_heads, n_heads)
    if n_heads % n_kv_heads:
        raise CheckpointError(f"{path}: n_heads {n_heads} is not a multiple of n_kv_heads {n_kv_heads}")
    if fields.absent("head_dim") and dim % n_heads:
        raise CheckpointError(f"{path}: dim {dim} is not a multiple of n_heads {n_heads}")
    head_dim = fields.integer("head_dim", 2, 1 << 14, dim // n_heads)
    if head_dim % 2:
        raise CheckpointError(f"{path}: heads have {head_dim} dimensions; rotary positions need an even number")
    vocab_size = fields.integer("vocab_size", -1, 1 << 24, -1)
    if vocab_size == 0:
        raise CheckpointError(f"{path}: 'vocab_size' is 0, expected -1 (as the tokenizer) or at least 1")
    return MetaParams(
        dim=dim,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        ffn_dim=_ffn_dim(fields, dim),
        vocab_size=None if vocab_size == -1 else vocab_size,
        norm_eps=fields.number("norm_eps", 1e-12, 1.0, 1e-5),
        rope_theta=fields.number("rope_theta", 1.0, 1e12, 10000.0),
        rope_scaling=_rope_scaling(path.parent, fields, {"hidden_size": dim, "num_hidden_layers": n_layers}),
        sliding_window=None if fields.absent("sliding_window") else fields.integer("sliding_window", 1, 1 << 30),
    )


def _ffn_dim(fields: _Fields, dim: int) -> int:
    """`FeedForward.__init__`: two thirds of 4 x dim, times the multiplier, rounded up to whole multiples."""
    multiple_of = fields.integer("multiple_of", 1, 1 << 20, 256)
    multiplier = fields.number("ffn_dim_multiplier", 1e-3, 64.0, 1.0)
    hidden = int(multiplier * int(2 * (4 * dim) / 3))
    return fields.integer("hidden_dim", 1, 1 << 24, max(1, -(-hidden // multiple_of)) * multiple_of)


def _rope_scaling(folder: Path, fields: _Fields, same: dict[str, int]) -> RopeScaling | None:
    """Llama 3.1's scaling where `use_scaled_rope` is set: factor 8, unless a file says another.

    Meta's own code has the factor fixed at 8, while the 1B and 3B models of Llama 3.2 were trained with 32. So the
    factor is taken from `rope_scaling_factor`, else from a Hugging Face config.json in the folder or the one above it
    (where their repositories keep it) that describes a model of the `same` sizes.
    """
    if not fields.flag("use_scaled_rope"):
        return None
    usual = RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
    if not fields.absent("rope_scaling_factor") or not fields.absent("rope_high_freq_factor"):
        factor = fields.number("rope_scaling_factor", 1.0, 1e6, usual.factor)
        return RopeScaling("llama3", factor, 1.0, fields.number("rope_high_freq_factor", 1.001, 1e6, 4.0), 8192)
    for path in (folder / "config.json", folder.resolve().parent / "config.json"):
        if not path.is_file():
            continue
        config = _read_object(path)
        scaling = config.get("rope_scaling")
        if isinstance(scaling, dict) and all(config.get(key) == value for key, value in same.items()):
            found = _Fields(path, scaling)
            low = found.number("low_freq_factor", 1e-3, 1e3, usual.low_freq_factor)
            return RopeScaling(
                "llama3",
                found.number("factor", 1.0, 1e6, usual.factor),
                low,
                found.number("high_freq_factor", 1.001 * low, 1e6, usual.high_freq_factor),
                found.integer("original_max_position_embeddings", 1, 1 << 30, usual.original_context),
            )
    return usual


def _read_object(path: Path) -> dict[str, Any]:
    try:
        if not path.is_file():
            raise CheckpointError(f"{path}: there is no such file; Meta's checkpoints have one beside the weights")
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise CheckpointError(f"{path}: has more than {MAX_BYTES} bytes, which cannot be right")
        value = json.loads(data.decode("utf-8-sig"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (ValueError, RecursionError) as error:  # also what is no UTF-8
        raise CheckpointError(f"{path}: is not valid JSON ({str(error)[:100]})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds a JSON {type(value).__name__}, an object is expected")
    return value


class _Fields:
    """Values of a JSON object by key; null counts as absent. Raises CheckpointError."""

    def __init__(self, path: Path, raw: dict[str, Any]) -> None:
        self._path, self._raw = path, raw

    def absent(self, key: str) -> bool:
        return self._raw.get(key) is None

    def _value(self, key: str, default: Any) -> Any:
        value = self._raw.get(key)
        if value is None and default is _MISSING:
            raise CheckpointError(f"{self._path}: '{key}' is missing; the model cannot be built without it")
        return default if value is None else value

    def integer(self, key: str, low: int, high: int, default: Any = _MISSING) -> int:
        value = self._value(key, default)
        if type(value) is not int or not low <= value <= high:
            self._wrong(key, value, f"a whole number from {low} to {high}")
        return int(value)

    def number(self, key: str, low: float, high: float, default: Any = _MISSING) -> float:
        value = self._value(key, default)
        if type(value) not in (int, float) or not low <= value <= high or not math.isfinite(value):
            self._wrong(key, value, f"a number from {low:g} to {high:g}")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self._value(key, False)
        if type(value) is not bool:
            self._wrong(key, value, "true or false")
        return bool(value)

    def _wrong(self, key: str, value: Any, expected: str) -> None:
        try:
            shown = json.dumps(value)
        except (ValueError, RecursionError):  # a number of thousands of digits
            shown = "something very long"
        raise CheckpointError(f"{self._path}: '{key}' is {shown[:60]}, expected {expected}")
