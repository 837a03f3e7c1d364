"""`tokenizer.json` against transformers, which reads the same file by itself."""

from __future__ import annotations

import copy
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from backend.errors import CheckpointError
from backend.tokenizer.open import open_tokenizer
from backend.tokenizer.segments import Segment
from backend.tokenizer.source import TokenizerSource
from tests.material import llama2_json, mistral_data

TEXTS = [
    "",
    " ",
    "  a  b ",
    "Hello, world!",
    "\n\t x",
    "123456",
    "🙂👩‍👩‍👧",
    "漢字かな한글",
    "a\x00\x7f",
    "\ufeff",
    "word " * 50,
]


@lru_cache(maxsize=1)
def llama2() -> tuple[Any, PreTrainedTokenizerFast]:
    folder = llama2_json()
    return (
        open_tokenizer(TokenizerSource("folder", folder), 32000),
        PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json")),
    )


@settings(max_examples=200, deadline=None)
@given(text=st.one_of(st.text(), st.text(alphabet=" ▁\n'sa1é漢🙂<>")))
def test_llama_2_ids_are_those_of_transformers(text: str) -> None:
    ours, theirs = llama2()
    assume(not any(token in text for token in ours.control_tokens()))  # which are text here and ids there
    ids = ours.encode(text)
    assert ids == theirs.encode(text, add_special_tokens=False)
    assert b"".join(map(ours.token_bytes, ids)).decode() == (" " + text.replace("▁", " ") if text else "")


def test_ids_of_tokenizer_json_and_tokenizer_model_are_equal() -> None:
    # The package is named after Llama 2, but the vocabulary in it is that of Mistral 7B.
    theirs = SentencePieceProcessor(str(mistral_data() / "tokenizer.model.v1"))
    texts = [*TEXTS, "def f(x):\n    return x ** 2", "Привет, мир!", "The quick brown fox didn't jump 12 times."]
    assert [llama2()[0].encode(text) for text in texts] == [theirs.encode(text) for text in texts]


def test_llama_2() -> None:
    ours, theirs = llama2()
    assert ours.with_start(ours.encode("a")) == theirs.encode("a")
    assert (ours.bos_id, ours.eos_id, ours.unk_id, ours.end_ids) == (1, 2, 0, {2})
    assert ours.control_tokens() == {"<unk>": 0, "<s>": 1, "</s>": 2}
    assert not {0, 1, 2} & set(ours.encode("<s>a</s><unk> </s>"))
    assert ours.adds_space_prefix
    assert ours.chat_template is None or "{" in ours.chat_template
    end = Segment("</s>", control=True)
    hello = theirs.encode("Hello", add_special_tokens=False)
    assert len(hello) == 1
    assert ours.encode_segments([Segment("Hello"), end, Segment("Hello")]) == [*hello, 2, *hello]


# files made here by the library -----------------------------------------------------------------------------------

CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "hello world, hello worlds 1234 5678",
    "don't we'll they'd",
] * 3
SPECIAL = ["<|begin|>", "<|eot_id|>"]
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@lru_cache(maxsize=8)
def made(kind: str) -> str:
    """A tokenizer.json as models of this kind have it."""
    byte_level = kind == "llama3"
    model = models.BPE(
        unk_token=None if byte_level else "<unk>", byte_fallback=not byte_level, ignore_merges=byte_level
    )
    tokenizer = Tokenizer(model)
    if byte_level:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(SPLIT), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
        )
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        special = SPECIAL
    else:
        if kind == "prepend":
            tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        else:
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        alphabet = []
        special = ["<unk>", *SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False, max_token_length=12
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", 0 if byte_level else 1)]
    )
    tokenizer.add_tokens([AddedToken("<think>", special=False, normalized=False), AddedToken("[x]", special=False)])
    content = json.loads(tokenizer.to_str())
    if not byte_level:  # byte tokens are no added tokens in published files
        content["added_tokens"] = [entry for entry in content["added_tokens"] if not entry["content"].startswith("<0x")]
    return json.dumps(content)


def write(tmp_path: Path, content: str, **files: Any) -> TokenizerSource:
    (tmp_path / "tokenizer.json").write_text(content, encoding="utf-8")
    for name, value in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    return TokenizerSource("folder", tmp_path)


@pytest.mark.parametrize("kind", ["llama3", "prepend", "always", "first", "never"])
def test_kinds_of_files(tmp_path: Path, kind: str) -> None:
    ours = open_tokenizer(write(tmp_path, made(kind), tokenizer_config={"bos_token": "<|begin|>"}), 1000)
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    texts = [*TEXTS, "hello<think>world [x] don't", "1234 5678"]
    expected = [theirs.encode(text, add_special_tokens=False) for text in texts]
    assert [ours.encode(text) for text in texts] == expected
    assert ours.with_start(ours.encode("hello")) == theirs.encode("hello"), "the template puts the begin token in front"
    assert ours.end_ids == {ours.control_tokens()["<|eot_id|>"]}
    assert not set(ours.encode("<|eot_id|>a<|begin|>")) & set(ours.control_tokens().values())
    spelt = b"".join(map(ours.token_bytes, ours.encode("hello 🙂 don't"))).decode()
    assert spelt == (" " if ours.adds_space_prefix else "") + "hello 🙂 don't"
    # A prompt in parts: the library reads the same prompt as one text.
    begin, end = Segment("<|begin|>", control=True), Segment("<|eot_id|>", control=True)
    prompt = [begin, Segment("hello world"), end, Segment("the dog")]
    whole = theirs.encode("<|begin|>hello world<|eot_id|>the dog", add_special_tokens=False)
    assert ours.encode_segments(prompt) == whole


def test_ends_and_beginnings_from_the_files_beside(tmp_path: Path) -> None:
    files = {"config": {"bos_token_id": 0, "eos_token_id": [5, 6, -1, 10**6]}, "generation_config": {"eos_token_id": 7}}
    ours = open_tokenizer(write(tmp_path, made("llama3"), **files, tokenizer_config={"add_bos_token": False}), 1000)
    assert ours.end_ids == {1, 5, 6, 7}
    assert (ours.bos_id, ours.with_start([9])) == (0, [9])


def test_tokens_beyond_the_models_rows(tmp_path: Path) -> None:
    content = json.loads(made("llama3"))
    rows = max(content["model"]["vocab"].values()) + 1
    content["added_tokens"].append({"id": rows + 50, "content": "<pad>", "special": True})
    content["added_tokens"] = [entry for entry in content["added_tokens"] if entry["content"] not in ("<think>", "[x]")]
    source = write(tmp_path, json.dumps(content))
    assert open_tokenizer(source, rows).vocab_size == rows
    assert open_tokenizer(source, rows + 51).control_tokens()["<pad>"] == rows + 50
    with pytest.raises(CheckpointError, match="has only"):
        open_tokenizer(source, rows - 1)


def test_the_warning_of_a_token_left_out_does_nothing_to_a_terminal(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content = json.loads(made("llama3"))
    content["added_tokens"].append({"id": 900, "content": "\x1b[2J" + "x" * 5000, "special": True})
    open_tokenizer(write(tmp_path, json.dumps(content)), 800)
    (record,) = caplog.records
    assert record.getMessage().isprintable()
    assert r"\x1b[2Jxxx" in record.getMessage()
    assert len(record.getMessage()) < 300 + len(str(tmp_path))


def changed(*path: str | int, value: Any) -> dict[str, Any]:
    content = copy.deepcopy(json.loads(made("llama3")))
    place = content
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return content


WRONG: dict[str, tuple[tuple[str | int, ...], Any]] = {
    "no model": (("model",), None),
    "unigram": (("model", "type"), "Unigram"),
    "type a list": (("model", "type"), ["BPE"]),
    "no vocabulary": (("model", "vocab"), {}),
    "vocabulary a list": (("model", "vocab"), ["a"]),
    "an id twice": (("model", "vocab", "zz"), 5),
    "an id negative": (("model", "vocab", "zz"), -1),
    "an id huge": (("model", "vocab", "zz"), 1 << 40),
    "an id a bool": (("model", "vocab", "zz"), True),
    "merges a text": (("model", "merges"), "a b"),
    "a merge of three": (("model", "merges", 0), "a b c"),
    "a merge of numbers": (("model", "merges", 0), [1, 2]),
    "a merge of strangers": (("model", "merges", 0), ["qq", "zz"]),
    "a subword prefix": (("model", "continuing_subword_prefix"), "##"),
    "byte fallback a text": (("model", "byte_fallback"), "yes"),
    "unknown token a number": (("model", "unk_token"), 3),
    "added tokens a number": (("added_tokens",), 3),
    "an added token without id": (("added_tokens", 0), {"content": "x"}),
    "an added token of another id": (("added_tokens", 0, "id"), 77),
    "a normaliser with a table": (("normalizer",), {"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
    "a normaliser that is a list": (("normalizer",), []),
    "a normaliser without a type": (("normalizer",), {}),
    "a broken normaliser": (("normalizer",), {"type": "Replace"}),
    "normalisers without end": (("normalizer",), {"type": "Sequence", "normalizers": [{"type": "NFC"}] * 100}),
    "an unknown pre-tokenizer": (("pre_tokenizer",), {"type": "Custom"}),
    "a broken expression": (("pre_tokenizer", "pretokenizers", 0, "pattern"), {"Regex": "("}),
    "an expression of exponential time": (("pre_tokenizer", "pretokenizers", 0, "pattern"), {"Regex": "(a+)+$"}),
    "an expression that is a number": (("pre_tokenizer", "pretokenizers", 0, "pattern"), {"Regex": 3}),
    "an unknown decoder": (("decoder",), {"type": "WordPiece"}),
    "a decoder that replaces": (("decoder",), {"type": "Replace", "pattern": {"String": "a"}, "content": "b"}),
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG.keys())
def test_files_that_are_wrong(tmp_path: Path, change: tuple[tuple[str | int, ...], Any]) -> None:
    source = write(tmp_path, json.dumps(changed(*change[0], value=change[1])))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        open_tokenizer(source, 1000)


def test_what_has_nothing_to_do_with_encoding_is_left_behind(tmp_path: Path) -> None:
    content = json.loads(made("llama3"))
    content["padding"] = {"strategy": {"Fixed": 1 << 40}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                          "pad_type_id": 0, "pad_token": "x"}  # fmt: skip
    content["truncation"] = {"max_length": 1, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    content["model"]["dropout"] = 1.0
    plain = open_tokenizer(write(tmp_path, made("llama3")), 1000).encode("hello world")
    assert open_tokenizer(write(tmp_path, json.dumps(content)), 1000).encode("hello world") == plain
