"""PEFT LoRA adapters: merged values against float64 by hand, beside the weight against merged, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from backend.checkpoint.base import TensorInfo
from backend.checkpoint.hf import HFCheckpoint, file_name
from backend.checkpoint.lora import with_lora
from backend.errors import CheckpointError
from backend.model.config import ModelConfig
from backend.tokenizer.source import TokenizerSource
from backend.weights.blocks import F32, Q4_0
from backend.weights.linear import PlainLinear
from backend.weights.lora import LoraLinear, LowRank, lora_linear
from backend.weights.stored import Blocks, Plain, Stored, copy_values
from tests.hffiles import tiny_hf, to_meta, write_adapter, write_safetensors

SHAPES = {
    "self_attn.q_proj": (64, 64), "self_attn.k_proj": (32, 64), "self_attn.v_proj": (32, 64),
    "self_attn.o_proj": (64, 64), "mlp.gate_proj": (96, 64), "mlp.up_proj": (96, 64), "mlp.down_proj": (64, 96),
}  # fmt: skip
ALL = {f"model.layers.{n}.{name}": shape for n in range(2) for name, shape in SHAPES.items()}
Q, V, HEAD = "model.layers.1.self_attn.q_proj", "model.layers.0.self_attn.v_proj", "lm_head"
SOME = {Q: (64, 64), V: (32, 64), HEAD: (160, 64)}


def merged(
    state: Mapping[str, torch.Tensor], adapter: Mapping[str, torch.Tensor], scales: Mapping[str, float] | float
) -> dict[str, torch.Tensor]:
    """W + scale B A in float64, by file name. `scales`: one for all, or by module."""
    result = {name: weight.double() for name, weight in state.items()}
    for name, a in adapter.items():
        if ".lora_A." in name:
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            b = adapter[name.replace("lora_A", "lora_B")]
            scale = scales if isinstance(scales, float) else scales[module]
            result[module + ".weight"] = result[module + ".weight"] + scale * (b.double() @ a.double())
    return result


def check(checkpoint: Any, expected: Mapping[str, torch.Tensor]) -> None:
    """Every tensor as values, and a slice of its rows."""
    for name, info in checkpoint.tensors.items():
        stored, right = checkpoint.read(name), expected[file_name(name)]
        assert stored.shape == info.shape
        torch.testing.assert_close(stored.float32().double(), right, rtol=1e-6, atol=1e-6)
        if len(info.shape) == 2:
            torch.testing.assert_close(stored.float32(3, 17).double(), right[3:17], rtol=1e-6, atol=1e-6)
            out = torch.empty(info.shape)
            copy_values(stored, out)
            torch.testing.assert_close(out.double(), right, rtol=1e-6, atol=1e-6)


# what is right ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("container", ["safetensors", "bin"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_all_linears_of_a_folder(tmp_path: Path, container: str, dtype: torch.dtype) -> None:
    state = tiny_hf(tmp_path / "base").state_dict()
    adapter = write_adapter(tmp_path / "lora", ALL, rank=4, alpha=12, dtype=dtype, container=container)
    base = HFCheckpoint(tmp_path / "base")
    checkpoint = with_lora(base, tmp_path / "lora")
    check(checkpoint, merged(state, adapter, 12 / 4))
    assert (checkpoint.config, checkpoint.path, checkpoint.tokenizer) == (base.config, base.path, base.tokenizer)
    assert checkpoint.files == [*base.files, *(tmp_path / "lora").glob("adapter_model.*")]
    assert checkpoint.format == "Hugging Face safetensors, LoRA on 14 weights"
    linears = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")
    assert checkpoint.changed == {f"layers.{n}.{name}" for n in range(2) for name in linears}
    assert isinstance(checkpoint.read("norm"), Plain)
    check(with_lora(base, next((tmp_path / "lora").glob("adapter_model.*"))), merged(state, adapter, 3.0))


def test_strength_and_stacking(tmp_path: Path) -> None:
    state = tiny_hf(tmp_path / "base").state_dict()
    one = write_adapter(tmp_path / "one", ALL, rank=4, alpha=8, seed=1)
    two = write_adapter(tmp_path / "two", SOME, rank=2, alpha=1, seed=2)
    base = HFCheckpoint(tmp_path / "base")
    check(with_lora(base, tmp_path / "one", 0.25), merged(state, one, 0.5))
    check(with_lora(base, tmp_path / "one", -1), merged(state, one, -2.0))
    check(with_lora(base, tmp_path / "one", 0), merged(state, one, 0.0))
    both = with_lora(with_lora(base, tmp_path / "one"), tmp_path / "two", 3)
    check(both, merged(merged(state, one, 2.0), two, 1.5))
    stored = both.read("layers.1.wq")
    assert isinstance(stored, LowRank)
    assert isinstance(stored.base, LowRank)
    assert (stored.scale, stored.base.scale) == (1.5, 2.0)


def test_scales_ranks_and_alphas_of_their_own(tmp_path: Path) -> None:
    """use_rslora divides by the root; patterns name modules by their ends, the first that fits counts."""
    state = tiny_hf(tmp_path / "base").state_dict()
    k = "model.layers.0.self_attn.k_proj"
    adapter = write_adapter(
        tmp_path / "lora", {Q: (64, 64), V: (32, 64), k: (32, 64)}, rank=4, alpha=8, use_rslora=True,
        ranks={Q: 2, V: 9}, rank_pattern={"layers.1.self_attn.q_proj": 2, "v_proj": 9, "proj": 3, "^k_proj": 5},
        alpha_pattern={"^" + V: 6, "v_proj": 7, "self_attn.q_proj": 0.5},
    )  # fmt: skip
    scales = {Q: 0.5 / math.sqrt(2), V: 6 / 3, k: 8 / 2}
    check(with_lora(HFCheckpoint(tmp_path / "base"), tmp_path / "lora"), merged(state, adapter, scales))


def test_names_with_the_adapters_name_in_them(tmp_path: Path) -> None:
    state = tiny_hf(tmp_path / "base").state_dict()
    adapter = write_adapter(tmp_path / "lora", SOME)
    renamed = {name.replace(".weight", ".default.weight"): tensor for name, tensor in adapter.items()}
    write_safetensors(tmp_path / "lora" / "adapter_model.safetensors", renamed)
    check(with_lora(HFCheckpoint(tmp_path / "base"), tmp_path / "lora"), merged(state, adapter, 2.0))


def test_an_adapted_output_is_no_longer_the_embedding(tmp_path: Path) -> None:
    state = tiny_hf(tmp_path / "base", tied=True).state_dict()
    adapter = write_adapter(tmp_path / "lora", SOME)
    base = HFCheckpoint(tmp_path / "base")
    checkpoint = with_lora(base, tmp_path / "lora")
    assert (base.config.tied_output, checkpoint.config.tied_output) == (True, False)
    assert set(checkpoint.tensors) == {*base.tensors, "output"}
    check(checkpoint, merged(state, adapter, 2.0))
    assert torch.equal(checkpoint.read("tok_embeddings").float32(), state["lm_head.weight"])
    other = with_lora(checkpoint, tmp_path / "lora", 0.5)
    check(other, merged(merged(state, adapter, 2.0), adapter, 1.0))


@pytest.mark.parametrize("tied", [False, True])
def test_tables_that_the_adapter_brings_whole(tmp_path: Path, tied: bool) -> None:
    """PEFT saves the table itself when it adapts the output; what it saved takes the place of the model's."""
    state = dict(tiny_hf(tmp_path / "base", tied=tied).state_dict())
    adapter = write_adapter(tmp_path / "lora", SOME)
    tables = {"lm_head.weight": torch.randn(160, 64), "model.embed_tokens.weight": torch.randn(160, 64)}
    saved = {"base_model.model.lm_head.base_layer.weight": tables["lm_head.weight"]}
    for _ in range(2):
        write_safetensors(tmp_path / "lora" / "adapter_model.safetensors", {**adapter, **saved})
        state |= {name.removeprefix("base_model.model.").replace("base_layer.", ""): t for name, t in saved.items()}
        check(with_lora(HFCheckpoint(tmp_path / "base"), tmp_path / "lora", 0.5), merged(state, adapter, 1.0))
        saved["base_model.model.model.embed_tokens.weight"] = tables["model.embed_tokens.weight"]


class Memory:
    """A checkpoint of tensors at hand, in any row order."""

    def __init__(self, config: ModelConfig, stored: Mapping[str, Stored]) -> None:
        self.path = Path("memory")
        self.files: Sequence[Path] = []
        self.format, self.config, self.stored = "memory", config, stored
        self.tensors = {name: TensorInfo(name, part.shape, F32, 4) for name, part in stored.items()}
        self.tokenizer = TokenizerSource("folder", self.path)

    def read(self, name: str) -> Stored:
        return self.stored[name]


def test_a_base_in_the_other_row_order(tmp_path: Path) -> None:
    """Metas and GGUF's order: the merged queries and keys are the merged ones of Hugging Face, reordered."""
    state = tiny_hf(tmp_path / "base").state_dict()
    adapter = write_adapter(tmp_path / "lora", ALL)
    config = HFCheckpoint(tmp_path / "base").config
    heads = {"q_proj": config.n_heads, "k_proj": config.n_kv_heads}

    def reordered(values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {
            name: to_meta(weight, heads[name.split(".")[-2]]) if name.split(".")[-2] in heads else weight
            for name, weight in values.items()
        }

    turned = reordered(state)
    stored = {name: Plain(turned[file_name(name)]) for name in HFCheckpoint(tmp_path / "base").tensors}
    base = Memory(replace(config, rope_interleaved=True), stored)
    check(with_lora(base, tmp_path / "lora"), reordered(merged(state, adapter, 2.0)))


def test_a_packed_base_stays_packed_beside_its_adapter() -> None:
    generator = torch.Generator().manual_seed(0)
    raw = torch.randint(0, 256, (48, 36), generator=generator, dtype=torch.uint8)
    raw[:, 0::18], raw[:, 1::18] = 0, 0x2C  # every scale is 1/16
    packed = Blocks(raw, Q4_0)
    a, b = torch.randn(3, 64, generator=generator), torch.randn(48, 3, generator=generator)
    stored = LowRank(LowRank(packed, a, b, 0.5), a.flip(0), b, 0.25)
    assert (stored.shape, stored.dtype, stored.planes()) == ((48, 64), None, None)
    right = packed.float32().double() + (b.double() @ (0.5 * a + 0.25 * a.flip(0)).double())
    torch.testing.assert_close(stored.float32().double(), right, rtol=1e-6, atol=1e-5)
    built = []

    def build(base: Stored) -> PlainLinear:
        built.append(base)
        return PlainLinear(base.float32())

    linear = lora_linear(stored, build)
    assert built == [packed]
    assert isinstance(linear, LoraLinear)
    assert (linear.out_features, linear.in_features) == (48, 64)
    assert linear.nbytes() == 4 * (48 * 64 + 2 * 3 * (48 + 64))
    x = torch.randn(5, 64, generator=generator)
    torch.testing.assert_close(linear(x).double(), x.double() @ right.T, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(linear.twin().double(), right, rtol=1e-6, atol=1e-5)
    assert isinstance(lora_linear(packed, build), PlainLinear), "no adapter: the linear itself"


@pytest.mark.parametrize(("a", "b"), [((3, 63), (48, 3)), ((3, 64), (47, 3)), ((3, 64), (48, 2))])
def test_factors_that_do_not_fit(a: tuple[int, int], b: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="do not make a matrix"):
        LowRank(Plain(torch.zeros(48, 64)), torch.zeros(a), torch.zeros(b), 1.0)


# what is refused --------------------------------------------------------------------------------------------------

SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "another method": (dict(peft_type="IA3"), "peft_type is 'IA3'"),
    "no method": (dict(peft_type=None), "peft_type is 'None'"),
    "rank missing": (dict(r=None), "'r' is missing"),
    "rank 0": (dict(r=0), "r is 0"),
    "rank of 10^12": (dict(r=10**12), "r is 1000000000000"),
    "rank as text": (dict(r="4"), "r is '4'"),
    "another rank": (dict(r=5), "has shape (4, 64), expected (5, 64)"),
    "alpha NaN": (dict(lora_alpha=float("nan")), "lora_alpha is nan"),
    "alpha missing": (dict(lora_alpha=None), "'lora_alpha' is missing"),
    "rslora as text": (dict(use_rslora="yes"), "use_rslora is 'yes'"),
    "biases": (dict(bias="lora_only"), "bias is 'lora_only'"),
    "turned weights": (dict(fan_in_fan_out=True), "uses fan_in_fan_out"),
    "whole modules": (dict(modules_to_save=["lm_head"]), "uses modules_to_save"),
    "DoRA": (dict(use_dora=True), "uses use_dora"),
    "repeated layers": (dict(layer_replication=[[0, 2], [0, 2]]), "uses layer_replication"),
    "PiSSA": (dict(init_lora_weights="pissa_niter_4"), "init_lora_weights is 'pissa_niter_4'"),
    "LoftQ": (dict(init_lora_weights="loftq"), "init_lora_weights is 'loftq'"),
    "an expression": (dict(rank_pattern={"(a+)+$": 4}), "no expressions"),
    "a pattern that is none": (dict(rank_pattern=[4]), "rank_pattern is no object"),
    "a pattern's rank as text": (dict(rank_pattern={"q_proj": "4"}), "rank_pattern.q_proj is '4'"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_beyond_plain_lora_are_refused_by_name(tmp_path: Path, case: str) -> None:
    settings, words = SETTINGS[case]
    tiny_hf(tmp_path / "base")
    write_adapter(tmp_path / "lora", SOME, **settings)
    with pytest.raises(CheckpointError) as caught:
        with_lora(HFCheckpoint(tmp_path / "base"), tmp_path / "lora")
    assert words in caught.value.message
    assert str(tmp_path / "lora") in caught.value.message


STEM = "base_model.model.model."
TENSORS: dict[str, tuple[dict[str, Any], str]] = {
    "an embedding": ({STEM + "embed_tokens.lora_embedding_A": torch.ones(4, 160)}, "adapts the embedding"),
    "a whole tensor": ({STEM + "norm.weight": torch.ones(64)}, "is no LoRA pair"),
    "another vocabulary": ({STEM + "embed_tokens.weight": torch.ones(161, 64)}, "changes the vocabulary"),
    "a table twice": (
        {"base_model.model.lm_head.weight": torch.ones(160, 64),
         "base_model.model.lm_head.base_layer.weight": torch.ones(160, 64)}, "the same weight twice"),
    "a table of whole numbers": (
        {"base_model.model.lm_head.weight": torch.ones(160, 64, dtype=torch.int8)}, "stored as int8"),
    "a magnitude": ({STEM + "layers.0.mlp.up_proj.lora_magnitude_vector": torch.ones(96)}, "is no LoRA pair"),
    "half a pair": ({f"base_model.model.{V}.lora_B.weight": None}, "has lora_A, but not the other"),
    "nothing": (dict.fromkeys(f"base_model.model.{name}.lora_{x}.weight" for name in SOME for x in "AB"), "no LoRA"),
    "a layer too far": (
        {STEM + "layers.2.mlp.up_proj.lora_A.weight": torch.ones(4, 64),
         STEM + "layers.2.mlp.up_proj.lora_B.weight": torch.ones(96, 4)}, "has 2 layers"),
    "another module": (
        {STEM + "layers.0.mlp.experts.lora_A.weight": torch.ones(4, 64),
         STEM + "layers.0.mlp.experts.lora_B.weight": torch.ones(96, 4)}, "is no linear layer"),
    "another width": ({f"base_model.model.{V}.lora_A.weight": torch.ones(4, 65)}, "(4, 65), expected (4, 64)"),
    "another height": ({f"base_model.model.{V}.lora_B.weight": torch.ones(64, 4)}, "(64, 4), expected (32, 4)"),
    "three dimensions": ({f"base_model.model.{V}.lora_B.weight": torch.ones(32, 4, 1)}, "expected (32, 4)"),
    "whole numbers": ({f"base_model.model.{V}.lora_B.weight": torch.ones(32, 4, dtype=torch.int8)}, "torch.int8"),
    "twice": ({f"base_model.model.{V}.lora_B.x.weight": torch.ones(32, 4)}, "two tensors for lora_B"),
    "twice, by two names": (
        {STEM + "model.layers.0.self_attn.v_proj.lora_A.weight": torch.ones(4, 64),
         STEM + "model.layers.0.self_attn.v_proj.lora_B.weight": torch.ones(32, 4)}, "two pairs"),
}  # fmt: skip


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_are_no_plain_adapter_are_refused(tmp_path: Path, case: str) -> None:
    changes, words = TENSORS[case]
    tiny_hf(tmp_path / "base")
    tensors = {name: t for name, t in {**write_adapter(tmp_path / "lora", SOME), **changes}.items() if t is not None}
    write_safetensors(tmp_path / "lora" / "adapter_model.safetensors", tensors)
    with pytest.raises(CheckpointError) as caught:
        with_lora(HFCheckpoint(tmp_path / "base"), tmp_path / "lora")
    assert words in caught.value.message


def test_folders_that_are_no_adapter(tmp_path: Path) -> None:
    tiny_hf(tmp_path / "base")
    base = HFCheckpoint(tmp_path / "base")
    with pytest.raises(CheckpointError, match="holds no adapter"):
        with_lora(base, tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="holds no adapter"):
        with_lora(base, tmp_path / "base")
    write_adapter(tmp_path / "lora", SOME)
    with pytest.raises(CheckpointError, match="the strength of an adapter is nan"):
        with_lora(base, tmp_path / "lora", float("nan"))
    (tmp_path / "lora" / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: there is no such file"):
        with_lora(base, tmp_path / "lora")
