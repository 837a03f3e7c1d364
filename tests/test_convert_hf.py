"""convert to a Hugging Face folder: transformers opens it and computes the same; to HF and back is bit-equal."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from backend.checkpoint.open import open_checkpoint
from backend.convert.hf_config import scaling_of_divisors
from backend.convert.output import ConvertError
from backend.model.config import ModelConfig, RopeScaling
from tests.commandline import command
from tests.hffiles import tiny_hf
from tests.metafiles import MetaModel, write_meta
from tests.oracle import reference_logits, reference_model
from tests.test_convert_gguf import _spm
from tests.test_convert_vocab import byte_level_folder
from tests.tiny import TinyModel, tokens, write_tiny

IDS = [5, 9, 17, 33, 200]


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_computes_the_same_from_a_gguf_source(tmp_path: Path, tied: bool) -> None:
    source = write_tiny(tmp_path / "tiny.gguf", TinyModel(tied=tied, weights="Q8_0"))
    assert command("convert", source, tmp_path / "hf", "--type", "f32") == 0
    model = LlamaForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager")
    expected = reference_model(source)
    for name, values in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], values), name
    assert torch.equal(reference_logits(model, IDS), reference_logits(expected, IDS))
    written = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert written["rms_norm_eps"] == 1e-5
    assert written["tie_word_embeddings"] is tied
    assert (written["bos_token_id"], written["eos_token_id"]) == (1, 2)
    assert ("lm_head.weight" in load_file(tmp_path / "hf" / "model.safetensors")) is not tied


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_to_gguf_and_back_is_bit_equal(tmp_path: Path, family: str) -> None:
    options = {"sliding_window": 8} if family == "mistral" else {}
    dtype = torch.bfloat16
    model = tiny_hf(tmp_path / "hf", family, vocab_size=len(tokens()), dtype=dtype, sharded=True, **options)
    byte_level_folder(tmp_path / "hf", "qwen2" if family == "qwen2" else "smollm")
    assert command("convert", tmp_path / "hf", tmp_path / "there.gguf") == 0
    assert command("convert", tmp_path / "there.gguf", tmp_path / "back", "--type", "bf16") == 0
    state = load_file(tmp_path / "back" / "model.safetensors")
    assert set(state) == set(model.state_dict())
    for name, values in model.state_dict().items():
        assert state[name].dtype == dtype
        assert torch.equal(state[name], values), name
    options = {"attn_implementation": "eager", "dtype": torch.float32}
    first, again = (AutoModelForCausalLM.from_pretrained(tmp_path / name, **options) for name in ("hf", "back"))
    assert type(again) is type(first)
    assert torch.equal(reference_logits(again, IDS), reference_logits(first, IDS))


def test_folder_to_folder_copies_the_tokenizer_and_splits_by_size(tmp_path: Path) -> None:
    model = tiny_hf(tmp_path / "hf", vocab_size=len(tokens()))
    byte_level_folder(tmp_path / "hf")
    (tmp_path / "hf" / "training_args.bin").write_bytes(b"secret")
    assert command("convert", tmp_path / "hf", tmp_path / "out", "--max-shard-size", "100KB") == 0
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) == 5
    found: dict[str, torch.Tensor] = {}
    for shard in shards:
        part = load_file(tmp_path / "out" / shard)
        assert sum(values.nbytes for values in part.values()) <= 100_000
        assert {name for name, home in index["weight_map"].items() if home == shard} == set(part)
        found |= part
    assert index["metadata"]["total_size"] == sum(values.nbytes for values in found.values())
    assert all(torch.equal(found[name], values) for name, values in model.state_dict().items())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()
    assert not (tmp_path / "out" / "training_args.bin").exists()
    # Written again as one file: no shard or index of before may stay.
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert command("convert", tmp_path / "hf", tmp_path / "out") == 2
    assert command("convert", tmp_path / "hf", tmp_path / "out", "--force") == 0
    names = os.listdir(tmp_path / "out")
    assert [name for name in names if name.startswith("model")] == ["model.safetensors"]
    assert "notes.txt" in names
    assert sorted(os.listdir(tmp_path)) == ["hf", "out"]


def test_meta_to_hugging_face(tmp_path: Path) -> None:
    """Interleaved rows become half split; transformers' own answer equals ours on the Meta folder."""
    written = write_meta(tmp_path / "meta", MetaModel(vocab_size=288), 2)
    _spm(tmp_path / "meta" / "tokenizer.model", 288)
    assert command("convert", tmp_path / "meta", tmp_path / "hf") == 0
    state = load_file(tmp_path / "hf" / "model.safetensors")
    query = written["layers.1.wq"]
    expected = query.view(8, 4, 2, 64).transpose(1, 2).reshape(64, 64)  # heads, pairs, halves, columns
    assert torch.equal(state["model.layers.1.self_attn.q_proj.weight"], expected)
    assert torch.equal(state["model.layers.1.self_attn.v_proj.weight"], written["layers.1.wv"])
    model = LlamaForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager", dtype=torch.float32)
    assert model.config.vocab_size == 288
    ours = (tmp_path / "hf" / "tokenizer.model").read_bytes()
    assert ours == (tmp_path / "meta" / "tokenizer.model").read_bytes()
    assert "tokenizer_config.json" in os.listdir(tmp_path / "hf")


def test_a_sentencepiece_vocabulary_inside_gguf_becomes_tokenizer_model(tmp_path: Path) -> None:
    write_meta(tmp_path / "meta", MetaModel(vocab_size=288), 1)
    _spm(tmp_path / "meta" / "tokenizer.model", 288)
    assert command("convert", tmp_path / "meta", tmp_path / "one.gguf") == 0
    assert command("convert", tmp_path / "one.gguf", tmp_path / "hf") == 0
    ours = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "hf" / "tokenizer.model"))
    first = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "meta" / "tokenizer.model"))
    assert [ours.id_to_piece(i) for i in range(288)] == [first.id_to_piece(i) for i in range(288)]
    assert ours.encode("p1 p2 é") == first.encode("p1 p2 é")


def test_frequencies_become_the_formula_again(tmp_path: Path) -> None:
    config = ModelConfig(architecture="llama", name="", dim=64, n_layers=1, n_heads=1, n_kv_heads=1, head_dim=64,
                         ffn_dim=64, vocab_size=8, context=8, norm_eps=1e-5, rope_theta=500000.0)  # fmt: skip
    for factor in (8.0, 32.0):
        scaling = RopeScaling("llama3", factor)
        table = torch.tensor(scaling.divisors(64, 500000.0)).tolist()
        assert scaling_of_divisors(table, config) == scaling
    assert scaling_of_divisors([1.0] * 32, config) is None
    assert scaling_of_divisors([4.0] * 32, config) == RopeScaling("linear", 4.0)
    with pytest.raises(ConvertError, match="no formula"):
        scaling_of_divisors([1.0 + i for i in range(32)], config)
    odd = write_tiny(tmp_path / "tiny.gguf", TinyModel(rope_freqs=True))
    assert open_checkpoint(odd).tensors["rope_freqs"]
    assert command("convert", odd, tmp_path / "hf") == 2


@pytest.mark.parametrize("place", ["hf/inside", "hf/model.safetensors", "."])
def test_the_source_is_never_written_to(tmp_path: Path, place: str) -> None:
    tiny_hf(tmp_path / "hf", vocab_size=len(tokens()))
    byte_level_folder(tmp_path / "hf")
    before = {file.name: file.read_bytes() for file in (tmp_path / "hf").iterdir()}
    assert command("convert", tmp_path / "hf", tmp_path / place, "--force", "--to", "hf") == 2
    assert {file.name: file.read_bytes() for file in (tmp_path / "hf").iterdir()} == before


@pytest.mark.parametrize("arguments", [("--type", "q8_0"), ("--vocab-only",), ("--max-shard-size", "five")])
def test_what_a_folder_cannot_be(
    tmp_path: Path, arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_tiny(tmp_path / "tiny.gguf", TinyModel())
    assert command("convert", source, tmp_path / "hf", *arguments) == 2
    assert capsys.readouterr().err.startswith("suri: ")
    assert os.listdir(tmp_path) == ["tiny.gguf"]
