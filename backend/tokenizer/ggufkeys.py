"""The tokenizer keys of a GGUF file, each checked for its type and range.

Facts: GGUF specification, "tokenizer.ggml.*".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from backend.errors import CheckpointError
from backend.tokenizer.vocabulary import MAX_TOKENS, NORMAL

MAX_TEMPLATE = 1 << 20  # characters; the longest published chat templates have under 20,000


class GGUFKeys:
    """Typed reads of `tokenizer.ggml.NAME`; every wrong type or range is a CheckpointError that names the key."""

    def __init__(self, path: Path, metadata: Mapping[str, Any]) -> None:
        self.path, self._metadata = path, metadata

    def get(self, name: str) -> Any:
        return self._metadata.get(f"tokenizer.ggml.{name}")

    def texts(self, name: str, limit: int = MAX_TOKENS) -> list[str]:
        values = self.get(name)
        if not isinstance(values, list) or not values or not all(isinstance(value, str) for value in values):
            raise CheckpointError(f"{self.path}: the key 'tokenizer.ggml.{name}' is missing or is no list of texts")
        if len(values) > limit:
            raise CheckpointError(
                f"{self.path}: tokenizer.ggml.{name} has {len(values)} entries, at most {limit} can be right"
            )
        return values

    def kinds(self, count: int) -> list[int] | None:
        """Token types, one for each token; None where the file has none. What is no known type counts as normal."""
        kinds = self.get("token_type")
        if kinds is None:
            return None
        if not isinstance(kinds, list) or len(kinds) != count or not all(type(kind) is int for kind in kinds):
            raise CheckpointError(
                f"{self.path}: tokenizer.ggml.token_type does not have one entry for each of the tokens"
            )
        return [kind if 1 <= kind <= 6 else NORMAL for kind in kinds]

    def scores(self, count: int) -> list[float] | None:
        scores = self.get("scores")
        if scores is None:
            return None
        if not isinstance(scores, list) or len(scores) != count:
            raise CheckpointError(f"{self.path}: tokenizer.ggml.scores does not have one entry for each of the tokens")
        if not all(type(score) in (int, float) and math.isfinite(score) and abs(score) < 1e38 for score in scores):
            raise CheckpointError(f"{self.path}: tokenizer.ggml.scores has an entry that is no number")
        return [float(score) for score in scores]

    def token(self, name: str, count: int, default: int | None = None) -> int | None:
        """The id in `tokenizer.ggml.NAME_token_id`."""
        value = self.get(f"{name}_token_id")
        if value is None:
            return default if default is not None and default < count else None
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < count:
            raise CheckpointError(
                f"{self.path}: tokenizer.ggml.{name}_token_id is {value!r}, expected a token id below {count}"
            )
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise CheckpointError(f"{self.path}: tokenizer.ggml.{name} is {value!r}, expected true or false")
        return value

    def chat_template(self) -> str | None:
        value = self._metadata.get("tokenizer.chat_template")
        if value is not None and (not isinstance(value, str) or len(value) > MAX_TEMPLATE):
            raise CheckpointError(
                f"{self.path}: tokenizer.chat_template is no text of at most {MAX_TEMPLATE} characters"
            )
        return value or None
