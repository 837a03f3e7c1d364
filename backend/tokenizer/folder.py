"""Which tokenizer a model's folder holds.

Looked for in the folder, then one level up (LLaMA 1 keeps one `tokenizer.model` beside its size folders):
`tokenizer.json`, then `tokenizer.model`, which is SentencePiece or Llama 3's ranks by its content.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from backend.errors import CheckpointError
from backend.tokenizer.hfjson import hf_json_tokenizer
from backend.tokenizer.jsonfile import read_file
from backend.tokenizer.modelproto import Piece, SentenceModel, looks_like_model, parse_model
from backend.tokenizer.ranks import looks_like_ranks, ranks_tokenizer
from backend.tokenizer.sentence import Extra, sentencepiece_tokenizer
from backend.tokenizer.sidefiles import SideFiles, read_side_files
from backend.tokenizer.vocabulary import CONTROL, UNUSED, USER_DEFINED, VocabularyTokenizer

_log = logging.getLogger(__name__)
_LIMIT = 64 << 20  # bytes of a tokenizer.model; the largest in use have 5 million
_NAMES = ("tokenizer.json", "tokenizer.model")
_OF_THE_MODEL = ("config.json", "generation_config.json")  # a neighbour's would be another model's


def tokenizer_from_folder(folder: Path, vocab_size: int) -> VocabularyTokenizer:
    """The tokenizer in `folder` or one level up. `vocab_size`: rows of the model's table. Raises CheckpointError."""
    if folder.is_file():
        folder = folder.parent
    path = _find(folder)

    def find(name: str) -> Path | None:
        places = [folder] if name in _OF_THE_MODEL else [folder, path.parent]
        return next((place / name for place in places if (place / name).is_file()), None)

    side = read_side_files(find)
    if path.name == "tokenizer.json":
        return hf_json_tokenizer(path, side, vocab_size)
    data = read_file(path, _LIMIT)
    if looks_like_ranks(data):
        return ranks_tokenizer(path, data, side.chat_template)
    if looks_like_model(data):
        return _sentencepiece(path, parse_model(path, data), side, vocab_size)
    raise CheckpointError(
        f"{path}: neither a SentencePiece model nor lines of 'base64 rank' (Llama 3); it begins with {data[:16]!r}"
    )


def _find(folder: Path) -> Path:
    for place in (folder, folder.absolute().parent):
        for name in _NAMES:
            if (place / name).is_file():
                return place / name
    raise CheckpointError(f"{folder}: no tokenizer; looked for {' and '.join(_NAMES)} there and one level up")


def _sentencepiece(path: Path, model: SentenceModel, side: SideFiles, vocab_size: int) -> VocabularyTokenizer:
    model = _with_added(path, model, side, vocab_size)
    pieces = model.pieces
    ids = {piece.text.decode("utf-8", "replace"): token for token, piece in reversed(list(enumerate(pieces)))}
    bos, eos = side.token("bos_token", ids), side.token("eos_token", ids)
    if bos is not None:
        model = replace(model, bos_id=bos)
    if eos is not None:
        model = replace(model, eos_id=eos)
    ends = [token for token in side.eos_ids if 0 <= token < len(pieces)]
    add_bos = True if side.add_bos is None else side.add_bos
    return sentencepiece_tokenizer(path, model, Extra(add_bos, ends, side.chat_template))


def _with_added(path: Path, model: SentenceModel, side: SideFiles, vocab_size: int) -> SentenceModel:
    """The pieces with those that fine-tuning added behind them, such as Alpaca's [PAD]."""
    count = len(model.pieces)
    added = {token: entry for token, entry in side.added.items() if token >= count}
    beyond = sorted(entry.text for token, entry in added.items() if token >= vocab_size)
    if beyond:
        _log.warning(
            "%s: the model has %d rows, so its added tokens %s are left out",
            path,
            vocab_size,
            ", ".join(f"{text!r:.40}" for text in beyond[:10]),
        )
    added = {token: entry for token, entry in added.items() if token < vocab_size}
    pieces = [*model.pieces]
    for token in range(count, max(added, default=-1) + 1):
        entry = added.get(token)
        if entry is None:
            pieces.append(Piece(b"", 0.0, UNUSED))
        else:
            text = entry.text.encode("utf-8", "replace").replace(b" ", "\u2581".encode())
            pieces.append(Piece(text, 0.0, CONTROL if entry.special else USER_DEFINED))
    return replace(model, pieces=pieces)
