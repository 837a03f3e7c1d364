"""What a checkpoint says about its tokenizer: plain data that names where the vocabulary is. Level 0."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class TokenizerSource:
    """Where to build the tokenizer from.

    * "gguf": `metadata` holds the file's keys (`tokenizer.ggml.*`, `tokenizer.chat_template`).
    * "ggml": the vocabulary of a ggml/ggmf/ggjt file; `metadata` has `tokens` (list of bytes) and `scores` (list of
      floats, or None where the file has none).
    * "folder": `path` is the model's folder; tokenizer files are looked for there, then one level up (LLaMA 1 keeps
      `tokenizer.model` beside the size folders).
    * "bytes": no vocabulary anywhere; one token for each byte (models that are only a shape).
    """

    kind: Literal["gguf", "ggml", "folder", "bytes"]
    path: Path
    metadata: Mapping[str, Any] = field(default_factory=dict)
