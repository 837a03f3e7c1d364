"""Tokenizer files of a Hugging Face folder, made from the tokenizer keys of a GGUF file.

Byte-level BPE becomes tokenizer.json, SentencePiece becomes tokenizer.model; both with tokenizer_config.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from backend.convert.hf_spm_json import sentencepiece_json, start_step
from backend.convert.output import ConvertError
from backend.convert.vocab_json import LLAMA3_SPLIT, QWEN2_SPLIT
from backend.convert.vocabulary import CONTROL, UNUSED, USER_DEFINED
from backend.tokenizer.modelproto import Piece, SentenceModel, serialized

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_DIGITS = {"type": "Digits", "individual_digits": True}
_SPLITS = {"llama-bpe": LLAMA3_SPLIT, "llama-v3": LLAMA3_SPLIT, "llama3": LLAMA3_SPLIT, "qwen2": QWEN2_SPLIT}
_DIGITS_FIRST = ("smollm", "starcoder", "refact", "command-r")


def tokenizer_files(keys: Mapping[str, Any]) -> dict[str, bytes]:
    """File name -> content. `keys`: the tokenizer keys of a GGUF file."""
    kind = keys.get("tokenizer.ggml.model")
    tokens = keys.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
        raise ConvertError("the source has no vocabulary in tokenizer.ggml.tokens")
    kinds = keys.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    if not isinstance(kinds, list) or len(kinds) != len(tokens) or not all(type(value) is int for value in kinds):
        raise ConvertError("tokenizer.ggml.token_type has no number for each token of the source")
    settings: dict[str, Any] = {"clean_up_tokenization_spaces": False, "model_max_length": int(1e30)}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        if (token_id := token_ids(keys).get(key)) is not None:
            settings[f"{name}_token"] = tokens[token_id]
    templates = {
        key.removeprefix("tokenizer.chat_template").removeprefix("."): value
        for key, value in keys.items()
        if key.startswith("tokenizer.chat_template") and isinstance(value, str)
    }
    if set(templates) == {""}:
        settings["chat_template"] = templates[""]
    elif templates:
        settings["chat_template"] = [{"name": name or "default", "template": templates[name]} for name in templates]
    if kind == "gpt2":
        files = {"tokenizer.json": _json(_byte_level(keys, tokens, kinds, settings))}
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    elif kind == "llama":
        pieces = _sentencepiece(keys, tokens, kinds)
        add_bos = bool(keys.get("tokenizer.ggml.add_bos_token", True))
        files = {"tokenizer.model": serialized(pieces), "tokenizer.json": _json(sentencepiece_json(pieces, add_bos))}
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # takes tokenizer.json as it is
        settings["add_bos_token"] = add_bos
        settings["add_eos_token"] = bool(keys.get("tokenizer.ggml.add_eos_token", False))
    else:
        raise ConvertError(f"a tokenizer of kind {kind!r} cannot be written as Hugging Face files")
    return files | {"tokenizer_config.json": _json(settings)}


def token_ids(keys: Mapping[str, Any]) -> dict[str, int]:
    """bos, eos, unknown, padding: those that the keys name and the vocabulary has."""
    size = len(keys.get("tokenizer.ggml.tokens") or ())
    found = {}
    for name in ("bos", "eos", "unknown", "padding"):
        value = keys.get(f"tokenizer.ggml.{name}_token_id")
        if type(value) is int and 0 <= value < size:
            found[name] = value
    return found


def _byte_level(
    keys: Mapping[str, Any], tokens: list[str], kinds: list[int], settings: Mapping[str, Any]
) -> dict[str, Any]:
    pre = keys.get("tokenizer.ggml.pre", "gpt-2")
    if pre in _SPLITS:
        split = {"type": "Split", "pattern": {"Regex": _SPLITS[pre]}, "behavior": "Isolated", "invert": False}
        steps: dict[str, Any] = {"type": "Sequence", "pretokenizers": [split, {**_BYTE_LEVEL, "use_regex": False}]}
    elif pre in _DIGITS_FIRST:
        steps = {"type": "Sequence", "pretokenizers": [_DIGITS, _BYTE_LEVEL]}
    elif pre == "gpt-2":
        steps = _BYTE_LEVEL
    else:
        raise ConvertError(f"pre-tokenizer {pre!r} is not known here, so no tokenizer.json can be written")
    merges = keys.get("tokenizer.ggml.merges") or []
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": i, "content": token, **flags, "special": kind in (CONTROL, UNUSED)}
        for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind in (CONTROL, UNUSED, USER_DEFINED)
    ]
    whole_first = pre in ("llama-bpe", "llama-v3", "llama3")
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
             "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": whole_first,
             "vocab": {token: i for i, token in enumerate(tokens)}, "merges": list(merges)}  # fmt: skip
    post: dict[str, Any] = {**_BYTE_LEVEL, "trim_offsets": False}
    if keys.get("tokenizer.ggml.add_bos_token", whole_first) and "bos_token" in settings:
        template = start_step(tokens, tokens.index(settings["bos_token"]))
        post = {"type": "Sequence", "processors": [post, template]}
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
            "pre_tokenizer": steps, "post_processor": post, "decoder": _BYTE_LEVEL, "model": model}  # fmt: skip


def _sentencepiece(keys: Mapping[str, Any], tokens: list[str], kinds: list[int]) -> SentenceModel:
    scores = keys.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise ConvertError("tokenizer.ggml.scores has no number for each token of the source")
    ids = token_ids(keys)
    return SentenceModel(
        [Piece(token.encode(), float(score), kind) for token, score, kind in zip(tokens, scores, kinds, strict=True)],
        unk_id=ids.get("unknown", 0),
        bos_id=ids.get("bos", 1),
        eos_id=ids.get("eos", 2),
        pad_id=ids.get("padding", -1),
        add_dummy_prefix=bool(keys.get("tokenizer.ggml.add_space_prefix", True)),
    )


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
