"""tokenizer.json of a SentencePiece vocabulary, in the form that LLaMA's own Hugging Face folders have.

transformers can make it from tokenizer.model only with the protobuf package; with this file it needs nothing.
"""

from __future__ import annotations

from typing import Any

from backend.convert.vocabulary import BYTE, CONTROL, UNKNOWN, USER_DEFINED
from backend.tokenizer.modelproto import SentenceModel

_SPACE = "▁"


def sentencepiece_json(model: SentenceModel, add_bos: bool) -> dict[str, Any]:
    """The object of tokenizer.json. Joining by score becomes an order of merges."""
    tokens, kinds = model.texts(), [piece.kind for piece in model.pieces]
    prefix = [{"type": "Prepend", "prepend": _SPACE}] if model.add_dummy_prefix else []
    space = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    back = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": i, "content": token, **flags, "special": kind != USER_DEFINED}
        for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    unknown = tokens[model.unk_id] if 0 <= model.unk_id < len(tokens) else None
    merger = {"type": "BPE", "dropout": None, "unk_token": unknown, "continuing_subword_prefix": None,
             "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": BYTE in kinds,
             "vocab": {token: i for i, token in enumerate(tokens)}, "merges": _merges(tokens, model)}  # fmt: skip
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": [*prefix, space]}, "pre_tokenizer": None,
        "post_processor": start_step(tokens, model.bos_id) if add_bos else None,
        "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
        "model": merger,
    }  # fmt: skip


def _merges(tokens: list[str], model: SentenceModel) -> list[str]:
    """Every pair of tokens that make a token, best score first; of one token's pairs, the lowest ids first."""
    ids = {token: i for i, token in enumerate(tokens)}
    found: list[tuple[float, int, int, str]] = []
    for token, piece in zip(tokens, model.pieces, strict=True):
        if piece.kind in (UNKNOWN, CONTROL, BYTE, USER_DEFINED):
            continue
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                found.append((-piece.score, ids[left], ids[right], f"{left} {right}"))
    return [text for *_, text in sorted(found)]


def start_step(tokens: list[str], bos: int) -> dict[str, Any] | None:
    """The step that puts the begin-of-text token in front."""
    if not 0 <= bos < len(tokens):
        return None
    start = tokens[bos]
    first, second = ({"SpecialToken": {"id": start, "type_id": number}} for number in (0, 1))
    text, other = {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}
    special = {start: {"id": start, "ids": [bos], "tokens": [start]}}
    return {"type": "TemplateProcessing", "single": [first, text], "pair": [first, text, second, other],
            "special_tokens": special}  # fmt: skip
