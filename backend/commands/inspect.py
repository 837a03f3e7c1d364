"""python -m backend inspect PATH: what a model file is, from its headers alone."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

from backend.checkpoint.base import Checkpoint
from backend.checkpoint.open import open_checkpoint
from backend.tokenizer.open import open_tokenizer

HELP = "say what a model file is: format, sizes, quantization, tokenizer, prompt format"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path)
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")


def run(arguments: argparse.Namespace) -> int:
    facts = describe(open_checkpoint(arguments.path))
    if arguments.json:
        print(json.dumps(facts, indent=2, ensure_ascii=False))
        return 0
    for name, value in facts.items():
        print(f"{name.replace('_', ' '):16} {_shown(value)}")
    return 0


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, dict):
        return ", ".join(f"{count} x {name}" for name, count in value.items())
    return " ".join(value) if isinstance(value, list) else str(value)


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """The facts, in the order they are shown."""
    config, metadata = checkpoint.config, checkpoint.metadata
    tokenizer = open_tokenizer(checkpoint.path, metadata, config.vocab_size)
    matrices = [info for info in checkpoint.tensors.values() if len(info.shape) > 1]
    template = metadata.get("tokenizer.chat_template")
    return {
        "path": str(checkpoint.path),
        "format": checkpoint.format,
        "name": config.name,
        "architecture": config.architecture,
        "parameters": config.parameters(),
        "bytes": checkpoint.path.stat().st_size,
        "quantization": dict(Counter(info.format.name for info in matrices).most_common()),
        "context": config.context,
        "layers": config.n_layers,
        "dim": config.dim,
        "ffn_dim": config.ffn_dim,
        "heads": config.n_heads,
        "kv_heads": config.n_kv_heads,
        "vocabulary": config.vocab_size,
        "tied_output": config.tied_output,
        "tokenizer": f"{metadata.get('tokenizer.ggml.model')} {metadata.get('tokenizer.ggml.pre', '')}".strip(),
        "end_tokens": [tokenizer.token_text(token) for token in sorted(tokenizer.end_ids)],
        "prompt_format": "the file's own template" if template else "none",
    }
