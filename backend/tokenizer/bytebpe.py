"""Byte-level BPE from the vocabulary inside a GGUF file, through the `tokenizers` library.

The library does the merging; what it is given (pre-tokenizer, merges) and what control tokens mean is decided here.
Facts: GGUF specification, "tokenizer.ggml.*"; pre-tokenizers as in llama.cpp's `llama-vocab.cpp`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from tokenizers.pre_tokenizers import PreTokenizer

from backend.errors import CheckpointError
from backend.tokenizer.segments import Segment

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4
# Tokens that end a turn in files that only name one end token.
_END_SPELLINGS = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<EOT>")

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS: dict[str, tuple[str, ...]] = {
    "smollm": (r"\p{N}", _GPT2),
    "starcoder": (r"\p{N}", _GPT2),
    "refact": (r"\p{N}", _GPT2),
    "command-r": (r"\p{N}", _GPT2),
    "gpt-2": (_GPT2,),
    "llama-bpe": (_LLAMA3,),
    "llama-v3": (_LLAMA3,),
    "llama3": (_LLAMA3,),
    "qwen2": (_LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"),),
}
_WHOLE_TOKENS_FIRST = {"llama-bpe", "llama-v3", "llama3"}  # a piece that is itself a token is not merged from parts


class ByteBPE:
    """A GPT-2 style vocabulary. Every token is a fixed sequence of bytes."""

    def __init__(self, path: Path, metadata: Mapping[str, Any]) -> None:
        tokens = _texts(path, metadata, "tokenizer.ggml.tokens")
        merges = _texts(path, metadata, "tokenizer.ggml.merges")
        kinds = metadata.get("tokenizer.ggml.token_type") or [_NORMAL] * len(tokens)
        if not isinstance(kinds, list) or len(kinds) != len(tokens):
            raise CheckpointError(f"{path}: tokenizer.ggml.token_type does not have one entry for each of the tokens")
        pre = metadata.get("tokenizer.ggml.pre", "gpt-2")
        if not isinstance(pre, str) or pre not in _SPLITS:
            raise CheckpointError(f"{path}: pre-tokenizer {pre!r}; this version knows {', '.join(sorted(_SPLITS))}")
        self.vocab_size = len(tokens)
        self._tokens, self._kinds = tokens, kinds
        self._control = {tokens[i]: i for i, kind in enumerate(kinds) if kind in (_CONTROL, _USER_DEFINED)}
        self._start = _id(path, metadata, "tokenizer.ggml.bos_token_id", len(tokens))
        self._add_start = bool(metadata.get("tokenizer.ggml.add_bos_token", pre in _WHOLE_TOKENS_FIRST))
        self.end_ids = self._find_end_ids(path, metadata)
        self._bpe = _library_tokenizer(path, tokens, merges, pre)
        self._bytes = [self._spell(i) for i in range(len(tokens))]

    def encode(self, text: str) -> list[int]:
        return list(self._bpe.encode(text).ids) if text else []

    def encode_segments(self, segments: list[Segment]) -> list[int]:
        ids: list[int] = []
        for segment in segments:
            if segment.control:
                ids.append(self._control[segment.text])
            else:
                ids += self.encode(segment.text)
        return ids

    def with_start(self, ids: list[int]) -> list[int]:
        if not self._add_start or self._start is None or ids[:1] == [self._start]:
            return ids
        return [self._start, *ids]

    def control_tokens(self) -> dict[str, int]:
        return dict(self._control)

    def token_bytes(self, token_id: int) -> bytes:
        return self._bytes[token_id]

    def token_text(self, token_id: int) -> str:
        return self._tokens[token_id]

    def _spell(self, token_id: int) -> bytes:
        if self._kinds[token_id] == _CONTROL:
            return b""
        text = self._tokens[token_id]
        if self._kinds[token_id] == _USER_DEFINED:
            return text.encode()
        try:
            return bytes(_BYTE_OF[character] for character in text)
        except KeyError:  # not in the byte alphabet: a few files store such tokens as plain text
            return text.encode()

    def _find_end_ids(self, path: Path, metadata: Mapping[str, Any]) -> frozenset[int]:
        names = ("eos", "eot", "eom")
        found = [_id(path, metadata, f"tokenizer.ggml.{name}_token_id", self.vocab_size) for name in names]
        spelt = [self._control.get(text) for text in _END_SPELLINGS]
        return frozenset(i for i in found + spelt if i is not None)


def _library_tokenizer(path: Path, tokens: list[str], merges: list[str], pre: str) -> Tokenizer:
    pairs: list[tuple[str, str]] = []
    for index, merge in enumerate(merges):
        left, space, right = merge.partition(" ") if not merge.startswith(" ") else (" ", " ", merge[2:])
        if not space or not left or not right:
            raise CheckpointError(f"{path}: entry {index} of tokenizer.ggml.merges is {merge!r}, expected 'left right'")
        pairs.append((left, right))
    vocab = {text: i for i, text in reversed(list(enumerate(tokens)))}  # of doubles, the first counts
    try:
        model = models.BPE(vocab=vocab, merges=pairs, ignore_merges=pre in _WHOLE_TOKENS_FIRST)
    except Exception as error:  # the library raises plain Exception for a merge whose result is no token
        raise CheckpointError(f"{path}: the vocabulary does not fit its merges ({error})") from None
    tokenizer = Tokenizer(model)
    splits: list[PreTokenizer] = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in _SPLITS[pre]]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    return tokenizer


def _texts(path: Path, metadata: Mapping[str, Any], key: str) -> list[str]:
    values = metadata.get(key)
    if not isinstance(values, list) or not values or not isinstance(values[0], str):
        raise CheckpointError(f"{path}: the key '{key}' is missing or is no list of texts")
    return values


def _id(path: Path, metadata: Mapping[str, Any], key: str, size: int) -> int | None:
    value = metadata.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < size:
        raise CheckpointError(f"{path}: {key} is {value!r}, expected a token id below {size}")
    return value


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte: itself where printable, else the next code points from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()
