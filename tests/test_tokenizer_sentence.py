"""SentencePiece: our reading of `tokenizer.model` against the library's own, on Mistral's and on models made here."""

from __future__ import annotations

import io
import json
import shutil
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from backend.errors import CheckpointError
from backend.tokenizer.base import Tokenizer
from backend.tokenizer.modelproto import parse_model, serialized
from backend.tokenizer.open import open_tokenizer
from backend.tokenizer.source import TokenizerSource
from tests.material import mistral_data

TEXTS = ["", " ", "   a  b ", "Hello, world!", "\n\n\t x", "1234567890", "🙂👩‍👩‍👧‍👦", "漢字かな한글", "</s><s><unk>",
         "<0x0A>", "▁x ▁", "a\x00b\x01\x7f", "\u200b\ufeff\u00a0", "é\u0301ﬁẞ", "\U0010ffff\ufffd",
         "word " * 300, " " * 100]  # fmt: skip
SPECIAL_TEXT = st.lists(
    st.sampled_from([" ", "  ", "▁", "<s>", "</s>", "\n", "é", "🙂", "漢", "1", "the", "<0x41>", "\x00", "a"])
)
ANY_TEXT = st.one_of(st.text(), SPECIAL_TEXT.map("".join))


@lru_cache(maxsize=2)
def mistral(name: str) -> tuple[Tokenizer, sentencepiece.SentencePieceProcessor]:
    path = mistral_data() / name
    folder = mistral_data().parent / f"as-{name}"
    folder.mkdir(exist_ok=True)
    if not (folder / "tokenizer.model").exists():
        shutil.copy(path, folder / "tokenizer.model")
    return open_tokenizer(TokenizerSource("folder", folder), 32768), sentencepiece.SentencePieceProcessor(str(path))


@settings(max_examples=400, deadline=None)
@given(text=ANY_TEXT)
def test_ids_are_sentencepieces(text: str) -> None:
    ours, theirs = mistral("tokenizer.model.v1")
    ids = ours.encode(text)
    assert ids == theirs.encode(text)
    spelt = b"".join(map(ours.token_bytes, ids)).decode()
    # A typed U+2581 becomes the space it stands for; that is how the vocabulary was made.
    assert spelt == (" " + text.replace("▁", " ") if text else "")


@pytest.mark.parametrize(
    "name",
    ["tokenizer.model.v1", "mistral_instruct_tokenizer_240323.model.v3", "mistral_instruct_tokenizer_241114.model.v7"],
)
def test_published_models(name: str) -> None:
    ours, theirs = mistral(name)
    assert [ours.encode(text) for text in TEXTS] == [theirs.encode(text) for text in TEXTS]
    assert (ours.bos_id, ours.eos_id, ours.unk_id) == (theirs.bos_id(), theirs.eos_id(), theirs.unk_id())
    assert ours.vocab_size == theirs.get_piece_size()
    assert set(ours.control_tokens().values()) == {
        i for i in range(ours.vocab_size) if theirs.is_control(i) or theirs.is_unknown(i)
    }
    assert not set(ours.encode("".join(ours.control_tokens()))) & set(ours.control_tokens().values())


def test_the_message_is_written_whole() -> None:
    path = mistral_data() / "tokenizer.model.v1"
    model = parse_model(path, path.read_bytes())
    assert parse_model(path, serialized(model)) == model


# models trained here ----------------------------------------------------------------------------------------------


@lru_cache(maxsize=8)
def trained(**options: Any) -> bytes:
    out = io.BytesIO()
    words = "the quick brown fox jumps over a lazy dog while hello worlds sing in 12 34 languages ".split()
    settings_ = {"vocab_size": 350, "model_type": "bpe", "byte_fallback": True, "hard_vocab_limit": False,
                 "normalization_rule_name": "identity", "remove_extra_whitespaces": False}  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(" ".join(words[i:] + words[:i]) for i in range(len(words))),
        model_writer=out,
        minloglevel=2,
        **(settings_ | options),
    )
    return out.getvalue()


def folder_with(tmp_path: Path, data: bytes, **files: Any) -> TokenizerSource:
    folder = tmp_path / "model"
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(data)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return TokenizerSource("folder", folder)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"model_type": "unigram"},
        {"add_dummy_prefix": False},
        {"remove_extra_whitespaces": True},
        {"byte_fallback": False, "vocab_size": 60},
        {"user_defined_symbols": "<think>,▁▁,abc", "control_symbols": "<|x|>,<end>"},
        {"unk_id": 3, "bos_id": 4, "eos_id": 5, "pad_id": 0},
        {"bos_id": -1},
    ],
    ids=str,
)
def test_settings_are_honoured(tmp_path: Path, options: dict[str, Any]) -> None:
    data = trained(**options)
    ours = open_tokenizer(folder_with(tmp_path, data), 400)
    theirs = sentencepiece.SentencePieceProcessor(model_proto=data)
    texts = [*TEXTS, "the <think>quick<|x|> fox  abc<end>", " leading and  double  "]
    assert [ours.encode(text) for text in texts] == [theirs.encode(text) for text in texts]
    assert ours.adds_space_prefix == options.get("add_dummy_prefix", True)
    assert ours.bos_id == (theirs.bos_id() if theirs.bos_id() >= 0 else None)
    assert ours.eos_id == theirs.eos_id()


@pytest.mark.parametrize("scores", [True, False])
def test_ggml_vocabularies(tmp_path: Path, scores: bool) -> None:
    """As the old converters wrote them: raw bytes, spaces as spaces, " \\u2047 " for unknown, nothing for control."""
    data = trained()
    theirs = sentencepiece.SentencePieceProcessor(model_proto=data)
    tokens = []
    for i in range(theirs.get_piece_size()):
        if theirs.is_unknown(i):
            tokens.append(" \u2047 ".encode())
        elif theirs.is_control(i):
            tokens.append(b"")
        elif theirs.is_byte(i):
            tokens.append(bytes([int(theirs.id_to_piece(i)[3:5], 16)]))
        else:
            tokens.append(theirs.id_to_piece(i).replace("▁", " ").encode())
    values = [theirs.get_score(i) for i in range(len(tokens))] if scores else None
    source = TokenizerSource("ggml", tmp_path / "old.bin", {"tokens": tokens, "scores": values})
    ours = open_tokenizer(source, len(tokens))
    assert [ours.encode(text) for text in TEXTS] == [theirs.encode(text) for text in TEXTS]
    assert ours.control_tokens() == {"<unk>": 0, "<s>": 1, "</s>": 2}
    assert (ours.with_start([7]), ours.end_ids) == ([1, 7], {2})


@pytest.mark.parametrize(
    "metadata",
    [{}, {"tokens": "abc"}, {"tokens": [b"a"]}, {"tokens": [b""] * 400, "scores": [0.0]},
     {"tokens": [b""] * 400, "scores": [float("nan")] * 400},
     {"tokens": ["a"] * 400}, {"tokens": [b"", b"", b"", b"\x01"]}],
)  # fmt: skip
def test_ggml_vocabularies_that_are_none(tmp_path: Path, metadata: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"old\.bin"):
        open_tokenizer(TokenizerSource("ggml", tmp_path / "old.bin", metadata), 400)


# what stands beside it --------------------------------------------------------------------------------------------


def test_added_tokens(tmp_path: Path) -> None:
    count = sentencepiece.SentencePieceProcessor(model_proto=trained()).get_piece_size()
    source = folder_with(
        tmp_path,
        trained(),
        added_tokens={"[PAD]": count, "[note]": count + 2},
        special_tokens_map={"pad_token": "[PAD]", "eos_token": {"content": "</s>"}},
        tokenizer_config={"added_tokens_decoder": {str(count + 3): {"content": "<|im_end|>", "special": False}}},
        generation_config={"eos_token_id": [2, count + 3]},
    )
    tokenizer = open_tokenizer(source, count + 4)
    assert tokenizer.vocab_size == count + 4
    assert tokenizer.control_tokens() == {"<unk>": 0, "<s>": 1, "</s>": 2, "[PAD]": count, "<|im_end|>": count + 3}
    assert not {count, count + 1, count + 3} & set(tokenizer.encode("a [PAD] b <|im_end|>"))
    assert count + 2 in tokenizer.encode("a[note]b")
    assert tokenizer.end_ids == {2, count + 3}
    assert open_tokenizer(source, count).vocab_size == count, "rows the model does not have"
    with pytest.raises(CheckpointError, match="has only"):
        open_tokenizer(source, count - 1)


NAMED = [{"name": "rag", "template": "R"}, {"name": "default", "template": "D"}]


@pytest.mark.parametrize(
    ("files", "template"),
    [
        ({"tokenizer_config.json": '{"chat_template": "A"}'}, "A"),
        ({"tokenizer_config.json": json.dumps({"chat_template": NAMED})}, "D"),
        ({"tokenizer_config.json": '{"chat_template": "A"}', "chat_template.jinja": "J"}, "J"),
        ({"chat_template.json": '{"chat_template": "C"}'}, "C"),
        ({}, None),
    ],
)  # fmt: skip
def test_chat_templates(tmp_path: Path, files: dict[str, str], template: str | None) -> None:
    source = folder_with(tmp_path, trained())
    for name, text in files.items():
        (source.path / name).write_text(text)
    assert open_tokenizer(source, 400).chat_template == template


def test_llama_1_keeps_the_tokenizer_one_level_up(tmp_path: Path) -> None:
    folder_with(tmp_path, trained())
    (tmp_path / "model" / "7B").mkdir()
    assert open_tokenizer(TokenizerSource("folder", tmp_path / "model" / "7B"), 400).encode("hello")


def test_a_folder_without_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json and tokenizer\.model"):
        open_tokenizer(TokenizerSource("folder", tmp_path / "a" / "b"), 400)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config", "{"), ("config", "[]"), ("config", '{"eos_token_id": "2"}'), ("config", '{"eos_token_id": [true]}'),
        ("tokenizer_config", '{"bos_token": 3}'), ("tokenizer_config", '{"add_bos_token": 1}'),
        ("tokenizer_config", '{"chat_template": 5}'), ("tokenizer_config", '{"added_tokens_decoder": {"-1": {}}}'),
        ("tokenizer_config", '{"added_tokens_decoder": []}'), ("added_tokens", '{"x": "y"}'),
        ("added_tokens", '{"x": 99999999999}'), ("special_tokens_map", '{"additional_special_tokens": 3}'),
        ("generation_config", "[" * 100_000), ("config", '{"a": NaN}'), ("config", "1" * 10_000),
        ("tokenizer_config", " " * (17 << 20)),
    ],
)  # fmt: skip
def test_side_files_that_are_wrong(tmp_path: Path, name: str, content: str) -> None:
    with pytest.raises(CheckpointError, match=rf"{name}\.json"):
        open_tokenizer(folder_with(tmp_path, trained(), **{name: content}), 400)


def test_a_normaliser_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nmt_nfkc"):
        open_tokenizer(folder_with(tmp_path, trained(normalization_rule_name="nmt_nfkc")), 400)
    with pytest.raises(CheckpointError, match="model type 4"):
        open_tokenizer(folder_with(tmp_path, trained(model_type="char", byte_fallback=False)), 400)
