"""Every layout and family through the whole model: the same numbers as an independent forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from backend.checkpoint.lora import with_lora
from backend.checkpoint.open import open_checkpoint
from backend.placement.load import load_model
from backend.placement.plan import weight_bytes
from tests.commandline import command
from tests.forward import Session, float64_logits, greedy, logits
from tests.hffiles import tiny_hf, write_adapter
from tests.metafiles import MetaModel, write_meta
from tests.tiny import TinyModel, write_tiny

PROMPT = [5, 77, 130, 2, 9, 9, 41]
LONG = [(7 * n * n + 3 * n) % 157 for n in range(90)]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Two layers of 64 columns are over before a second thread has begun."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# Meta's folders: rows 1 to 4 of the mission ---------------------------------------------------------------------------

META = {
    "LLaMA 1": MetaModel(params={"norm_eps": 1e-6}),
    "no rope.freqs": MetaModel(rope_freqs=False),
    "grouped queries, one key head a shard": MetaModel(n_kv_heads=2, dtype=torch.bfloat16),
    "Llama 3: embeddings by rows, theta": MetaModel(
        n_kv_heads=4, embeddings_by_rows=True, params={"rope_theta": 500000.0}, rope_freqs=False
    ),
    "Llama 3.1: scaled rope": MetaModel(
        n_kv_heads=4, embeddings_by_rows=True, params={"rope_theta": 500000.0, "use_scaled_rope": True}
    ),
    "nested params": MetaModel(params={}),
}


def scaled(frequencies: torch.Tensor) -> torch.Tensor:
    """Llama 3.1's rule, element by element: factor 8, low 1, high 4, old context 8192."""
    out = []
    for f in frequencies.tolist():
        wavelength = 2 * np.pi / f
        if wavelength > 8192:
            out.append(f / 8)
        elif wavelength < 2048:
            out.append(f)
        else:
            smooth = (8192 / wavelength - 1) / 3
            out.append((1 - smooth) * f / 8 + smooth * f)
    return torch.tensor(out, dtype=torch.float64)


@pytest.mark.parametrize("name", META)
def test_greedy_ids_of_meta_folders_are_those_of_float64(tmp_path: Path, name: str) -> None:
    model = META[name]
    values = write_meta(tmp_path, model)
    checkpoint = open_checkpoint(tmp_path)
    config = checkpoint.config
    frequencies = config.rope_theta ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    if name.startswith("Llama 3.1"):
        frequencies = scaled(frequencies)
    found = greedy(checkpoint, PROMPT, 64)
    expected = float64_logits(values, config, PROMPT + found, frequencies)[len(PROMPT) - 1 : -1]
    # Each id must be the argmax after the same ids; by induction the whole is the greedy text.
    assert found == expected.argmax(-1).tolist()
    ours = logits(checkpoint, PROMPT + found)[len(PROMPT) - 1 : -1]
    torch.testing.assert_close(ours.double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("name", ["LLaMA 1", "grouped queries, one key head a shard", "Llama 3.1: scaled rope"])
def test_shards_give_the_ids_of_the_whole(tmp_path: Path, name: str, ranks: int) -> None:
    model = META[name]
    write_meta(tmp_path / "whole", model)
    write_meta(tmp_path / "shards", model, ranks)
    one, many = open_checkpoint(tmp_path / "whole"), open_checkpoint(tmp_path / "shards")
    assert many.format == f"Meta, {ranks} shards"
    for tensor in one.tensors:
        assert torch.equal(one.read(tensor).float32(), many.read(tensor).float32()), tensor
    assert greedy(many, PROMPT, 16) == greedy(one, PROMPT, 16)


# Hugging Face folders and families ------------------------------------------------------------------------------------

FAMILIES = {
    "llama": {},
    "llama, linear rope": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
    "llama, llama3 rope": {
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
        }
    },
    "llama, biases": {"attention_bias": True, "mlp_bias": True},
    "llama, other head size": {"head_dim": 32},
    "llama, tied": {"tied": True},
    "mistral": {"sliding_window": None},
    "mistral, window": {"sliding_window": 24},
    "qwen2": {},
    "qwen2, tied": {"tied": True},
}  # fmt: skip


@pytest.mark.parametrize("chunk", [90, 17, 1])
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_of_families_are_those_of_transformers(tmp_path: Path, name: str, chunk: int) -> None:
    model = tiny_hf(tmp_path, name.split(",")[0], **FAMILIES[name])
    with torch.inference_mode():
        expected = model(torch.tensor([LONG])).logits[0]
    ours = logits(open_checkpoint(tmp_path), LONG, chunk=chunk)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_the_window_matters_in_that_test(tmp_path: Path) -> None:
    """Otherwise the comparison above would show nothing."""
    tiny_hf(tmp_path / "window", "mistral", sliding_window=24)
    tiny_hf(tmp_path / "whole", "mistral", sliding_window=None)
    one, other = (logits(open_checkpoint(tmp_path / part), LONG) for part in ("window", "whole"))
    assert torch.allclose(one[:24], other[:24], atol=1e-4)
    assert not torch.allclose(one[30:], other[30:], atol=1e-2)


@pytest.mark.parametrize("container", ["safetensors", "bin"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_shards(tmp_path: Path, container: str, dtype: torch.dtype) -> None:
    model = tiny_hf(tmp_path, "llama", dtype=dtype, sharded=True, container=container)
    checkpoint = open_checkpoint(tmp_path)
    assert len(checkpoint.files) > 1
    # A fresh model: the other one's table of rotary frequencies is in half precision, too.
    reference = type(model)(model.config).float().eval()
    reference.load_state_dict({name: value.float() for name, value in model.state_dict().items()})
    with torch.inference_mode():
        expected = reference(torch.tensor([LONG])).logits[0]
    torch.testing.assert_close(logits(checkpoint, LONG), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama, biases", "qwen2", "qwen2, tied", "llama, other head size"])
@pytest.mark.parametrize("weights", ["original", "bf16", "f32"])
def test_the_plan_knows_the_bytes_of_families(tmp_path: Path, name: str, weights: str) -> None:
    tiny_hf(tmp_path, name.split(",")[0], **FAMILIES[name])
    checkpoint = open_checkpoint(tmp_path)
    loaded = load_model(checkpoint, weights, "test")
    assert loaded.weight_bytes == weight_bytes(weights, checkpoint.config, checkpoint.tensors)


# adapters: row 43 -----------------------------------------------------------------------------------------------------

MODULES = {
    "model.layers.0.self_attn.q_proj": (64, 64),
    "model.layers.0.self_attn.k_proj": (32, 64),
    "model.layers.1.self_attn.v_proj": (32, 64),
    "model.layers.1.mlp.down_proj": (64, 96),
}


def test_an_adapter_gives_the_ids_of_the_merged_model(tmp_path: Path) -> None:
    model = tiny_hf(tmp_path / "base", "llama")
    tensors = write_adapter(tmp_path / "adapter", MODULES, rank=4, alpha=8, scale=0.3)
    state = model.state_dict()
    for module in MODULES:
        stem = f"base_model.model.{module}"
        delta = tensors[f"{stem}.lora_B.weight"].double() @ tensors[f"{stem}.lora_A.weight"].double()
        state[f"{module}.weight"].copy_((state[f"{module}.weight"].double() + 8 / 4 * delta).float())
    with torch.inference_mode():
        expected = model(torch.tensor([LONG])).logits[0]
    base = open_checkpoint(tmp_path / "base")
    adapted = with_lora(base, tmp_path / "adapter")
    torch.testing.assert_close(logits(adapted, LONG), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(base, LONG), expected, atol=1e-2), "the adapter changes something"
    torch.testing.assert_close(logits(with_lora(base, tmp_path / "adapter", 0.0), LONG), logits(base, LONG))


def test_an_adapter_merged_by_convert(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "tiny.gguf", TinyModel(tied=False))
    write_adapter(tmp_path / "adapter", MODULES, scale=0.3)
    adapted = with_lora(open_checkpoint(path), tmp_path / "adapter", 0.5)
    for target in (tmp_path / "merged.gguf", tmp_path / "merged"):
        assert command("convert", path, target, "--type", "f32", "--lora", f"{tmp_path / 'adapter'}=0.5") == 0
        merged = open_checkpoint(target)
        assert {info.format.name for info in merged.tensors.values()} == {"F32"}
        torch.testing.assert_close(logits(merged, LONG), logits(adapted, LONG), rtol=1e-5, atol=1e-5)


def test_an_adapter_beside_packed_weights(tmp_path: Path) -> None:
    """On a packed GGUF the adapter is applied at run time; its query rows are put into the file's order."""
    path = write_tiny(tmp_path / "tiny.gguf", TinyModel(weights="Q8_0", tied=False))
    write_adapter(tmp_path / "adapter", MODULES, scale=0.3)
    base = open_checkpoint(path)
    adapted = with_lora(base, tmp_path / "adapter")
    merged = logits(adapted, LONG, "f32")
    beside = Session(adapted, "original", len(LONG))
    difference = (beside.logits(LONG).log_softmax(-1) - merged.log_softmax(-1)).abs()
    plain = (logits(base, LONG, "original").log_softmax(-1) - logits(base, LONG, "f32").log_softmax(-1)).abs()
    changed = (merged.log_softmax(-1) - logits(base, LONG, "f32").log_softmax(-1)).abs()
    assert difference.mean() < 2 * plain.mean() + 1e-3, "as far from float32 as the packed base is"
    assert changed.mean() > 10 * difference.mean(), "the adapter changes more than packing does"
    assert beside.loaded.weight_bytes > load_model(base, "original", "test").weight_bytes
    for weights in ("original", "bf16"):
        loaded = load_model(adapted, weights, "test")
        assert loaded.weight_bytes == weight_bytes(weights, adapted.config, adapted.tensors)
