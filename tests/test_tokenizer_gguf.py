"""Vocabularies inside GGUF files against the ids that llama.cpp's own vocabulary files come with."""

from __future__ import annotations

import json
import logging
from functools import lru_cache
from pathlib import Path

import pytest
import regex  # type: ignore[import-untyped]
from tokenizers import Regex, pre_tokenizers

from backend.checkpoint.gguf_header import read_header
from backend.errors import CheckpointError
from backend.tokenizer.base import Tokenizer
from backend.tokenizer.open import open_tokenizer
from backend.tokenizer.pretokenizers import PRE_TOKENIZERS
from backend.tokenizer.segments import Segment
from backend.tokenizer.source import TokenizerSource
from tests.material import llama_cpp_models, mistral_data

WITH_PAIRS = [
    "llama-spm", "llama-bpe", "gpt-2", "qwen2", "qwen35", "starcoder", "refact", "command-r", "deepseek-llm",
    "deepseek-coder", "falcon", "mpt", "phi-3",
]  # fmt: skip
END_IDS = {
    "llama-bpe": {128001, 128009}, "phi-3": {32000, 32007}, "qwen2": {151643, 151645}, "qwen35": {151643, 151645},
}  # fmt: skip


def gguf_source(name: str, **changes: object) -> TokenizerSource:
    path = llama_cpp_models() / f"ggml-vocab-{name}.gguf"
    metadata = read_header(path).metadata | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    return TokenizerSource("gguf", path, {key: value for key, value in metadata.items() if value is not None})


@lru_cache(maxsize=2)
def opened(name: str) -> Tokenizer:
    return open_tokenizer(gguf_source(name), 1 << 18)


def pairs(path: Path) -> list[tuple[str, list[int]]]:
    texts = Path(f"{path}.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    ids = [[int(token) for token in line.split()] for line in Path(f"{path}.out").read_text().splitlines()]
    return list(zip(texts, ids))


@pytest.mark.parametrize("name", WITH_PAIRS)
def test_ids_are_llama_cpps(name: str) -> None:
    expected = pairs(llama_cpp_models() / f"ggml-vocab-{name}.gguf")
    assert len(expected) >= 46
    tokenizer = opened(name)
    assert [(text, tokenizer.encode(text)) for text, _ in expected] == expected
    for text, ids in expected:
        spelt = b"".join(map(tokenizer.token_bytes, ids)).decode()
        assert spelt == (" " + text if tokenizer.adds_space_prefix and text else text)
    control = tokenizer.control_tokens()
    typed = "".join(control) + "a" + " ".join(control)
    assert not set(tokenizer.encode(typed)) & set(control.values()), "typed control tokens stay text"
    assert tokenizer.end_ids == END_IDS.get(name, {tokenizer.eos_id})


def test_llama_spm() -> None:
    tokenizer = opened("llama-spm")
    assert tokenizer.encode("Hello, world!") == [15043, 29892, 3186, 29991]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id, tokenizer.end_ids) == (1, 2, 0, {2})
    assert tokenizer.with_start([5]) == [1, 5], "BOS is on unless the file says otherwise"
    assert tokenizer.control_tokens() == {"<unk>": 0, "<s>": 1, "</s>": 2}
    assert tokenizer.description == "SentencePiece BPE, 32,000 pieces"
    assert tokenizer.adds_space_prefix
    assert [tokenizer.token_bytes(3 + byte) for byte in range(256)] == [bytes([byte]) for byte in range(256)]
    assert tokenizer.token_bytes(15043) == b" Hello"


def test_every_plain_piece_after_a_control_token_has_its_own_space() -> None:
    # As Meta's code, which encodes each turn by itself: BOS + enc("Hello") + EOS + BOS + enc("Hello").
    tokenizer = opened("llama-spm")
    begin, end = Segment("<s>", control=True), Segment("</s>", control=True)
    segments = [begin, Segment("Hello"), end, begin, Segment("Hel"), Segment("lo")]
    assert tokenizer.encode_segments(segments) == [1, 15043, 2, 1, 15043]


def test_keys_of_sentencepiece_files() -> None:
    plain = open_tokenizer(gguf_source("llama-spm", add_space_prefix=False, add_bos_token=False), 32000)
    assert plain.encode("Hello") == [10994]
    assert not plain.adds_space_prefix
    assert plain.with_start([5]) == [5]
    old = open_tokenizer(gguf_source("llama-spm", token_type=None, bos_token_id=None, eos_token_id=None), 32000)
    assert old.encode("Hello, 🙂") == opened("llama-spm").encode("Hello, 🙂")
    assert (old.bos_id, old.eos_id, old.control_tokens()) == (1, 2, {"<unk>": 0, "<s>": 1, "</s>": 2})


def test_a_missing_pre_tokenizer_is_said_aloud(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        tokenizer = open_tokenizer(gguf_source("gpt-2", pre=None), 1 << 18)
    assert "tokenizer.ggml.pre" in caplog.text
    # "default" keeps groups of three digits apart and cuts punctuation off, gpt-2 does neither.
    assert tokenizer.encode("1234") == tokenizer.encode("123") + tokenizer.encode("4")
    with pytest.raises(CheckpointError, match=r"'llama-bqe'.*did you mean 'llama-bpe'"):
        open_tokenizer(gguf_source("gpt-2", pre="llama-bqe"), 1 << 18)


def test_user_defined_tokens_match_in_text_and_control_tokens_do_not() -> None:
    source = gguf_source("gpt-2")
    tokens = [*source.metadata["tokenizer.ggml.tokens"], "<think>", "<|tool|>"]
    kinds = [*source.metadata["tokenizer.ggml.token_type"], 4, 4]
    tokenizer = open_tokenizer(gguf_source("gpt-2", tokens=tokens, token_type=kinds), 1 << 18)
    assert tokenizer.encode("a<think>b") == [*tokenizer.encode("a"), 50257, *tokenizer.encode("b")]
    assert tokenizer.token_bytes(50257) == b"<think>"
    assert tokenizer.control_tokens()["<|tool|>"] == 50258, "looks like a control token, so nobody may type it"
    assert 50258 not in tokenizer.encode("<|tool|>")


def test_the_tekken_expression_is_mistrals() -> None:
    pattern = json.loads((mistral_data() / "tekken_240911.json").read_bytes())["config"]["pattern"]
    ours = pre_tokenizers.Split(Regex(PRE_TOKENIZERS["tekken"].splits[0]), "isolated")
    texts = [text for text, _ in pairs(llama_cpp_models() / "ggml-vocab-llama-bpe.gguf") if text]
    assert [[piece for piece, _ in ours.pre_tokenize_str(text)] for text in texts] == [
        regex.findall(pattern, text) for text in texts
    ]


def test_every_expression_compiles() -> None:
    for name, pre in PRE_TOKENIZERS.items():
        for pattern in pre.splits:
            pieces = pre_tokenizers.Split(Regex(pattern), "isolated").pre_tokenize_str("Hello  world's 1234 漢字!\n")
            assert "".join(piece for piece, _ in pieces) == "Hello  world's 1234 漢字!\n", name
