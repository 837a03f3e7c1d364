"""The vocabulary of a tokenizer.json: byte-level BPE, or SentencePiece BPE with byte fallback."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from backend.convert.side_files import read_json
from backend.convert.vocabulary import BYTE, NORMAL, UNKNOWN, Vocabulary
from backend.errors import CheckpointError

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_AFTER_DIGITS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3_SPLIT = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _AFTER_DIGITS
QWEN2_SPLIT = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _AFTER_DIGITS
# Regular expression of a Split step -> GGUF's name for the pre-tokenizer.
SPLITS = {LLAMA3_SPLIT: "llama-bpe", QWEN2_SPLIT: "qwen2"}
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_SPACE = "▁"
MAX_TOKENS = 1 << 22


def vocabulary_of_json(path: Path, limit: int) -> Vocabulary:
    """Read a tokenizer.json. `limit`: rows of the embedding table, no token may lie beyond."""
    document = read_json(path)
    model = document.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE" or not isinstance(model.get("vocab"), dict):
        kind = model.get("type") if isinstance(model, dict) else model
        raise CheckpointError(f"{path}: a tokenizer of type {kind!r}, expected 'BPE'")
    tokens = _tokens(path, model["vocab"], limit)
    merges = _merges(path, model.get("merges"))
    if model.get("byte_fallback") is True:
        found = _sentencepiece(document, model, tokens, merges)
    else:
        found = Vocabulary("gpt2", tokens, [NORMAL] * len(tokens), merges=merges)
        found.pre = _pre_tokenizer(path, document)
    found.add_bos = _starts_with_bos(document)
    for token_id, token, special in added_tokens(path, document.get("added_tokens")):
        found.add(token_id, token, special, limit, path)
    return found


def added_tokens(path: Path, entries: Any) -> Iterator[tuple[int, str, bool]]:
    """(id, spelling, special) of the list that tokenizer.json keeps."""
    if entries is None:
        return
    if not isinstance(entries, list):
        raise CheckpointError(f"{path}: added_tokens is a {type(entries).__name__}, expected a list")
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(entry.get("content"), str) or type(entry.get("id")) is not int:
            raise CheckpointError(f"{path}: added_tokens has an entry without an id and a content")
        yield entry["id"], entry["content"], entry.get("special") is True


def _tokens(path: Path, vocab: dict[str, Any], limit: int) -> list[str]:
    size = len(vocab)
    if any(type(number) is not int or number < 0 for number in vocab.values()):
        raise CheckpointError(f"{path}: the vocabulary has an id that is no whole number from 0 up")
    highest = max(vocab.values(), default=-1)
    if highest >= limit:
        raise CheckpointError(f"{path}: the vocabulary has the id {highest}, but the embedding table has {limit} rows")
    tokens = [f"[PAD{number}]" for number in range(min(highest + 1, size + limit))]
    for token, number in vocab.items():
        tokens[number] = token
    return tokens


def _merges(path: Path, merges: Any) -> list[str]:
    """Old files write "a b", newer ones ["a", "b"]."""
    if not isinstance(merges, list):
        raise CheckpointError(f"{path}: it has no list of merges")
    found = []
    for merge in merges:
        if isinstance(merge, list) and len(merge) == 2 and all(isinstance(part, str) for part in merge):
            found.append(" ".join(merge))
        elif isinstance(merge, str) and merge.count(" ") == 1:
            found.append(merge)
        else:
            raise CheckpointError(f"{path}: merge {len(found)} is not a pair of tokens")
    return found


def _sentencepiece(document: dict[str, Any], model: dict[str, Any], tokens: list[str], merges: list[str]) -> Vocabulary:
    """SentencePiece joins the pair whose result has the highest score; the order of merges says the same."""
    rank: dict[str, int] = {}
    for number, merge in enumerate(merges):
        rank.setdefault(merge.replace(" ", "", 1), number)
    scores = [-float(rank.get(token, len(merges))) for token in tokens]
    unknown = model.get("unk_token")
    kinds = [UNKNOWN if t == unknown else BYTE if _BYTE_TOKEN.fullmatch(t) else NORMAL for t in tokens]
    found = Vocabulary("llama", tokens, kinds, scores=scores)
    found.unk = found.id_of(unknown)
    found.add_space_prefix = any(
        (step.get("type") == "Prepend" and step.get("prepend") == _SPACE)
        or (step.get("type") == "Metaspace" and step.get("prepend_scheme", "always") != "never")
        for step in [*_steps(document.get("normalizer")), *_steps(document.get("pre_tokenizer"))]
    )
    return found


def _pre_tokenizer(path: Path, document: dict[str, Any]) -> str:
    """GGUF's name for the way text is split. An unknown way is an error: the ids would be wrong without a sign."""
    steps = list(_steps(document.get("pre_tokenizer")))
    kinds = [step.get("type") for step in steps]
    if any(step.get("add_prefix_space") is True for step in steps):
        raise CheckpointError(f"{path}: it puts a space before a text, which no GGUF pre-tokenizer does")
    normalizers = [step.get("type") for step in _steps(document.get("normalizer"))]
    if kinds == ["Split", "ByteLevel"] and steps[1].get("use_regex") is False:
        pattern = steps[0].get("pattern")
        regex = pattern.get("Regex") if isinstance(pattern, dict) else None
        name = SPLITS.get(regex) if isinstance(regex, str) else None
        if name and steps[0].get("behavior") == "Isolated" and normalizers in ([], ["NFC"]):
            return name
        raise CheckpointError(f"{path}: splits text by {regex!r}, which is no pre-tokenizer known here")
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True) is True and not normalizers:
        return "gpt-2"
    digits = kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") is True
    if digits and steps[1].get("use_regex", True) is True and not normalizers:
        return "smollm"
    raise CheckpointError(f"{path}: pre-tokenizer {kinds} with normalizer {normalizers} is not known here")


def _steps(part: Any) -> Iterator[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, sequences taken apart."""
    if not isinstance(part, dict):
        return
    if part.get("type") == "Sequence":
        for inner in part.get("pretokenizers") or part.get("normalizers") or []:
            if isinstance(inner, dict):
                yield inner
    else:
        yield part


def _starts_with_bos(document: dict[str, Any]) -> bool:
    """Whether the post-processor puts a special token before a single text."""
    post = document.get("post_processor")
    parts = [post] if isinstance(post, dict) else []
    if parts and parts[0].get("type") == "Sequence":
        parts = [part for part in parts[0].get("processors") or [] if isinstance(part, dict)]
    for part in parts:
        single = part.get("single")
        if part.get("type") == "TemplateProcessing" and isinstance(single, list) and single:
            return isinstance(single[0], dict) and "SpecialToken" in single[0]
    return False
