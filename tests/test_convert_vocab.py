"""Vocabularies on their way from file to file: the same ids by sentencepiece and tokenizers, the same merges."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers

from backend.checkpoint.gguf_header import read_header
from backend.checkpoint.open import open_checkpoint
from backend.convert.hf_tokenizer import tokenizer_files
from backend.convert.vocab import vocabulary_keys
from backend.convert.vocab_json import QWEN2_SPLIT
from backend.errors import CheckpointError
from backend.tokenizer.modelproto import parse_model, serialized
from backend.tokenizer.source import TokenizerSource
from tests.commandline import command
from tests.hffiles import tiny_hf
from tests.material import llama2_json, llama3_ranks, llama_cpp_models, mistral_data
from tests.tiny import CHAT_TEMPLATE, CONTROL, MERGES, TinyModel, tokens, write_tiny

TEXTS = ["Hello, world!", "  two  spaces\n\nand lines", "naïve café 12345 θ 漢字 🙂", "'s I'll  don't", "a" * 50, ""]


def byte_level_folder(folder: Path, kind: str = "smollm", **settings: object) -> None:
    """tokenizer.json as the tokenizers library itself writes it, with the vocabulary of the tiny models."""
    vocabulary = {token: number for number, token in enumerate(tokens())}
    pairs = [tuple(merge.split(" ")) for merge in MERGES]
    library = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    if kind == "qwen2":
        first = pre_tokenizers.Split(Regex(QWEN2_SPLIT), "isolated")
        second = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    else:
        first = pre_tokenizers.Digits(individual_digits=True)
        second = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.pre_tokenizer = pre_tokenizers.Sequence([first, second])
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(list(CONTROL))
    library.save(str(folder / "tokenizer.json"))
    told = {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}, "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(told | settings))


def keys_of(folder: Path, size: int) -> dict:
    return vocabulary_keys(TokenizerSource("folder", folder), size)


def test_byte_level_json_to_gguf(tmp_path: Path) -> None:
    byte_level_folder(tmp_path)
    found = keys_of(tmp_path, len(tokens()) + 3)
    assert found["tokenizer.ggml.model"] == "gpt2"
    assert found["tokenizer.ggml.pre"] == "smollm"
    assert found["tokenizer.ggml.tokens"] == [*tokens(), *(f"[PAD{len(tokens()) + n}]" for n in range(3))]
    assert found["tokenizer.ggml.token_type"] == [3, 3, 3, *[1] * (len(tokens()) - 3), 5, 5, 5]
    assert found["tokenizer.ggml.merges"] == list(MERGES)
    assert (found["tokenizer.ggml.bos_token_id"], found["tokenizer.ggml.eos_token_id"]) == (1, 2)
    assert found["tokenizer.ggml.add_bos_token"] is False
    assert found["tokenizer.chat_template"] == CHAT_TEMPLATE


def test_a_split_nobody_knows_is_an_error(tmp_path: Path) -> None:
    byte_level_folder(tmp_path, "qwen2")
    file = tmp_path / "tokenizer.json"
    assert keys_of(tmp_path, len(tokens()))["tokenizer.ggml.pre"] == "qwen2"
    document = json.loads(file.read_text())
    document["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\w+|\s"
    file.write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match="no pre-tokenizer known"):
        keys_of(tmp_path, len(tokens()))


@pytest.mark.parametrize("change", [{"model": 5}, {"model": {"type": "WordPiece", "vocab": {}}}, {"added_tokens": [{}]},
                                    {"model": {"type": "BPE", "vocab": {"a": 10**12}, "merges": []}},
                                    {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b c"]}}])  # fmt: skip
def test_damaged_json_is_one_sentence(tmp_path: Path, change: dict) -> None:
    byte_level_folder(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        keys_of(tmp_path, len(tokens()))


def test_half_a_character_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_hf(tmp_path / "hf", vocab_size=len(tokens()))
    byte_level_folder(tmp_path / "hf", chat_template="\ud800")
    assert command("convert", tmp_path / "hf", tmp_path / "out.gguf") == 2
    assert "no UTF-8 form" in capsys.readouterr().err


def test_sentencepiece_file_to_gguf_and_back() -> None:
    """A real vocabulary: every piece, score and type as the library reads them, and the same ids from what we write."""
    path = next(mistral_data().rglob("tokenizer.model.v1"))
    model = parse_model(path, path.read_bytes())
    kinds = [piece.kind for piece in model.pieces]
    library = sentencepiece.SentencePieceProcessor(model_file=str(path))
    size = library.vocab_size()
    assert model.texts() == [library.id_to_piece(i) for i in range(size)]
    assert [piece.score for piece in model.pieces] == [library.get_score(i) for i in range(size)]
    for kind, ask in ((2, library.is_unknown), (3, library.is_control), (5, library.is_unused), (6, library.is_byte)):
        assert [i for i in range(size) if kinds[i] == kind] == [i for i in range(size) if ask(i)]
    again = sentencepiece.SentencePieceProcessor(model_proto=serialized(model))
    for text in TEXTS:
        assert again.encode(text) == library.encode(text)
        assert again.decode(again.encode(text)) == library.decode(library.encode(text))
    assert (again.unk_id(), again.bos_id(), again.eos_id(), again.pad_id()) == (0, 1, 2, -1)


def test_added_tokens_of_a_sentencepiece_folder(tmp_path: Path) -> None:
    data = next(mistral_data().rglob("tokenizer.model.v1")).read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(data)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"[PAD]": 32000, "<too far>": 32005}))
    found = keys_of(tmp_path, 32002)
    assert found["tokenizer.ggml.tokens"][32000:] == ["[PAD]", "[PAD32001]"]
    assert found["tokenizer.ggml.token_type"][32000:] == [3, 5]
    assert len(found["tokenizer.ggml.scores"]) == 32002
    assert found["tokenizer.ggml.add_space_prefix"] is True


@pytest.mark.parametrize("cut", [1, 5, 1000, -1])
def test_a_cut_sentencepiece_file(tmp_path: Path, cut: int) -> None:
    data = next(mistral_data().rglob("tokenizer.model.v1")).read_bytes()[:cut]
    with pytest.raises(CheckpointError):
        parse_model(tmp_path / "tokenizer.model", data)


def test_sentencepiece_inside_tokenizer_json(tmp_path: Path) -> None:
    """Scores made from the order of merges join the same pairs."""
    path = next(llama2_json().rglob("tokenizer.json"))
    (tmp_path / "tokenizer.json").write_bytes(path.read_bytes())
    found = keys_of(tmp_path, 32000)
    assert found["tokenizer.ggml.model"] == "llama"
    (tmp_path / "again").mkdir()
    written = tokenizer_files(found)["tokenizer.model"]
    ours = sentencepiece.SentencePieceProcessor(model_proto=written)
    library = tokenizers.Tokenizer.from_file(str(path))
    for text in TEXTS[:-1]:
        assert ours.encode(text) == library.encode(text, add_special_tokens=False).ids


def test_ranks_become_the_merges_of_the_published_file(tmp_path: Path) -> None:
    """The first tenth of Llama 3's ranks: merges equal those that llama.cpp's converter derived from the whole file."""
    lines = llama3_ranks().read_bytes().splitlines()[:12000]
    (tmp_path / "tokenizer.model").write_bytes(b"\n".join(lines) + b"\n")
    found = keys_of(tmp_path, 12256)
    told = read_header(next(llama_cpp_models().rglob("ggml-vocab-llama-bpe.gguf"))).metadata
    theirs = told["tokenizer.ggml.tokens"]
    assert found["tokenizer.ggml.tokens"][:12000] == theirs[:12000]
    merges = set(told["tokenizer.ggml.merges"])
    assert len(found["tokenizer.ggml.merges"]) > 11000
    assert set(found["tokenizer.ggml.merges"]) <= merges
    assert found["tokenizer.ggml.pre"] == "llama-bpe"
    assert found["tokenizer.ggml.tokens"][12009] == "<|eot_id|>"
    assert found["tokenizer.ggml.eot_token_id"] == 12009


@pytest.mark.parametrize("pre", ["smollm", "llama-bpe", "qwen2", "gpt-2"])
def test_gguf_to_tokenizer_json(tmp_path: Path, pre: str) -> None:
    """The library reads what we write, and it becomes the same keys again."""
    source = write_tiny(tmp_path / "tiny.gguf", TinyModel(metadata={"tokenizer.ggml.pre": pre}))
    assert command("convert", source, tmp_path / "out") == 0
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert library.encode("<|im_end|>").ids == [2]
    assert library.decode(library.encode("hello  wörld 42").ids) == "hello  wörld 42"
    assert library.encode("hello world").tokens == ["hello", "Ġworld"]
    found = vocabulary_keys(open_checkpoint(tmp_path / "out").tokenizer, len(tokens()))
    original = open_checkpoint(source).tokenizer.metadata
    for key in ("model", "pre", "tokens", "token_type", "merges", "bos_token_id", "eos_token_id", "add_bos_token"):
        assert found[f"tokenizer.ggml.{key}"] == original[f"tokenizer.ggml.{key}"]
    assert found["tokenizer.chat_template"] == original["tokenizer.chat_template"]


def test_llamas_own_vocabulary_from_gguf_gives_the_golden_ids(tmp_path: Path) -> None:
    """llama.cpp's 46 pairs, by sentencepiece and by tokenizers from the files we write."""
    path = next(llama_cpp_models().rglob("ggml-vocab-llama-spm.gguf"))
    files = tokenizer_files(dict(read_header(path).metadata))
    library = sentencepiece.SentencePieceProcessor(model_proto=files["tokenizer.model"])
    fast = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
    texts = path.with_name(path.name + ".inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    wanted = [
        [int(word) for word in line.split()] for line in path.with_name(path.name + ".out").read_text().splitlines()
    ]
    assert len(wanted) == 46
    for text, ids in zip(texts, wanted):  # an empty text follows the last separator
        assert library.encode(text) == ids
        assert fast.encode(text, add_special_tokens=False).ids == ids
    assert fast.encode("Hello").ids[0] == 1
