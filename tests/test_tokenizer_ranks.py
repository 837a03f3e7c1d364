"""Llama 3's rank file against tiktoken set up here, against llama.cpp's ids, and with lines that are wrong."""

from __future__ import annotations

import base64
from functools import lru_cache
from pathlib import Path

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from backend.errors import CheckpointError
from backend.tokenizer.base import Tokenizer
from backend.tokenizer.open import open_tokenizer
from backend.tokenizer.segments import Segment
from backend.tokenizer.source import TokenizerSource
from tests.material import llama3_ranks, llama_cpp_models
from tests.test_tokenizer_gguf import pairs

# Copied from the model's publication, not from our table.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@lru_cache(maxsize=1)
def ours() -> Tokenizer:
    return open_tokenizer(TokenizerSource("folder", llama3_ranks().parent), 128256)


@lru_cache(maxsize=1)
def theirs() -> tiktoken.Encoding:
    lines = llama3_ranks().read_bytes().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}
    return tiktoken.Encoding("independent", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})


def test_ids_are_llama_cpps() -> None:
    expected = pairs(llama_cpp_models() / "ggml-vocab-llama-bpe.gguf")
    assert [(text, ours().encode(text)) for text, _ in expected] == expected


@settings(max_examples=400, deadline=None)
@given(text=st.one_of(st.text(), st.text(alphabet=" \n\t\r'sS123aé漢🙂<|eot_id|>")))
def test_ids_are_tiktokens(text: str) -> None:
    ids = ours().encode(text)
    assert ids == theirs().encode(text, disallowed_special=())
    assert b"".join(map(ours().token_bytes, ids)).decode() == text


def test_control_tokens() -> None:
    control = ours().control_tokens()
    assert len(control) == 256
    named = {"begin_of_text": 0, "end_of_text": 1, "finetune_right_pad_id": 4, "start_header_id": 6, "end_header_id": 7,
             "eom_id": 8, "eot_id": 9, "python_tag": 10, "reserved_special_token_0": 2}  # fmt: skip
    assert {name: control[f"<|{name}|>"] - 128000 for name in named} == named
    assert ours().vocab_size == 128256
    assert ours().end_ids == {128001, 128008, 128009}
    assert ours().with_start([9]) == [128000, 9]
    assert not set(ours().encode("".join(control))) & set(control.values())
    turn = [
        Segment("<|start_header_id|>", control=True),
        Segment("user<|eot_id|>"),
        Segment("<|eot_id|>", control=True),
    ]
    assert ours().encode_segments(turn) == [128006, *theirs().encode("user<|eot_id|>", disallowed_special=()), 128009]


def meta_cut(text: str, longest: int = 25_000) -> list[str]:
    """The published way to keep runs short, character by character."""
    pieces, start, length, blank = [], 0, 0, text[:1].isspace()
    for at, character in enumerate(text):
        if character.isspace() != blank:
            length, blank = 1, not blank
        elif (length := length + 1) > longest:
            pieces.append(text[start:at])
            start, length = at, 1
    return [*pieces, text[start:]]


@pytest.mark.parametrize("text", ["a" * 80_001, " " * 60_000 + "ab" * 30_000 + " c", "x " + "é" * 25_000, "y" * 25_001])
def test_long_runs_are_cut_where_meta_cuts(text: str) -> None:
    assert ours().encode(text) == [i for piece in meta_cut(text) for i in theirs().encode_ordinary(piece)]


def test_a_text_beyond_the_librarys_limit() -> None:
    text = "one two " * 60_000  # 480,000 characters
    ids = ours().encode(text)
    assert ids == theirs().encode_ordinary(text[:400_000]) + theirs().encode_ordinary(text[400_000:])


# files of our own -------------------------------------------------------------------------------------------------

BYTES = [bytes([byte]) for byte in range(256)]


def write(tmp_path: Path, lines: list[bytes]) -> TokenizerSource:
    (tmp_path / "tokenizer.model").write_bytes(b"".join(lines))
    return TokenizerSource("folder", tmp_path)


def lines(tokens: list[bytes]) -> list[bytes]:
    return [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)]


def test_a_small_file(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("T")
    tokenizer = open_tokenizer(write(tmp_path, lines([*BYTES, b"he", b"hel"])), 514)
    assert tokenizer.encode("hell") == [257, 108]
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.chat_template) == (514, 258, "T")
    with pytest.raises(CheckpointError, match="has only 513 rows"):
        open_tokenizer(TokenizerSource("folder", tmp_path), 513)


GOOD = lines([*BYTES, b"ab"])
WRONG = {
    "a byte missing": GOOD[:255],
    "a rank twice": [*GOOD[:256], b"YWI= 255\n"],
    "a rank left out": [*GOOD[:256], b"YWI= 257\n"],
    "a token twice": [*GOOD, b"YWI= 257\n"],
    "no rank": [*GOOD, b"YWI=\n"],
    "no base64": [*GOOD, b"Y=I= 257\n"],
    "bad padding": [*GOOD, b"YWI 257\n"],
    "a negative rank": [*GOOD, b"YWI= -1\n"],
    "a huge rank": [*GOOD, b"YWI= 99999999999999999999\n"],
    "a huge token": [*GOOD, base64.b64encode(b"a" * 5000) + b" 257\n"],
    "other text": [*GOOD, b"<html>\n"],
    "nothing": [],
    "html": [b"<!DOCTYPE html>\n"],
    "a pointer of git-lfs": [b"version https://git-lfs.github.com/spec/v1\n"],
}


@pytest.mark.parametrize("content", WRONG.values(), ids=WRONG.keys())
def test_files_that_are_wrong(tmp_path: Path, content: list[bytes]) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.model"):
        open_tokenizer(write(tmp_path, content), 1000)
