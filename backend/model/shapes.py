"""Shapes of published models by name, and the spelling `shape:NAME[:FORMAT][:KEY=NUMBER ...]`. Level 0: no torch.

    shape:llama-2-7b              random weights of that shape in bfloat16
    shape:llama-2-7b:q4_0         in ggml's Q4_0 blocks
    shape:llama-2-7b:q4_0:layers=8:context=2048

Where such a model stands in for a file, speed and memory are those of the real one; what it writes is noise. Numbers
are those of the published params.json and config.json files.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from backend.errors import CheckpointError, nearest
from backend.model.config import ModelConfig, RopeScaling
from backend.weights.blocks import BF16, BY_NAME, BlockFormat

PREFIX = "shape:"
# What may be changed of a shape, and the least and most it may be.
NUMBERS = {"layers": (1, 1000), "context": (64, 1 << 24), "vocabulary": (512, 1 << 20)}
_FIELDS = {"layers": "n_layers", "context": "context", "vocabulary": "vocab_size"}


def _llama(
    dim: int, heads: int, kv_heads: int, layers: int, ffn: int, vocabulary: int, context: int, **more: object
) -> ModelConfig:
    config = ModelConfig(
        architecture="llama",
        name="",
        dim=dim,
        n_layers=layers,
        n_heads=heads,
        n_kv_heads=kv_heads,
        head_dim=dim // heads,
        ffn_dim=ffn,
        vocab_size=vocabulary,
        context=context,
        norm_eps=1e-5,
    )
    return dataclasses.replace(config, **more)  # type: ignore[arg-type]


_LLAMA_3 = {"rope_theta": 500000.0}
_LONG = {**_LLAMA_3, "rope_scaling": RopeScaling("llama3", 8.0)}
_SMALL = {**_LLAMA_3, "rope_scaling": RopeScaling("llama3", 32.0), "tied_output": True}
SHAPES: dict[str, ModelConfig] = {
    "llama-7b": _llama(4096, 32, 32, 32, 11008, 32000, 2048, norm_eps=1e-6),
    "llama-13b": _llama(5120, 40, 40, 40, 13824, 32000, 2048, norm_eps=1e-6),
    "llama-33b": _llama(6656, 52, 52, 60, 17920, 32000, 2048, norm_eps=1e-6),
    "llama-65b": _llama(8192, 64, 64, 80, 22016, 32000, 2048),
    "llama-2-7b": _llama(4096, 32, 32, 32, 11008, 32000, 4096),
    "llama-2-13b": _llama(5120, 40, 40, 40, 13824, 32000, 4096),
    "llama-2-70b": _llama(8192, 64, 8, 80, 28672, 32000, 4096),
    "llama-3-8b": _llama(4096, 32, 8, 32, 14336, 128256, 8192, **_LLAMA_3),
    "llama-3-70b": _llama(8192, 64, 8, 80, 28672, 128256, 8192, **_LLAMA_3),
    "llama-3.1-8b": _llama(4096, 32, 8, 32, 14336, 128256, 131072, **_LONG),
    "llama-3.1-70b": _llama(8192, 64, 8, 80, 28672, 128256, 131072, **_LONG),
    "llama-3.2-1b": _llama(2048, 32, 8, 16, 8192, 128256, 131072, **_SMALL),
    "llama-3.2-3b": _llama(3072, 24, 8, 28, 8192, 128256, 131072, **_SMALL),
    "tinyllama-1.1b": _llama(2048, 32, 4, 22, 5632, 32000, 2048),
    "smollm2-135m": _llama(576, 9, 3, 30, 1536, 49152, 8192, rope_theta=100000.0, tied_output=True),
    "mistral-7b": _llama(4096, 32, 8, 32, 14336, 32000, 32768, architecture="mistral", sliding_window=4096),
}


@dataclass(frozen=True)
class Shape:
    """A model that is only a shape: its numbers, and the storage format its matrices are to have."""

    config: ModelConfig
    format: BlockFormat


def is_shape(model: str) -> bool:
    """Whether a preset's `model:` or a path names a shape and no file."""
    return model.startswith(PREFIX)


def parse_shape(model: str) -> Shape:
    """`shape:NAME[:FORMAT][:KEY=NUMBER ...]`, in any order behind the name. Raises CheckpointError."""
    name, *options = model.removeprefix(PREFIX).lower().split(":")
    config = SHAPES.get(name)
    if config is None:
        near = nearest(name, SHAPES) or f"; there are {', '.join(SHAPES)}"
        raise CheckpointError(f"{model}: there is no shape '{name}'{near}")
    fmt, changes = BF16, dict[str, int]()
    for option in options:
        key, equals, number = option.partition("=")
        if equals:
            field, value = _change(model, key, number)
            changes[field] = value
        elif option.upper() in BY_NAME:
            fmt = BY_NAME[option.upper()]
        else:
            names = [known.lower() for known in BY_NAME]
            near = nearest(option, names) or f"; expected a storage format ({', '.join(names[:12])}, ...)"
            raise CheckpointError(f"{model}: '{option}' is no storage format{near}")
    return Shape(dataclasses.replace(config, name=name, **changes), fmt)  # type: ignore[arg-type]


def _change(model: str, key: str, number: str) -> tuple[str, int]:
    """The field of ModelConfig that KEY=NUMBER changes, and its value."""
    if key not in NUMBERS:
        known = nearest(key, NUMBERS) or f"; known keys: {', '.join(NUMBERS)}"
        raise CheckpointError(f"{model}: unknown key '{key}'{known}")
    low, high = NUMBERS[key]
    if not number.isdecimal() or len(number) > 12 or not low <= int(number) <= high:
        raise CheckpointError(f"{model}: {key} is '{number}', expected a whole number from {low} to {high}")
    return _FIELDS[key], int(number)
