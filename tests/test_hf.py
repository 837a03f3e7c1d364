"""Hugging Face folders: what transformers wrote is read bit for bit, and damaged folders get one sentence."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaModel

from backend.checkpoint import hf
from backend.checkpoint.base import TensorInfo
from backend.checkpoint.hf import HFCheckpoint, file_name
from backend.checkpoint.hf_config import hf_config
from backend.errors import CheckpointError
from backend.model.config import tensor_shapes
from backend.weights.blocks import BF16, F16, F32
from backend.weights.stored import Plain
from tests.hffiles import SIZES, change_json, randomize, tiny_hf, write_safetensors, write_torch

FORMATS = {torch.float32: F32, torch.float16: F16, torch.bfloat16: BF16, torch.float64: F32}


def check_equal(checkpoint: HFCheckpoint, state: dict[str, torch.Tensor]) -> None:
    """Every tensor the checkpoint says it has equals the state dict's, in every bit."""
    assert set(checkpoint.tensors) == set(tensor_shapes(checkpoint.config))
    for name, info in checkpoint.tensors.items():
        expected, stored = state[file_name(name)], checkpoint.read(name)
        assert isinstance(stored, Plain)
        assert stored.dtype == expected.dtype
        assert torch.equal(stored.values.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8)), name
        assert (info.shape, info.format, info.nbytes) == (
            tuple(expected.shape), FORMATS[expected.dtype], expected.nbytes)  # fmt: skip
        rows = stored.float32(1, 3) if len(info.shape) == 2 else stored.float32()
        assert torch.equal(rows, (expected[1:3] if len(info.shape) == 2 else expected).float())


# what is right ----------------------------------------------------------------------------------------------------

CASES: dict[str, dict[str, Any]] = {
    "llama": dict(family="llama"),
    "llama bf16, shards": dict(family="llama", dtype=torch.bfloat16, sharded=True),
    "llama tied": dict(family="llama", tied=True, dtype=torch.float16),
    "llama biases": dict(family="llama", attention_bias=True, mlp_bias=True),
    "llama float64, wide heads": dict(family="llama", dtype=torch.float64, head_dim=32, num_key_value_heads=4),
    "llama .bin": dict(family="llama", container="bin", dtype=torch.float16),
    "llama .bin, shards": dict(family="llama", container="bin", sharded=True),
    "llama .bin tied": dict(family="llama", container="bin", tied=True, dtype=torch.bfloat16),
    "mistral": dict(family="mistral", sliding_window=16, sharded=True),
    "mistral without window": dict(family="mistral", sliding_window=None),
    "qwen2": dict(family="qwen2", dtype=torch.bfloat16),
    "qwen2 tied, shards, window": dict(
        family="qwen2", tied=True, sharded=True, use_sliding_window=True, max_window_layers=0, sliding_window=32
    ),
    "qwen2 .bin": dict(family="qwen2", container="bin", sharded=True),
}
BIASES = {
    "llama biases": {"wq", "wk", "wv", "wo", "w1", "w2", "w3"},
    **{case: {"wq", "wk", "wv"} for case in CASES if case.startswith("qwen2")},
}
WINDOWS = {"mistral": 16, "qwen2 tied, shards, window": 32}


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_and_number_of_what_transformers_wrote(tmp_path: Path, case: str) -> None:
    model = tiny_hf(tmp_path, **CASES[case])
    checkpoint = HFCheckpoint(tmp_path)
    check_equal(checkpoint, model.state_dict())
    config, theirs = checkpoint.config, model.config
    assert config.architecture == CASES[case]["family"]
    assert (config.dim, config.n_layers, config.n_heads, config.n_kv_heads, config.ffn_dim, config.vocab_size) == (
        theirs.hidden_size, theirs.num_hidden_layers, theirs.num_attention_heads, theirs.num_key_value_heads,
        theirs.intermediate_size, theirs.vocab_size)  # fmt: skip
    assert config.head_dim == model.model.layers[0].self_attn.head_dim
    assert (config.norm_eps, config.context) == (theirs.rms_norm_eps, theirs.max_position_embeddings)
    assert (config.rope_theta, config.rope_scaling, config.rope_interleaved) == (10000.0, None, False)
    assert config.tied_output == CASES[case].get("tied", False)
    assert config.biases == BIASES.get(case, set())
    assert config.sliding_window == WINDOWS.get(case)
    assert hf_config(tmp_path) == hf_config(tmp_path / "config.json") == config, "the config alone says the same"
    assert (checkpoint.tokenizer.kind, checkpoint.tokenizer.path) == ("folder", tmp_path)
    shards = list(tmp_path.glob("*-of-*"))
    kind = "torch" if ".bin" in case else "safetensors"
    assert ("shards" in case or case == "mistral" or ".bin" in case) >= bool(shards)
    assert checkpoint.format == f"Hugging Face {kind}" + (f", {len(shards)} shards" if shards else "")
    assert sorted(checkpoint.files) == (sorted(shards) or [next(tmp_path.glob("*model.*[snb]"))])


def test_one_file_with_a_config_beside_it(tmp_path: Path) -> None:
    state = tiny_hf(tmp_path).state_dict()
    (tmp_path / "model.safetensors").rename(tmp_path / "my own.safetensors")
    for path in (tmp_path / "my own.safetensors", tmp_path):
        checkpoint = HFCheckpoint(path)
        check_equal(checkpoint, state)
        assert checkpoint.files == [tmp_path / "my own.safetensors"]
    assert HFCheckpoint(tmp_path / "my own.safetensors").tokenizer.path == tmp_path


def test_shards_without_an_index_and_one_of_them_pointed_at(tmp_path: Path) -> None:
    state = tiny_hf(tmp_path, sharded=True).state_dict()
    (tmp_path / "model.safetensors.index.json").unlink()
    first, *others = sorted(tmp_path.glob("*.safetensors"))
    check_equal(HFCheckpoint(tmp_path), state)
    checkpoint = HFCheckpoint(others[0])
    check_equal(checkpoint, state)
    assert checkpoint.files == [first, *others]
    first.unlink()
    for path in (tmp_path, others[0]):
        with pytest.raises(CheckpointError, match=f"shard 1 of {len(others) + 1} is missing"):
            HFCheckpoint(path)


def test_what_a_file_is_shows_in_its_bytes(tmp_path: Path) -> None:
    """A torch file and a safetensors file whose names say the opposite."""
    state = tiny_hf(tmp_path).state_dict()
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    check_equal(HFCheckpoint(tmp_path), state)
    (tmp_path / "pytorch_model.bin").unlink()
    write_torch(tmp_path, state)
    (tmp_path / "pytorch_model.bin").rename(tmp_path / "model.safetensors")
    check_equal(HFCheckpoint(tmp_path), state)


def test_other_files_of_a_training_folder_are_not_opened(tmp_path: Path) -> None:
    model = tiny_hf(tmp_path, container="bin", tied=True)
    for name in ("optimizer.pt", "scheduler.pt", "training_args.bin", "rng_state.pth", "adapter_model.bin"):
        (tmp_path / name).write_bytes(b"not for us")
    check_equal(HFCheckpoint(tmp_path), model.state_dict())
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match="holds no weights"):
        HFCheckpoint(tmp_path)


def test_names_of_a_bare_model(tmp_path: Path) -> None:
    model = LlamaModel(LlamaConfig(**SIZES, tie_word_embeddings=True))
    randomize(model, 0, 0.1)
    model.save_pretrained(tmp_path)
    checkpoint = HFCheckpoint(tmp_path)
    assert checkpoint.tensors["tok_embeddings"].name == "embed_tokens.weight"
    check_equal(checkpoint, {f"model.{name}": tensor for name, tensor in model.state_dict().items()})


def test_tables_that_old_versions_saved_are_passed_over(tmp_path: Path) -> None:
    model = tiny_hf(tmp_path)
    extra = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(8) for n in range(2)}
    extra |= {"model.rotary_emb.inv_freq": torch.ones(8), "model.layers.0.attn.masked_bias": torch.ones(())}
    write_safetensors(tmp_path / "model.safetensors", {**model.state_dict(), **extra})
    check_equal(HFCheckpoint(tmp_path), model.state_dict())


def test_the_stored_output_wins_over_tying(tmp_path: Path) -> None:
    model = tiny_hf(tmp_path, tied=True)
    state = dict(model.state_dict())
    write_safetensors(tmp_path / "model.safetensors", state)  # lm_head stored, equal: one table
    checkpoint = HFCheckpoint(tmp_path)
    assert checkpoint.config.tied_output
    check_equal(checkpoint, state)
    state["lm_head.weight"] = state["lm_head.weight"].clone()
    state["lm_head.weight"][-1, -1] += 1e-6
    write_safetensors(tmp_path / "model.safetensors", state)
    checkpoint = HFCheckpoint(tmp_path)
    assert not checkpoint.config.tied_output
    check_equal(checkpoint, state)
    change_json(tmp_path / "config.json", tie_word_embeddings=False)
    check_equal(HFCheckpoint(tmp_path), state)


def test_an_output_that_is_not_stored(tmp_path: Path) -> None:
    tiny_hf(tmp_path, tied=True)
    change_json(tmp_path / "config.json", tie_word_embeddings=...)
    assert HFCheckpoint(tmp_path).config.tied_output, "the config does not say, and there is no other output"
    change_json(tmp_path / "config.json", tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match=r"'lm_head\.weight' is missing"):
        HFCheckpoint(tmp_path)


def test_the_vocabulary_is_what_the_embedding_has(tmp_path: Path) -> None:
    tiny_hf(tmp_path)
    change_json(tmp_path / "config.json", vocab_size=150)
    assert HFCheckpoint(tmp_path).config.vocab_size == 160
    assert hf_config(tmp_path).vocab_size == 150


def test_keys_that_would_run_code_mean_nothing(tmp_path: Path) -> None:
    state = tiny_hf(tmp_path).state_dict()
    canary = tmp_path / "canary"
    (tmp_path / "modeling_evil.py").write_text(f"open({str(canary)!r}, 'w')\n")
    change_json(
        tmp_path / "config.json",
        auto_map={"AutoModelForCausalLM": "modeling_evil.Evil", "AutoConfig": "modeling_evil.Evil"},
        trust_remote_code=True, _attn_implementation_internal="modeling_evil.Evil", torch_dtype="os.system",
        custom_pipelines={"x": {"impl": "modeling_evil.Evil"}},
    )  # fmt: skip
    before = set(sys.modules)
    check_equal(HFCheckpoint(tmp_path), state)
    assert set(sys.modules) == before
    assert not canary.exists()


# damaged folders --------------------------------------------------------------------------------------------------


def _index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    file = folder / "model.safetensors.index.json"
    values = json.loads(file.read_text())
    change(values["weight_map"])
    file.write_text(json.dumps(values))


NORM = "model.norm.weight"
SHARD = "model-00001-of-00007.safetensors"
FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json: is missing"),
    "no weights": (lambda folder: [file.unlink() for file in folder.glob("model*")], "holds no weights"),
    "a shard is missing": (lambda folder: (folder / SHARD).unlink(), f"{SHARD}: is missing"),
    "a shard is damaged": (lambda folder: (folder / SHARD).write_bytes(b"\1" * 99), f"{SHARD}: the header claims"),
    "a shard outside": (
        lambda folder: _index(folder, lambda names: names.update({NORM: "../x"})), "no plain file name"),
    "an absolute shard": (
        lambda folder: _index(folder, lambda names: names.update({NORM: "/etc/passwd"})), "no plain file name"),
    "a Windows path": (lambda folder: _index(folder, lambda names: names.update({NORM: "a\\b"})), "no plain file name"),
    "the folder itself": (lambda folder: _index(folder, lambda names: names.update({NORM: "."})), "no plain file name"),
    "a shard that is a number": (lambda folder: _index(folder, lambda names: names.update({NORM: 5})), "no plain file"),
    "an empty index": (lambda folder: _index(folder, lambda names: names.clear()), "weight_map"),
    "a weight in another shard": (
        lambda folder: _index(folder, lambda names: names.update({"lm_head.weight": names[NORM]})), "'lm_head.weight'"),
    "a weight that is nowhere": (
        lambda folder: _index(folder, lambda names: names.update({"model.extra": SHARD})), "'model.extra'"),
    "a number of layers too many": (
        lambda folder: change_json(folder / "config.json", num_hidden_layers=3), "layers.2.input_layernorm.weight'"),
    "a layer too few": (
        lambda folder: change_json(folder / "config.json", num_hidden_layers=1), "is of layer 1"),
    "another width": (lambda folder: change_json(folder / "config.json", intermediate_size=97), "expected (97, 64)"),
    "quantisation settings that are none": (
        lambda folder: change_json(folder / "config.json", quantization_config=[1]), "quantization_config"),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLDERS)
def test_damaged_folders_are_refused_with_a_sentence(tmp_path: Path, case: str) -> None:
    tiny_hf(tmp_path, sharded=True)
    assert (tmp_path / SHARD).is_file()
    HFCheckpoint(tmp_path)
    damage, words = FOLDERS[case]
    damage(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        HFCheckpoint(tmp_path)
    assert words in caught.value.message
    assert str(tmp_path) in caught.value.message


BAD_TENSORS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"model.layers.0.self_attn.q_norm.weight": torch.ones(64)}, "'model.layers.0.self_attn.q_norm.weight'"),
    "unknown on top": ({"score.weight": torch.ones(2, 64)}, "'score.weight' is not part"),
    "a norm with a bias": ({"model.norm.bias": torch.ones(64)}, "'model.norm.bias'"),
    "missing": ({"model.layers.1.mlp.up_proj.weight": None}, "'model.layers.1.mlp.up_proj.weight' is missing"),
    "no embedding": ({"model.embed_tokens.weight": None}, "'model.embed_tokens.weight' is missing"),
    "flat embedding": ({"model.embed_tokens.weight": torch.ones(160 * 64)}, "has shape (10240,)"),
    "whole numbers": ({NORM: torch.ones(64, dtype=torch.int32)}, "stored as int32"),
    "turned": ({"model.layers.1.mlp.up_proj.weight": torch.ones(64, 96)}, "has shape (64, 96), expected (96, 64)"),
    "a scalar": ({NORM: torch.ones(())}, "has shape (), expected (64,)"),
    "empty": ({NORM: torch.ones(0)}, "has shape (0,), expected (64,)"),
    "twice, by two names": ({"norm.weight": torch.ones(64)}, "the same weight twice"),
    "a bias in one layer": ({"model.layers.1.mlp.up_proj.bias": torch.ones(96)}, "all layers must be alike"),
    "a layer number like no other": ({"model.layers.01.mlp.up_proj.weight": torch.ones(96, 64)}, "is not part"),
    "a name that clears the screen": ({"\x1b[2J": torch.ones(1)}, "\\x1b[2J"),
}


@pytest.mark.parametrize("container", ["safetensors", "bin"])
def test_tensors_that_do_not_fit_are_refused_by_name(tmp_path: Path, container: str) -> None:
    state = tiny_hf(tmp_path, container=container).state_dict()
    for changes, words in BAD_TENSORS.values():
        tensors = {name: tensor for name, tensor in {**state, **changes}.items() if tensor is not None}
        if container == "bin":
            write_torch(tmp_path, tensors)
        else:
            write_safetensors(tmp_path / "model.safetensors", tensors)
        with pytest.raises(CheckpointError) as caught:
            HFCheckpoint(tmp_path)
        assert words in caught.value.message
        assert caught.value.message.isprintable()


def test_a_weight_in_two_files_is_refused(tmp_path: Path) -> None:
    tiny_hf(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "a.safetensors")
    write_safetensors(tmp_path / "b.safetensors", {NORM: torch.ones(64)})
    with pytest.raises(
        CheckpointError, match=r"b\.safetensors: tensor 'model\.norm\.weight' is also in a\.safetensors"
    ):
        HFCheckpoint(tmp_path)


# quantised linears are another reader's; here, that it is asked and what becomes of its answer -----------------------


@pytest.mark.parametrize("sign", ["config", "file", "names"])
def test_quantised_linears_come_from_their_own_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sign: str
) -> None:
    state = dict(tiny_hf(tmp_path).state_dict())
    linears = [name.removesuffix(".weight") for name in state if "_proj" in name]
    settings = {} if sign == "names" else {"quant_method": "gptq", "bits": 4}
    if sign == "config":
        change_json(tmp_path / "config.json", quantization_config=settings)
    if sign == "file":
        (tmp_path / "quantize_config.json").write_text(json.dumps(settings))
    for name in linears:
        weight = state.pop(name + ".weight")
        state[name + ".qweight"] = torch.zeros(weight.shape[1] // 8, weight.shape[0], dtype=torch.int32)
        state[name + ".bias"] = torch.zeros(weight.shape[0])
    for n in range(2):
        state[f"model.layers.{n}.self_attn.v_proj.bias"] = torch.full((32,), float(n))  # zero in one layer only
    write_safetensors(tmp_path / "model.safetensors", state)
    asked = []

    def quantized(path: Path, given: Any, config: Any, raws: Any) -> Any:
        asked.append((path, given, config.n_layers, sorted(raws)))
        shapes = {name: tuple(reversed(raws[name + ".qweight"].shape)) for name in linears}
        shapes = {name: (rows, words * 8) for name, (rows, words) in shapes.items()}
        return {
            name: (TensorInfo(name, shape, F16, 5), lambda shape=shape: Plain(torch.ones(shape)))
            for name, shape in shapes.items()
        }

    monkeypatch.setattr(hf, "quantized_tensors", quantized)
    checkpoint = HFCheckpoint(tmp_path)
    kept = [name for name in state if not name.endswith("_proj.bias") or "v_proj" in name]
    assert asked == [(tmp_path, settings, 2, sorted(kept))]
    assert checkpoint.config.biases == {"wv"}, "biases of zeros are dropped"
    assert checkpoint.tensors["layers.1.w2"] == TensorInfo("model.layers.1.mlp.down_proj", (64, 96), F16, 5)
    assert checkpoint.read("layers.1.w2").float32().sum() == 64 * 96
    assert checkpoint.read("layers.1.wv_bias").float32().tolist() == [1.0] * 32
    assert torch.equal(checkpoint.read("norm").float32(), state[NORM])


@pytest.mark.parametrize("prefix", ["model.", ""])
@pytest.mark.parametrize("container", ["safetensors", "pt"])
def test_a_gptq_file_of_its_own(tmp_path: Path, container: str, prefix: str) -> None:
    """4 bits, groups of 32, version 1 (zero points stored less one), against a plain float64 decode."""
    generator = torch.Generator().manual_seed(0)
    state, expected = {}, {}
    for name, weight in tiny_hf(tmp_path, tied=True).state_dict().items():
        short = name.removeprefix("model.")
        if "_proj" not in name:
            state[prefix + short] = expected[name] = weight
            continue
        (rows, columns), stem = weight.shape, prefix + short.removesuffix("weight")
        codes = torch.randint(0, 16, (columns, rows), generator=generator)
        zeros = torch.randint(0, 15, (columns // 32, rows), generator=generator)
        scales = torch.rand(columns // 32, rows, generator=generator).half()
        group = torch.arange(columns) // 32
        shifts = 4 * torch.arange(8)
        state[stem + "qweight"] = (codes.view(-1, 8, rows) << shifts[:, None]).sum(1).to(torch.int32)
        state[stem + "qzeros"] = (zeros.view(-1, rows // 8, 8) << shifts).sum(2).to(torch.int32)
        state[stem + "scales"], state[stem + "g_idx"] = scales, group.to(torch.int32)
        expected[name] = (scales[group].double() * (codes - zeros[group] - 1)).T
    state.pop(prefix + "lm_head.weight")
    (tmp_path / "model.safetensors").unlink()
    file = tmp_path / f"llama-4bit-32g.{container}"
    write_safetensors(file, state) if container == "safetensors" else torch.save(state, file)
    for path in (file, tmp_path):
        checkpoint = HFCheckpoint(path)
        assert "GPTQ 4-bit" in checkpoint.format
        for name in tensor_shapes(checkpoint.config):
            found = checkpoint.read(name).float32().double()
            torch.testing.assert_close(found, expected[file_name(name)].double(), rtol=1e-6, atol=1e-6)
