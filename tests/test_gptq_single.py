"""GPTQ models of 2023 as one file: names, the order in which files are looked for, a LLaMA told by its shapes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from backend.checkpoint.container import RawTensor, RawTensors
from backend.checkpoint.gptq_single import config_from_tensors, find_single_file, settings_from_name
from backend.errors import CheckpointError

PATH = Path("llama-7b-4bit.pt")


@pytest.mark.parametrize(
    ("name", "bits", "group"),
    [
        ("llama-7b-4bit", 4, -1),
        ("llama-13b-4bit", 4, -1),
        ("llama-7b-4bit-128g", 4, 128),
        ("llama7b-4bit-128g.safetensors", 4, 128),
        ("vicuna-13b-GPTQ-4bit-128g", 4, 128),
        ("koala-13B-4bit-128g", 4, 128),
        ("alpaca-30b-int4-gr128", 4, 128),
        ("model-gr128-4bit", 4, 128),
        ("model-128g-int4", 4, 128),
        ("llama-13b-3bit-128g", 3, 128),
        ("llama-13b-gr128-3bit", 3, 128),
        ("gptq_model-4bit-32g", 4, 32),
        ("gptq_model-8bit-64g.safetensors", 8, 64),
    ],
)
def test_what_names_say(name: str, bits: int, group: int) -> None:
    assert settings_from_name(name) == {"bits": bits, "group_size": group}


@pytest.mark.parametrize("name", ["llama-7b", "llama-7b-128g", "llama-14bit", "TinyLlama-1.1B-Chat", "rabbit4bites"])
def test_names_that_say_nothing(name: str) -> None:
    assert settings_from_name(name) == {}


def test_the_order_in_which_files_are_looked_for(tmp_path: Path) -> None:
    folder = tmp_path / "llama-7b"
    folder.mkdir()
    assert find_single_file(folder) is None
    wanted = [  # the best last
        folder / "a.safetensors",
        folder / "z.safetensors",
        folder / "a.pt",
        folder / "b.pt",
        folder / "4bit.pt",
        folder / "llama-7b-4bit.safetensors",
        folder / "4bit-128g.pt",
        folder / "llama-7b-4bit-128g.pt",
        folder / "4bit-128g.safetensors",
        folder / "llama-7b-4bit-128g.safetensors",
        tmp_path / "llama-7b-4bit-128g.safetensors",
    ]
    for file in wanted:
        file.touch()
        assert find_single_file(folder) == file
    (folder / "4bit-64g.safetensors").touch()
    assert find_single_file(folder) == wanted[-1]


def test_the_name_of_the_folder_says_which_file(tmp_path: Path) -> None:
    folder = tmp_path / "llama-7b-3bit-64g"
    folder.mkdir()
    for name in ("4bit-128g.safetensors", "3bit-64g.pt", "3bit-128g.pt"):
        (folder / name).touch()
    assert find_single_file(folder) == folder / "3bit-64g.pt"


def shapes_of_llama(dim: int, layers: int, ffn: int, key: int | None = None) -> RawTensors:
    """Headers only: nothing of a 65B model is allocated."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (32000, dim), "lm_head.weight": (32000, dim)}
    for n in range(layers):
        shapes[f"model.layers.{n}.mlp.gate_proj.scales"] = (dim // 128, ffn)
        shapes[f"model.layers.{n}.self_attn.k_proj.scales"] = (key or dim, 1) if n % 2 else (1, key or dim)

    def never() -> torch.Tensor:
        raise AssertionError("only shapes are looked at")

    return {name: RawTensor(name, shape, torch.float16, 0, PATH, never) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("dim", "layers", "heads", "ffn", "eps"),
    [
        (4096, 32, 32, 11008, 1e-6),
        (5120, 40, 40, 13824, 1e-6),
        (6656, 60, 52, 17920, 1e-6),
        (8192, 80, 64, 22016, 1e-5),
    ],
)
def test_a_llama_without_config_is_told_by_its_shapes(dim: int, layers: int, heads: int, ffn: int, eps: float) -> None:
    found = config_from_tensors(Path("llama-4bit.pt"), shapes_of_llama(dim, layers, ffn))
    assert (found.dim, found.n_layers, found.n_heads, found.n_kv_heads, found.head_dim) == (
        dim, layers, heads, heads, 128,
    )  # fmt: skip
    assert (found.ffn_dim, found.norm_eps, found.context, found.vocab_size) == (ffn, eps, 2048, 32000)
    assert (found.rope_interleaved, found.tied_output, found.name) == (False, False, "llama-4bit")


@pytest.mark.parametrize(
    "raws",
    [
        {},
        shapes_of_llama(4096, 33, 11008),
        shapes_of_llama(4096, 32, 14336),
        shapes_of_llama(8192, 80, 22016, key=1024),
        shapes_of_llama(2048, 16, 8192),
    ],
)
def test_any_other_model_without_config_is_asked_for_it(raws: RawTensors) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        config_from_tensors(Path("x.pt"), raws)
