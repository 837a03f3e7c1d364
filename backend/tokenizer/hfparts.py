"""The parts of a `tokenizer.json` that shape text: checked before the library sees them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from backend.errors import CheckpointError
from backend.tokenizer.pretokenizers import PRE_TOKENIZERS

_NORMALIZERS = {"Sequence", "Prepend", "Replace", "NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Strip", "StripAccents"}
_PRE_TOKENIZERS = {"Sequence", "ByteLevel", "Metaspace", "Split", "Digits", "Punctuation", "Whitespace",
                   "WhitespaceSplit"}  # fmt: skip
_DECODERS = {"Sequence", "ByteLevel", "ByteFallback", "Fuse", "Strip", "Replace", "Metaspace"}
_MAX_PARTS = 64
_MAX_PATTERN = 4000  # characters

# Expressions in which a repeated group is known to do no harm.
_KNOWN = {pattern for pre in PRE_TOKENIZERS.values() for pattern in pre.splits}
# A repeated group with a repetition or a choice inside can need exponential time; a back reference or a call of a group
# is in no tokenizer.
_REPEATED_GROUP = re.compile(r"(?<!\\)\)(?:[*+]|\{\d*,)")
_REFERENCE = re.compile(r"\\[1-9kg]")


def walk(part: Any) -> Iterator[dict[str, Any]]:
    """A part and the parts inside it, outermost first. Nothing for null."""
    waiting = [part]
    seen = 0
    while waiting and seen < _MAX_PARTS:
        here = waiting.pop(0)
        if isinstance(here, dict):
            seen += 1
            yield here
            for name in ("normalizers", "pretokenizers", "decoders", "processors"):
                if isinstance(here.get(name), list):
                    waiting += here[name]


def check_normalizer(path: Path, part: Any) -> None:
    _check(path, "normalizer", part, _NORMALIZERS)


def check_pre_tokenizer(path: Path, part: Any) -> None:
    _check(path, "pre_tokenizer", part, _PRE_TOKENIZERS)


def check_decoder(path: Path, part: Any) -> None:
    """How tokens become text is done by us; what we do not do must not be asked for."""
    _check(path, "decoder", part, _DECODERS)
    for inner in walk(part):
        if inner.get("type") == "Replace" and (inner.get("pattern"), inner.get("content")) != (
            {"String": "\u2581"},
            " ",
        ):
            raise CheckpointError(
                f"{path}: the decoder replaces {inner.get('pattern')!r:.60}; only U+2581 by a space is known"
            )


def first_token(post_processor: Any) -> str | None:
    """The special token that the post-processor's template puts in front of a text."""
    for part in walk(post_processor):
        single = part.get("single") if part.get("type") == "TemplateProcessing" else None
        if isinstance(single, list) and single and isinstance(single[0], dict):
            token = single[0].get("SpecialToken")
            if isinstance(token, dict) and isinstance(token.get("id"), str):
                return str(token["id"])
    return None


def _check(path: Path, name: str, part: Any, known: set[str]) -> None:
    if part is None:
        return
    count = 0
    for inner in walk({"type": "Sequence", "decoders": [part]}):
        count += 1
        kind = inner.get("type")
        if not isinstance(kind, str) or kind not in known:
            raise CheckpointError(f"{path}: {name} {kind!r:.60}; this version knows {', '.join(sorted(known))}")
        pattern = inner.get("pattern")
        if isinstance(pattern, dict) and "Regex" in pattern:
            _check_pattern(path, pattern["Regex"])
    if count >= _MAX_PARTS or not isinstance(part, dict):
        raise CheckpointError(f"{path}: {name} is no object of fewer than {_MAX_PARTS} parts")


def _check_pattern(path: Path, pattern: Any) -> None:
    if not isinstance(pattern, str) or len(pattern) > _MAX_PATTERN:
        raise CheckpointError(f"{path}: a regular expression is no text of at most {_MAX_PATTERN} characters")
    if pattern not in _KNOWN and (_REPEATED_GROUP.search(pattern) or _REFERENCE.search(pattern)):
        raise CheckpointError(
            f"{path}: the regular expression {pattern!r:.80} could take unbounded time, so it is refused"
        )
