"""Byte-level BPE from the vocabulary inside a GGUF file ("gpt2"), through the `tokenizers` library.

The library does the merging; what it is given (pre-tokenizer, merges) and what control tokens mean is decided here.
Facts: GGUF specification, "tokenizer.ggml.*"; pre-tokenizers as in llama.cpp's `llama-vocab.cpp`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers

from backend.errors import CheckpointError, nearest
from backend.tokenizer.bytelevel import spelt_bytes
from backend.tokenizer.ggufkeys import GGUFKeys
from backend.tokenizer.library import check_merges, plain_encoder, set_up
from backend.tokenizer.pretokenizers import PRE_TOKENIZERS, PreTokenizer
from backend.tokenizer.vocabulary import (
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    Vocabulary,
    VocabularyTokenizer,
    control_table,
    end_ids,
    settled_kinds,
)

_log = logging.getLogger(__name__)
_MAX_MERGES = 1 << 22


def byte_bpe_from_gguf(keys: GGUFKeys) -> VocabularyTokenizer:
    """A GPT-2 style vocabulary. Every token is a fixed sequence of bytes."""
    tokens = keys.texts("tokens")
    merges = keys.texts("merges", _MAX_MERGES)
    pre, name = _pre_tokenizer(keys)
    count = len(tokens)
    named = {name: keys.token(name, count) for name in ("bos", "eos", "eot", "eom", "unknown")}
    ends = [named["eos"], named["eot"], named["eom"]]
    kinds = settled_kinds(tokens, keys.kinds(count) or [NORMAL] * count, [named["bos"], *ends])
    control = control_table(tokens, kinds)
    hidden = {text for text, kind in zip(tokens, kinds) if kind in (CONTROL, UNKNOWN)}
    literal = [text for text, kind in zip(tokens, kinds) if kind == USER_DEFINED and text and text not in hidden]
    vocabulary = Vocabulary(
        texts=tokens,
        spelt=[_spelt(text, kind) for text, kind in zip(tokens, kinds)],
        control=control,
        bos_id=named["bos"],
        eos_id=named["eos"],
        unk_id=named["unknown"],
        end_ids=end_ids(control, ends),
        add_bos=keys.flag("add_bos_token", pre.add_bos),
        adds_space_prefix=False,
        chat_template=keys.chat_template(),
        description=f"byte-level BPE, {count:,} tokens, pre-tokenizer {name}",
    )
    engine = _engine(keys.path, tokens, merges, pre, hidden, literal)
    return VocabularyTokenizer(vocabulary, plain_encoder(keys.path, engine))


def _pre_tokenizer(keys: GGUFKeys) -> tuple[PreTokenizer, str]:
    name = keys.get("pre")
    if name is None:
        _log.warning(
            "%s does not name its pre-tokenizer (tokenizer.ggml.pre): 'default' is used, and replies may be worse than "
            "the model can do. Files converted anew name it.",
            keys.path,
        )
        name = "default"
    if not isinstance(name, str) or name not in PRE_TOKENIZERS:
        near = nearest(name, PRE_TOKENIZERS) if isinstance(name, str) else ""
        raise CheckpointError(
            f"{keys.path}: tokenizer.ggml.pre is {name!r:.100}, a pre-tokenizer that this version does not know{near}"
        )
    return PRE_TOKENIZERS[name], name


def _spelt(text: str, kind: int) -> bytes:
    if kind in (CONTROL, UNKNOWN):
        return b""
    return text.encode("utf-8", "replace") if kind == USER_DEFINED else spelt_bytes(text)


def _engine(
    path: Path,
    tokens: Sequence[str],
    merges: Sequence[str],
    pre: PreTokenizer,
    hidden: set[str],
    literal: Sequence[str],
) -> Tokenizer:
    pairs: list[tuple[str, str]] = []
    for index, merge in enumerate(merges):
        cut = merge.find(" ", 1)  # a token may itself begin with a space
        left, right = merge[:cut], merge[cut + 1 :]
        if cut < 0 or not right:
            raise CheckpointError(
                f"{path}: entry {index} of tokenizer.ggml.merges is {merge!r:.100}, expected 'left right'"
            )
        if left not in hidden and right not in hidden and left + right not in hidden:
            pairs.append((left, right))
    vocab = {text: token for token, text in reversed(list(enumerate(tokens)))}  # of doubles, the first counts
    for text in hidden:  # what is not there cannot be typed
        vocab.pop(text, None)
    check_merges(path, vocab, pairs)

    def build() -> Tokenizer:
        engine = Tokenizer(models.BPE(vocab=vocab, merges=pairs, ignore_merges=pre.whole_first))
        splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.splits]
        engine.pre_tokenizer = pre_tokenizers.Sequence(
            [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        engine.add_tokens([AddedToken(text, normalized=False, special=False) for text in literal])
        return engine

    return set_up(path, "the vocabulary does not fit its merges", build)
