"""open_checkpoint: what a path is, is decided by its bytes and by what lies beside it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from backend.checkpoint.open import config_alone, open_checkpoint
from backend.checkpoint.override import with_overrides
from backend.errors import CheckpointError
from tests.ggmlfiles import GGMLModel
from tests.gptqfiles import gptq_layer, quantise
from tests.hffiles import tiny_hf, write_adapter
from tests.metafiles import MetaModel, write_meta
from tests.tiny import TinyModel, write_tiny


def kind(path: Path) -> str:
    return open_checkpoint(path).format


def test_every_kind_by_its_bytes_and_not_its_name(tmp_path: Path) -> None:
    assert kind(write_tiny(tmp_path / "a.safetensors")) == "GGUF v3"
    assert kind(GGMLModel("ggjt", 1).write(tmp_path / "b.gguf")[0]).startswith("ggjt v1")
    write_meta(tmp_path / "meta", MetaModel(), 2)
    tiny_hf(tmp_path / "hf")
    tiny_hf(tmp_path / "bin", container="bin")
    assert kind(tmp_path / "meta") == "Meta, 2 shards"
    assert kind(tmp_path / "meta" / "params.json") == "Meta, 2 shards"
    assert kind(tmp_path / "meta" / "consolidated.01.pth") == "Meta, 2 shards"
    assert kind(tmp_path / "hf") == kind(tmp_path / "hf" / "config.json") == "Hugging Face safetensors"
    assert kind(tmp_path / "hf" / "model.safetensors") == "Hugging Face safetensors"
    assert kind(tmp_path / "bin") == "Hugging Face torch"


def test_a_folder_with_one_model_file(tmp_path: Path) -> None:
    write_tiny(tmp_path / "model.gguf")
    (tmp_path / "README.md").write_text("words")
    assert kind(tmp_path) == "GGUF v3"
    write_tiny(tmp_path / "other.gguf", TinyModel(seed=1))
    with pytest.raises(CheckpointError, match=r"holds 2 models \(model\.gguf, other\.gguf\); name the one to open"):
        open_checkpoint(tmp_path)


def test_a_folder_with_one_model_in_several_files(tmp_path: Path) -> None:
    GGMLModel("ggjt", 1, parts=1).write(tmp_path / "whole.bin")
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    GGMLModel("ggmf", 1, parts=2, dim=64).write(tmp_path / "ggml-model.bin")
    assert kind(tmp_path).startswith("ggmf")


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    cases = {
        "params.json": "has params.json but no weights",
        "config.json": "has config.json but no weights",
        "adapter_config.json": "is a LoRA adapter; open its model and give the adapter with --lora",
        "notes.txt": "holds no model known here; expected a GGUF or ggml file",
    }
    for number, (name, words) in enumerate(cases.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / name).write_text("{}")
        with pytest.raises(CheckpointError, match=words):
            open_checkpoint(folder)
    write_adapter(tmp_path / "lora", {"model.layers.0.self_attn.q_proj": (64, 64)})
    with pytest.raises(CheckpointError, match="LoRA adapter"):
        open_checkpoint(tmp_path / "lora")
    with pytest.raises(CheckpointError, match="there is no such file"):
        open_checkpoint(tmp_path / "absent")


def test_a_configuration_alone(tmp_path: Path) -> None:
    write_meta(tmp_path / "meta", MetaModel())
    tiny_hf(tmp_path / "hf")
    assert config_alone(tmp_path / "meta") is None
    assert config_alone(tmp_path / "hf") is None
    (tmp_path / "meta" / "consolidated.00.pth").unlink()
    (tmp_path / "hf" / "model.safetensors").unlink()
    for folder, name in ((tmp_path / "meta", "params.json"), (tmp_path / "hf", "config.json")):
        config = config_alone(folder)
        assert config is not None
        assert config == config_alone(folder / name)
        assert (config.dim, config.n_layers) == (64, 2)


# GPTQ as text-generation-webui lays it out ----------------------------------------------------------------------------


def gptq_state(folder: Path) -> dict[str, torch.Tensor]:
    """The tiny model's state, its linears in 4 bits, groups of 32; config.json stays in the folder."""
    model = tiny_hf(folder, dtype=torch.float16)
    (folder / "model.safetensors").unlink()
    state = {}
    for name, value in model.state_dict().items():
        if "_proj" in name:
            state |= gptq_layer(name.removesuffix(".weight"), quantise(value.float().numpy(), 4, 32))
        else:
            state[name] = value
    return state


def test_weights_beside_the_folder_of_their_configuration(tmp_path: Path) -> None:
    """models/NAME with config.json and tokenizer, models/NAME-4bit-32g.pt with the weights: either opens the model."""
    state = gptq_state(tmp_path / "llama-7b")
    file = tmp_path / "llama-7b-4bit-32g.pt"
    torch.save(state, file)
    by_folder, by_file = open_checkpoint(tmp_path / "llama-7b"), open_checkpoint(file)
    assert list(by_folder.files) == list(by_file.files) == [file]
    assert by_folder.config == by_file.config
    assert by_file.tokenizer.path == tmp_path / "llama-7b"
    assert "GPTQ 4-bit g32" in {info.format.name for info in by_file.tensors.values()}


def test_of_several_group_sizes_the_usual_one_is_opened(tmp_path: Path) -> None:
    state = gptq_state(tmp_path)
    torch.save(state, tmp_path / "4bit.pt")
    torch.save(state, tmp_path / "4bit-128g.pt")
    assert [file.name for file in open_checkpoint(tmp_path).files] == ["4bit-128g.pt"]


def test_one_file_alone_that_is_no_known_size(tmp_path: Path) -> None:
    torch.save(gptq_state(tmp_path / "model"), tmp_path / "strange-4bit.pt")
    shutil.rmtree(tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"put the model's config\.json beside this file"):
        open_checkpoint(tmp_path / "strange-4bit.pt")


# numbers that a file leaves out ---------------------------------------------------------------------------------------


def test_overrides(tmp_path: Path) -> None:
    plain = open_checkpoint(GGMLModel("ggjt", 3).write(tmp_path / "old.bin")[0])
    changed = with_overrides(plain, {"norm_eps": 1e-5, "rope_theta": 1e6, "rope_factor": 4.0, "context": 4096})
    assert (changed.config.norm_eps, changed.config.rope_theta, changed.config.context) == (1e-5, 1e6, 4096)
    assert changed.config.rope_scaling is not None
    assert (changed.config.rope_scaling.kind, changed.config.rope_scaling.factor) == ("linear", 4.0)
    assert torch.equal(changed.read("norm").float32(), plain.read("norm").float32())
    assert with_overrides(plain, {}) is plain
    write_meta(tmp_path / "meta", MetaModel(params={"use_scaled_rope": True, "rope_theta": 5e5}))
    scaled = with_overrides(open_checkpoint(tmp_path / "meta"), {"rope_factor": 32.0})
    assert scaled.config.rope_scaling is not None
    assert (scaled.config.rope_scaling.kind, scaled.config.rope_scaling.factor) == ("llama3", 32.0)
    own = open_checkpoint(write_tiny(tmp_path / "own.gguf", TinyModel(rope_freqs=True)))
    with pytest.raises(CheckpointError, match="has its own rope_freqs"):
        with_overrides(own, {"rope_factor": 2.0})
