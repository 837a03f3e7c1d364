"""Whole quantised models, file to logits: the same numbers as transformers with the weights decoded by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from backend.checkpoint.open import open_checkpoint
from backend.errors import CheckpointError
from backend.placement.plan import weight_bytes
from tests.forward import Session
from tests.gptqfiles import awq_layer, gptq_layer, quantise
from tests.hffiles import change_json, tiny_hf, write_json, write_safetensors
from tests.test_bnb import STATE, expected_4bit, int8_tensors, nf4_tensors

IDS = [5, 77, 130, 2, 9, 9, 41, 100, 3]
Tensors = dict[str, torch.Tensor]
Packed = tuple[Tensors, np.ndarray]  # tensors of one layer by name, and the float64 matrix they stand for


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def gptq(prefix: str, matrix: np.ndarray, era: str = "e", version: int = 1, **how: Any) -> Packed:
    layer = quantise(matrix, **how)
    return gptq_layer(prefix, layer, era, version), layer.values()


def awq(prefix: str, matrix: np.ndarray, group: int = 64) -> Packed:
    layer = quantise(matrix, 4, group)
    return awq_layer(prefix, layer), layer.values()


def nf4(prefix: str, matrix: np.ndarray) -> Packed:
    tensors = nf4_tensors(matrix)
    renamed = {name.replace("model.layers.0.mlp.up_proj", prefix): value for name, value in tensors.items()}
    return renamed, expected_4bit(tensors, STATE.rpartition("__")[2] + "nf4", *matrix.shape)


def int8(prefix: str, matrix: np.ndarray) -> Packed:
    weight, scb = int8_tensors(matrix).values()
    tensors = {"weight": weight, "SCB": scb, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return {f"{prefix}.{name}": t for name, t in tensors.items()}, (
        weight.double() * scb.double()[:, None] / 127
    ).numpy()


def write(folder: Path, pack: Callable[..., Packed], file: str = "model.safetensors", **how: Any) -> PreTrainedModel:
    """A folder with every linear of the layers packed; the model that it stands for, in float32."""
    model = tiny_hf(folder, hidden_size=128, intermediate_size=192)
    (folder / "model.safetensors").unlink()
    state = dict(model.state_dict())
    for name in [name for name in state if name.endswith("_proj.weight")]:
        prefix = name.removesuffix(".weight")
        tensors, values = pack(prefix, state.pop(name).double().numpy(), **how)
        state |= tensors
        with torch.no_grad():
            model.get_parameter(name).copy_(torch.from_numpy(values))
    if file.endswith(".safetensors"):
        write_safetensors(folder / file, state)
    else:
        torch.save(state, folder / file)
    return model


def check(path: Path, model: PreTrainedModel, bound: float = 0.03, label: str = "") -> None:
    """float32 weights: transformers' logits. As stored: within `bound` of their spread, and bytes as planned."""
    with torch.inference_mode():
        expected = model(torch.tensor([IDS])).logits[0]
    checkpoint = open_checkpoint(path)
    assert label in checkpoint.format
    torch.testing.assert_close(Session(checkpoint, "f32", 32).logits(IDS), expected, rtol=1e-4, atol=1e-4)
    packed = Session(checkpoint, "original", 32)
    difference = (packed.logits(IDS) - expected).pow(2).mean().sqrt() / expected.std()
    assert float(difference) < bound
    assert weight_bytes("original", checkpoint.config, checkpoint.tensors) == packed.loaded.weight_bytes


CASES: dict[str, tuple[Callable[..., Packed], dict[str, Any], dict[str, Any] | None, str]] = {
    "era a, .pt": (gptq, {"era": "a", "file": "llama-7b-4bit.pt"}, None, "GPTQ 4-bit"),
    "era b, .pt": (gptq, {"era": "b", "group": 64, "file": "llama-7b-4bit-64g.pt"}, None, "GPTQ 4-bit g64"),
    "era c, act-order": (
        gptq, {"era": "c", "group": 64, "act_order": True, "file": "4bit-64g.safetensors"}, None, "act-order"),
    "era d, symmetric": (gptq, {"era": "d", "group": 32, "sym": True, "file": "4bit-32g.pt"}, None, "g32"),
    "era e, v2": (
        gptq, {"group": 64, "version": 2},
        {"quant_method": "gptq", "bits": 4, "group_size": 64, "checkpoint_format": "gptq_v2"}, "GPTQ 4-bit g64"),
    "era e, 8 bits": (gptq, {"bits": 8, "group": 64}, {"quant_method": "gptq", "bits": 8}, "GPTQ 8-bit g64"),
    "3 bits": (gptq, {"bits": 3, "group": 64}, {"quant_method": "gptq", "bits": 3}, "GPTQ 3-bit g64"),
    "AWQ": (awq, {}, {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm"}, "AWQ 4-bit g64"),
    "NF4": (nf4, {}, {"quant_method": "bitsandbytes", "load_in_4bit": True}, "NF4"),
    "LLM.int8": (int8, {}, {"quant_method": "bitsandbytes", "load_in_8bit": True}, "LLM.int8"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_quantised_folder_answers_as_its_decoded_weights(tmp_path: Path, case: str) -> None:
    pack, how, settings, label = CASES[case]
    folder = tmp_path / "model"
    model = write(folder, pack, **how)
    if settings is not None:
        change_json(folder / "config.json", quantization_config=settings)
    check(folder, model, label=label)


def test_settings_in_a_file_of_their_own_and_a_file_pointed_at(tmp_path: Path) -> None:
    model = write(tmp_path, gptq, group=64, version=2, file="gptq_model-4bit-64g.safetensors")
    write_json(tmp_path / "quantize_config.json", {"bits": 4, "group_size": 64, "checkpoint_format": "gptq_v2"})
    check(tmp_path / "gptq_model-4bit-64g.safetensors", model)
    write_json(tmp_path / "quantize_config.json", {"bits": 4, "quant_method": "aqlm"})
    with pytest.raises(CheckpointError, match="'aqlm'"):
        open_checkpoint(tmp_path)
