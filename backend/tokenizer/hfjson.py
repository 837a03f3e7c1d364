"""`tokenizer.json`, the file of the `tokenizers` library: BPE over bytes (Llama 3) or over characters (LLaMA 2).

The file is read and checked here, and the library gets a tokenizer made from what was checked: it has panics and no
limits of its own, and parts that have nothing to do with encoding (padding, truncation, dropout) are left behind.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, models

from backend.errors import CheckpointError
from backend.tokenizer.bytelevel import spelt_bytes
from backend.tokenizer.hfparts import check_decoder, check_normalizer, check_pre_tokenizer, first_token, walk
from backend.tokenizer.jsonfile import read_json
from backend.tokenizer.library import check_merges, plain_encoder, set_up
from backend.tokenizer.sidefiles import SideFiles
from backend.tokenizer.vocabulary import (
    CONTROL,
    MAX_TOKENS,
    NORMAL,
    UNUSED,
    USER_DEFINED,
    Vocabulary,
    VocabularyTokenizer,
    control_table,
    end_ids,
    settled_kinds,
)

_log = logging.getLogger(__name__)
_LIMIT = 64 << 20  # bytes; Llama 3.1's has 17 million
_MAX_MERGES = 1 << 22
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_MARK = "\u2581"


@dataclass(frozen=True)
class _Added:
    """A token that is cut out of the text before anything else."""

    text: str
    special: bool
    flags: Mapping[str, bool]  # single_word, lstrip, rstrip, normalized


def hf_json_tokenizer(path: Path, side: SideFiles, vocab_size: int) -> VocabularyTokenizer:
    """The tokenizer of a `tokenizer.json` and what the files beside it say. Raises CheckpointError.

    `vocab_size`: rows of the model's table; added tokens beyond it are left out with a warning.
    """
    content = read_json(path, _LIMIT)
    model = _model(path, content)
    base = _vocab(path, model.get("vocab"))
    merges = _merges(path, model.get("merges"))
    added = _added_tokens(path, content.get("added_tokens"), base, vocab_size)
    check_normalizer(path, content.get("normalizer"))
    check_pre_tokenizer(path, content.get("pre_tokenizer"))
    check_decoder(path, content.get("decoder"))

    count = max(max(base.values()), max(added, default=0)) + 1
    texts = [""] * count
    kinds = [UNUSED] * count
    for text, token in base.items():
        texts[token], kinds[token] = text, NORMAL
    for token, entry in added.items():
        texts[token], kinds[token] = entry.text, CONTROL if entry.special else USER_DEFINED
    ids = {text: token for token, text in reversed(list(enumerate(texts))) if text}
    template = first_token(content.get("post_processor"))
    bos = _first(side.token("bos_token", ids), ids.get(template or ""), _below(side.bos_id, count))
    eos = _first(side.token("eos_token", ids), *(_below(token, count) for token in side.eos_ids))
    unk = _first(ids.get(model.get("unk_token") or ""), side.token("unk_token", ids))
    ends = [eos, *(_below(token, count) for token in side.eos_ids)]
    kinds = settled_kinds(texts, kinds, [bos, *ends])
    if unk is not None:
        kinds[unk] = CONTROL
    control = control_table(texts, kinds)
    byte_level = any(part.get("type") == "ByteLevel" for part in walk(content.get("decoder")))
    vocabulary = Vocabulary(
        texts=texts,
        spelt=[_spelt(text, kind, byte_level) for text, kind in zip(texts, kinds)],
        control=control,
        bos_id=bos,
        eos_id=eos,
        unk_id=unk,
        end_ids=end_ids(control, ends),
        add_bos=side.add_bos if side.add_bos is not None else bos is not None and template == texts[bos],
        adds_space_prefix=_adds_space(content),
        chat_template=side.chat_template,
        description=f"tokenizer.json, {'byte-level ' if byte_level else ''}BPE, {count:,} tokens",
    )
    literal = [(token, entry) for token, entry in added.items() if kinds[token] == USER_DEFINED]
    engine = _engine(path, content, model, base, merges, set(control), literal)
    later = None
    if any(part.get("prepend_scheme") == "first" for part in walk(content.get("pre_tokenizer"))):
        rest = _without_prefix(content)
        later = _engine(path, rest, model, base, merges, set(control), literal)
    return VocabularyTokenizer(vocabulary, plain_encoder(path, engine, later))


def _model(path: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    model = content.get("model")
    if not isinstance(model, dict):
        raise CheckpointError(f"{path}: 'model' is missing or no object")
    kind = model.get("type", "BPE" if "merges" in model else None)  # old files leave the type out
    if kind != "BPE":
        raise CheckpointError(f"{path}: model type {kind!r:.60}; this version knows BPE")
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise CheckpointError(f"{path}: {name} is {model[name]!r:.60}; LLaMA's vocabularies have none")
    for name in ("fuse_unk", "byte_fallback", "ignore_merges"):
        if not isinstance(model.get(name, False), bool | None):
            raise CheckpointError(f"{path}: {name} is {model[name]!r:.60}, expected true or false")
    if not isinstance(model.get("unk_token"), str | None):
        raise CheckpointError(f"{path}: unk_token is {model['unk_token']!r:.60}, expected a text")
    return model


def _vocab(path: Path, vocab: Any) -> dict[str, int]:
    if not isinstance(vocab, dict) or not vocab:
        raise CheckpointError(f"{path}: 'vocab' is missing or no object")
    seen: set[int] = set()
    for text, token in vocab.items():
        if type(token) is not int or not 0 <= token < MAX_TOKENS or token in seen:
            raise CheckpointError(
                f"{path}: token {text!r:.60} has the id {token!r:.60}, expected one of its own below {MAX_TOKENS}"
            )
        seen.add(token)
    return vocab


def _merges(path: Path, merges: Any) -> list[tuple[str, str]]:
    """Pairs; older files write "left right"."""
    if not isinstance(merges, list) or len(merges) > _MAX_MERGES:
        raise CheckpointError(f"{path}: 'merges' is no list of at most {_MAX_MERGES} entries")
    pairs: list[tuple[str, str]] = []
    for index, merge in enumerate(merges):
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, str) and part for part in parts):
            raise CheckpointError(f"{path}: entry {index} of 'merges' is {merge!r:.60}, expected two tokens")
        pairs.append((parts[0], parts[1]))
    return pairs


def _added_tokens(path: Path, entries: Any, base: Mapping[str, int], vocab_size: int) -> dict[int, _Added]:
    if entries is None:
        return {}
    if not isinstance(entries, list) or len(entries) > MAX_TOKENS:
        raise CheckpointError(f"{path}: added_tokens is no list of at most {MAX_TOKENS} entries")
    added: dict[int, _Added] = {}
    beyond = []
    for index, entry in enumerate(entries):
        token, text = (entry.get("id"), entry.get("content")) if isinstance(entry, dict) else (None, None)
        if type(token) is not int or not 0 <= token < MAX_TOKENS or not isinstance(text, str) or not text:
            raise CheckpointError(f"{path}: entry {index} of added_tokens has no id and text that can be right")
        if base.get(text, token) != token:
            raise CheckpointError(
                f"{path}: added token {text!r:.60} has the id {token}, but the vocabulary gives it {base[text]}"
            )
        flags = {name: entry.get(name) is True for name in ("single_word", "lstrip", "rstrip", "normalized")}
        if token >= vocab_size:
            beyond.append(text)
        else:
            added[token] = _Added(text, entry.get("special") is True, flags)
    if beyond:
        _log.warning(
            "%s: the model has %d rows, so its added tokens %s are left out",
            path,
            vocab_size,
            ", ".join(f"{text!r:.40}" for text in beyond[:10]),
        )
    return added


def _first(*values: int | None) -> int | None:
    return next((value for value in values if value is not None), None)


def _below(token: int | None, count: int) -> int | None:
    """Old files name ids that do not exist, -1 among them."""
    return token if token is not None and 0 <= token < count else None


def _spelt(text: str, kind: int, byte_level: bool) -> bytes:
    if kind in (CONTROL, UNUSED):
        return b""
    if kind == USER_DEFINED:
        return text.encode("utf-8", "replace")
    if byte_level:
        return spelt_bytes(text)
    found = _BYTE.fullmatch(text)
    return bytes([int(found[1], 16)]) if found else text.replace(_MARK, " ").encode("utf-8", "replace")


def _adds_space(content: Mapping[str, Any]) -> bool:
    return any(
        part.get("type") == "Prepend"
        or (part.get("type") == "Metaspace" and part.get("prepend_scheme", "always") != "never")
        or (part.get("type") == "ByteLevel" and part.get("add_prefix_space") is True)
        for name in ("normalizer", "pre_tokenizer")
        for part in walk(content.get(name))
    )


def _without_prefix(content: Mapping[str, Any]) -> dict[str, Any]:
    """The same, for text in the middle of a prompt: "first" puts the space before a text's first word only."""
    copy = json.loads(json.dumps({"normalizer": content.get("normalizer"), "pre_tokenizer": content["pre_tokenizer"]}))
    for part in walk(copy["pre_tokenizer"]):
        if part.get("prepend_scheme") == "first":
            part["prepend_scheme"] = "never"
    return dict(copy)


def _engine(
    path: Path,
    content: Mapping[str, Any],
    model: Mapping[str, Any],
    base: Mapping[str, int],
    merges: Sequence[tuple[str, str]],
    hidden: set[str],
    literal: Sequence[tuple[int, _Added]],
) -> Tokenizer:
    # A control token that is not in the engine's vocabulary cannot be typed. The unknown token must be there.
    unknown = model.get("unk_token") or None
    vocab = {text: token for text, token in base.items() if text not in hidden or text == unknown}
    vocab |= {entry.text: token for token, entry in literal}
    pairs = [
        (left, right)
        for left, right in merges
        if left not in hidden and right not in hidden and left + right not in hidden
    ]
    check_merges(path, vocab, pairs)

    def build() -> Tokenizer:
        parts = {name: content.get(name) for name in ("normalizer", "pre_tokenizer")}
        empty = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}}
        engine = Tokenizer.from_str(json.dumps(empty | parts))
        engine.model = models.BPE(
            vocab=vocab,
            merges=pairs,
            unk_token=unknown if unknown in vocab else None,
            fuse_unk=bool(model.get("fuse_unk")),
            byte_fallback=bool(model.get("byte_fallback")),
            ignore_merges=bool(model.get("ignore_merges")),
        )
        engine.add_tokens([AddedToken(entry.text, special=False, **entry.flags) for _, entry in literal])
        return engine

    return set_up(path, "the tokenizers library refuses it", build)
