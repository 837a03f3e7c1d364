"""The tokenizer a checkpoint's metadata describes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from backend.errors import CheckpointError
from backend.tokenizer.base import Tokenizer
from backend.tokenizer.bytebpe import ByteBPE


def open_tokenizer(path: Path, metadata: Mapping[str, Any], vocab_size: int) -> Tokenizer:
    """Build the tokenizer and check that it fits the model's embedding table of `vocab_size` rows."""
    kind = metadata.get("tokenizer.ggml.model")
    if kind != "gpt2":
        raise CheckpointError(f"{path}: tokenizer {kind!r}; this version knows byte-level BPE ('gpt2')")
    tokenizer = ByteBPE(path, metadata)
    if tokenizer.vocab_size > vocab_size:
        raise CheckpointError(
            f"{path}: {tokenizer.vocab_size} tokens, but the embedding table has only {vocab_size} rows"
        )
    return tokenizer
