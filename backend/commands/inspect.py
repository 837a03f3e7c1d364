"""python -m backend inspect PATH: what a model is, from its headers alone."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

from backend.checkpoint.base import Checkpoint, TensorInfo
from backend.checkpoint.open import config_alone, open_checkpoint
from backend.errors import CheckpointError
from backend.model.config import ModelConfig, tensor_shapes
from backend.placement.plan import weight_bytes
from backend.presets import WEIGHTS
from backend.prompting import choose_format
from backend.runtime import model_name
from backend.tokenizer.open import open_tokenizer
from backend.weights.blocks import BF16

HELP = "say what a model is: format, sizes, quantization, tokenizer, prompt format"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, help="a file or folder; params.json or config.json alone will do for sizes")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")


def run(arguments: argparse.Namespace) -> int:
    path: Path = arguments.path
    config = config_alone(path)
    facts = describe(open_checkpoint(path)) if config is None else describe_config(path, config)
    if arguments.json:
        print(json.dumps(facts, indent=2, ensure_ascii=False))
        return 0
    for name, value in facts.items():
        if value is not None:
            print(f"{name.replace('_', ' '):16} {_shown(value)}")
    return 0


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """The facts, in the order they are shown."""
    matrices = [info for info in checkpoint.tensors.values() if len(info.shape) > 1]
    facts: dict[str, Any] = {
        "path": str(checkpoint.path),
        "format": checkpoint.format,
        **_config_facts(checkpoint.config),
        "bytes": sum(file.stat().st_size for file in checkpoint.files),
        "quantization": dict(Counter(info.format.name for info in matrices).most_common()),
        "memory": {name: weight_bytes(name, checkpoint.config, checkpoint.tensors) for name in WEIGHTS},
    }
    facts |= _text_facts(checkpoint)
    notes = getattr(checkpoint, "notes", ())
    return facts | ({"notes": list(notes)} if notes else {})


def describe_config(path: Path, config: ModelConfig) -> dict[str, Any]:
    """The same of a model whose weights are not here: everything that follows from its configuration."""
    shapes = tensor_shapes(config)
    tensors = {name: TensorInfo(name, shape, BF16, 0) for name, shape in shapes.items()}
    memory = {name: weight_bytes(name, config, tensors) for name in WEIGHTS if name != "original"}
    return {"path": str(path), "format": "configuration alone, no weights", **_config_facts(config), "memory": memory}


def _config_facts(config: ModelConfig) -> dict[str, Any]:
    scaling = config.rope_scaling
    return {
        "name": config.name,
        "architecture": config.architecture,
        "parameters": config.parameters(),
        "context": config.context,
        "layers": config.n_layers,
        "dim": config.dim,
        "ffn_dim": config.ffn_dim,
        "heads": config.n_heads,
        "kv_heads": config.n_kv_heads,
        "vocabulary": config.vocab_size,
        "tied_output": config.tied_output,
        "rope_theta": config.rope_theta,
        "rope_scaling": f"{scaling.kind} {scaling.factor:g}" if scaling else None,
        "sliding_window": config.sliding_window,
        "kv_bytes_per_token": config.kv_bytes_per_token(2),
    }


def _text_facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """Weights without a tokenizer are still worth looking at, so its absence is a fact and no failure."""
    try:
        tokenizer = open_tokenizer(checkpoint.tokenizer, checkpoint.config.vocab_size)
    except CheckpointError as error:
        return {"tokenizer": f"none that can be used: {error.message}", "end_tokens": [], "prompt_format": "none"}
    name = f"{model_name(checkpoint)} {checkpoint.config.name}"
    form = choose_format("auto", tokenizer, name, "inspect")
    return {
        "tokenizer": tokenizer.description,
        "end_tokens": [tokenizer.token_text(token) for token in sorted(tokenizer.end_ids)],
        "prompt_format": "none"
        if form is None
        else form.name + ("" if form.built_in else " (the model's own template)"),
    }


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, dict):
        if all(name in WEIGHTS for name in value):
            return ", ".join(f"{size / 1e9:.2f} GB as {name}" for name, size in value.items())
        return ", ".join(f"{count} x {name}" for name, count in value.items())
    return "; ".join(map(str, value)) if isinstance(value, list) else str(value)
