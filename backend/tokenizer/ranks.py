"""Llama 3's `tokenizer.model`: lines of "base64 rank", merged by the tiktoken library.

The special tokens are not in the file; their names and order are those of Meta's llama-models (`llama3/tokenizer.py`).
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator
from pathlib import Path

import tiktoken

from backend.errors import CheckpointError
from backend.tokenizer.pretokenizers import LLAMA3
from backend.tokenizer.vocabulary import MAX_TOKENS, EncodePlain, Vocabulary, VocabularyTokenizer

_LINE = re.compile(rb"([A-Za-z0-9+/]+={0,2}) ([0-9]{1,7})")
_MAX_TOKEN_BYTES = 1024  # the longest of Llama 3 have 128
_N_SPECIAL = 256
# What the reserved places hold by now. Meta renamed some of them over the releases; these are the latest names.
_SPECIAL = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>", "<|step_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>",
    "<|python_tag|>", "<|image|>",
)  # fmt: skip
# The library gives up on longer texts, and its time grows with the square of an unbroken run: Meta cuts there too.
_MAX_CHARACTERS = 400_000
_MAX_RUN = 25_000
_LONG_RUN = re.compile(rf"\S{{{_MAX_RUN + 1},}}|\s{{{_MAX_RUN + 1},}}")


def looks_like_ranks(data: bytes) -> bool:
    """Whether the first line is one of a rank file."""
    return _LINE.fullmatch(data[:4096].split(b"\n", 1)[0].rstrip(b"\r")) is not None


def ranks_tokenizer(path: Path, data: bytes, chat_template: str | None) -> VocabularyTokenizer:
    """The tokenizer of a rank file with Llama 3's special tokens behind it. Raises CheckpointError."""
    ranks = _read_ranks(path, data)
    special = [*_SPECIAL, *(f"<|reserved_special_token_{2 + n}|>" for n in range(_N_SPECIAL - len(_SPECIAL)))]
    control = {text: len(ranks) + n for n, text in enumerate(special)}
    spelt = sorted(ranks, key=ranks.__getitem__)
    vocabulary = Vocabulary(
        texts=[*(token.decode("utf-8", "replace") for token in spelt), *special],
        spelt=[*spelt, *(b"" for _ in special)],
        control=control,
        bos_id=control["<|begin_of_text|>"],
        eos_id=control["<|end_of_text|>"],
        unk_id=None,
        end_ids=frozenset(control[text] for text in ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")),
        add_bos=True,
        adds_space_prefix=False,
        chat_template=chat_template,
        description=f"tiktoken ranks (Llama 3), {len(ranks):,} tokens and {len(special)} control tokens",
    )
    return VocabularyTokenizer(vocabulary, _engine(path, ranks))


def _read_ranks(path: Path, data: bytes) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), 1):
        if not line:
            continue
        found = _LINE.fullmatch(line)
        try:
            token = base64.b64decode(found[1], validate=True) if found else b""
        except binascii.Error:
            token = b""
        if not found or not 0 < len(token) <= _MAX_TOKEN_BYTES:
            raise CheckpointError(f"{path}: line {number} is {line[:40]!r}, expected a token in base64 and its rank")
        if token in ranks or int(found[2]) != len(ranks):
            raise CheckpointError(
                f"{path}: line {number} gives the rank {int(found[2])} to {token[:20]!r}, expected a new token and the "
                f"rank {len(ranks)}"
            )
        if len(ranks) >= MAX_TOKENS:
            raise CheckpointError(f"{path}: more than {MAX_TOKENS} ranks; no vocabulary has so many")
        ranks[token] = len(ranks)
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise CheckpointError(f"{path}: the byte {missing[0]} has no rank; the file is incomplete, download it again")
    return ranks


def _engine(path: Path, ranks: dict[bytes, int]) -> EncodePlain:
    try:
        library = tiktoken.Encoding("llama3", pat_str=LLAMA3, mergeable_ranks=ranks, special_tokens={})
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        raise CheckpointError(f"{path}: the tiktoken library refuses the ranks ({str(error)[:200]})") from None

    def encode(text: str, begins: bool) -> list[int]:
        ids: list[int] = []
        for start in range(0, len(text), _MAX_CHARACTERS):
            for piece in _without_long_runs(text[start : start + _MAX_CHARACTERS]):
                ids += library.encode_ordinary(piece)
        return ids

    return encode


def _without_long_runs(text: str) -> Iterator[str]:
    """Cut so that no piece has more than `_MAX_RUN` blank, or more than `_MAX_RUN` other characters in a row."""
    begin = 0
    for run in _LONG_RUN.finditer(text):
        for cut in range(run.start() + _MAX_RUN, run.end(), _MAX_RUN):
            yield text[begin:cut]
            begin = cut
    yield text[begin:]
