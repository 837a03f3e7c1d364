"""SentencePiece vocabularies: `tokenizer.model`, those inside GGUF files ("llama") and inside old ggml files.

One engine for all three, the sentencepiece library, which is given a clean message made here (modelproto.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor

from backend.errors import CheckpointError
from backend.tokenizer.ggufkeys import GGUFKeys
from backend.tokenizer.modelproto import BPE, SPACE, Piece, SentenceModel, is_control, serialized
from backend.tokenizer.vocabulary import (
    BYTE,
    CONTROL,
    MAX_TOKENS,
    NORMAL,
    UNKNOWN,
    UNUSED,
    EncodePlain,
    Vocabulary,
    VocabularyTokenizer,
    control_table,
    end_ids,
    settled_kinds,
)

_BYTE = re.compile(rb"<0x([0-9A-F]{2})>")
_MARK = SPACE.encode()


@dataclass(frozen=True)
class Extra:
    """What stands beside the pieces themselves."""

    add_bos: bool = True
    end_ids: Sequence[int | None] = ()
    chat_template: str | None = None


def sentencepiece_tokenizer(path: Path, model: SentenceModel, extra: Extra) -> VocabularyTokenizer:
    """The tokenizer of a model that was read from `tokenizer.model` or put together from another file's parts."""
    count = len(model.pieces)
    bos, eos = (token if 0 <= token < count else None for token in (model.bos_id, model.eos_id))
    texts = [piece.text.decode("utf-8", "replace") for piece in model.pieces]
    kinds = settled_kinds(texts, [piece.kind for piece in model.pieces], [bos, eos, *extra.end_ids])
    unk = _unknown(path, kinds, model.unk_id)
    kinds[unk] = UNKNOWN
    control = control_table(texts, kinds)
    spelt = [_spelt(path, token, piece.text, kinds[token]) for token, piece in enumerate(model.pieces)]
    # The library knows one unknown token and no two pieces of one name.
    pieces = [
        Piece(piece.text, piece.score, CONTROL if kind == UNKNOWN and token != unk else kind)
        for token, (piece, kind) in enumerate(zip(model.pieces, kinds))
    ]
    clean = replace(model, pieces=_distinct(pieces), unk_id=unk, bos_id=-1, eos_id=-1)
    vocabulary = Vocabulary(
        texts=texts,
        spelt=spelt,
        control=control,
        bos_id=bos,
        eos_id=eos,
        unk_id=unk,
        end_ids=end_ids(control, [eos, *extra.end_ids]),
        add_bos=extra.add_bos,
        adds_space_prefix=model.add_dummy_prefix,
        chat_template=extra.chat_template,
        description=f"SentencePiece {'BPE' if model.algorithm == BPE else 'unigram'}, {count:,} pieces",
    )
    return VocabularyTokenizer(vocabulary, _engine(path, clean))


def sentencepiece_from_gguf(keys: GGUFKeys) -> VocabularyTokenizer:
    """GGUF "llama". Defaults where keys are missing: begin 1, end 2, unknown 0, BOS in front, space prefix."""
    texts = keys.texts("tokens")
    count = len(texts)
    encoded = [text.encode("utf-8", "replace").replace(b" ", _MARK) for text in texts]
    kinds = keys.kinds(count) or _guessed_kinds(encoded)
    scores = keys.scores(count) or [float(-token) for token in range(count)]
    pieces = [Piece(*values) for values in zip(encoded, scores, kinds)]
    unk = keys.token("unknown", count, 0)
    bos = keys.token("bos", count, 1 if is_control(pieces, 1) else None)
    eos = keys.token("eos", count, 2 if is_control(pieces, 2) else None)
    model = SentenceModel(
        pieces,
        unk_id=-1 if unk is None else unk,
        bos_id=-1 if bos is None else bos,
        eos_id=-1 if eos is None else eos,
        add_dummy_prefix=keys.flag("add_space_prefix", True),
        remove_extra_whitespaces=keys.flag("remove_extra_whitespaces", False),
    )
    ends = [keys.token("eot", count), keys.token("eom", count)]
    # add_eos_token is for training: a prompt that ends with the end token asks for nothing more.
    keys.flag("add_eos_token", False)
    extra = Extra(keys.flag("add_bos_token", True), ends, keys.chat_template())
    return sentencepiece_tokenizer(keys.path, model, extra)


def sentencepiece_from_ggml(path: Path, metadata: Mapping[str, Any]) -> VocabularyTokenizer:
    """The vocabulary of ggml, ggmf and ggjt files, where spaces are spaces and byte tokens are single raw bytes."""
    tokens, scores = metadata.get("tokens"), metadata.get("scores")
    if not isinstance(tokens, list) or not all(isinstance(token, bytes) for token in tokens):
        raise CheckpointError(f"{path}: the vocabulary is no list of byte strings")
    if not 3 <= len(tokens) <= MAX_TOKENS:
        raise CheckpointError(f"{path}: {len(tokens)} tokens; a vocabulary has 3 to {MAX_TOKENS}")
    if scores is None:
        scores = [float(-token) for token in range(len(tokens))]
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise CheckpointError(f"{path}: the scores do not have one entry for each of the {len(tokens)} tokens")
    if not all(type(score) in (int, float) and math.isfinite(score) and abs(score) < 1e38 for score in scores):
        raise CheckpointError(f"{path}: the vocabulary has a score that is no number")
    first = [Piece(b"<unk>", 0.0, UNKNOWN), Piece(b"<s>", 0.0, CONTROL), Piece(b"</s>", 0.0, CONTROL)]
    rest = [_ggml_piece(token, tokens[token], float(scores[token])) for token in range(3, len(tokens))]
    return sentencepiece_tokenizer(path, SentenceModel([*first, *rest]), Extra())


def _ggml_piece(token: int, text: bytes, score: float) -> Piece:
    if not text:
        return Piece(b"", score, CONTROL)
    if token <= 258 and len(text) == 1:
        return Piece(b"<0x%02X>" % text[0], score, BYTE)
    return Piece(text.replace(b" ", _MARK), score)


def _guessed_kinds(texts: Sequence[bytes]) -> list[int]:
    """Token types of files that leave them out: LLaMA's own layout."""
    kinds = [BYTE if _BYTE.fullmatch(text) else NORMAL for text in texts]
    for token, (text, kind) in enumerate(((b"<unk>", UNKNOWN), (b"<s>", CONTROL), (b"</s>", CONTROL))):
        if texts[token : token + 1] == [text]:
            kinds[token] = kind
    return kinds


def _unknown(path: Path, kinds: Sequence[int], named: int) -> int:
    if 0 <= named < len(kinds) and kinds[named] in (UNKNOWN, CONTROL):
        return named
    if UNKNOWN in kinds:
        return kinds.index(UNKNOWN)
    raise CheckpointError(f"{path}: the vocabulary has no token for unknown characters (named: {named})")


def _spelt(path: Path, token: int, text: bytes, kind: int) -> bytes:
    if kind in (CONTROL, UNKNOWN):
        return b""
    if kind != BYTE:
        return text.replace(_MARK, b" ")
    found = _BYTE.fullmatch(text)
    if not found:
        raise CheckpointError(f"{path}: token {token} is a byte by its type, but is spelt {text!r:.60}, not <0xNN>")
    return bytes([int(found[1], 16)])


def _distinct(pieces: Sequence[Piece]) -> list[Piece]:
    """Pieces the library accepts: what it would refuse (doubles, empty or broken text) no text can make anyway."""
    taken = {piece.text for piece in pieces}
    seen: set[bytes] = set()
    distinct = []
    for token, piece in enumerate(pieces):
        text = piece.text
        if not text or text in seen or b"\0" in text or not _is_text(text):
            text = b"[unused %d]" % token
            while text in taken:
                text += b"]"
            piece = Piece(text, piece.score, piece.kind if piece.kind in (UNKNOWN, CONTROL) else UNUSED)
        seen.add(text)
        taken.add(text)
        distinct.append(piece)
    return distinct


def _is_text(text: bytes) -> bool:
    try:
        text.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _engine(path: Path, model: SentenceModel) -> EncodePlain:
    n_bytes = sum(piece.kind == BYTE for piece in model.pieces)
    if n_bytes not in (0, 256):
        raise CheckpointError(f"{path}: the vocabulary has {n_bytes} byte tokens, expected 256 (or none)")
    try:
        processor = SentencePieceProcessor(model_proto=serialized(model))
    except Exception as error:  # the library has one exception type for everything
        said = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path}: the sentencepiece library refuses the vocabulary ({said})") from None

    def encode(text: str, begins: bool) -> list[int]:
        return list(processor.encode(text, out_type=int))

    return encode
