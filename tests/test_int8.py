"""Weight-only int8: codes, products, and what a file becomes with `weights: int8` and `weights: llm-int8`."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from backend.checkpoint.open import open_checkpoint
from backend.engine.compiled import CompiledStep
from backend.kernels.cpu import quantise as quantise_compiled
from backend.kernels.cpu import rows
from backend.kernels.cpu.build import compiled_products
from backend.placement import quantised, sizes
from backend.placement.linears import build
from backend.placement.load import load_model
from backend.placement.parts import placed_bytes
from backend.weights.blocks import Q4_0, Q4_1, Q8_0
from backend.weights.bnb import Int8Rows
from backend.weights.decode import dequantize
from backend.weights.encode import quantize
from backend.weights.int8 import Int8Linear, quantise, quantise_blocks, quantise_blocks_twin
from backend.weights.linear import SplitLinear
from backend.weights.llm_int8 import LlmInt8Linear
from backend.weights.llm_int8 import quantise as quantise_as_bitsandbytes
from backend.weights.lora import LoraLinear, LowRank
from backend.weights.stored import Blocks, Joined, Plain, Stored
from backend.weights.tiled import TiledLinear
from tests.cpuvariants import VARIANTS, WITHOUT, choose
from tests.forward import Session
from tests.tiny import TinyModel, write_tiny

needs_tiles = pytest.mark.skipif(not compiled_products(), reason="there is no C compiler here")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_code_is_the_nearest_of_255() -> None:
    values = random(50, 300) * torch.logspace(-6, 4, 50)[:, None]
    values[3] = 0
    codes, scale = quantise(values)
    assert (codes.dtype, codes.shape, scale.dtype, scale.shape) == (torch.int8, (50, 300), torch.float32, (50,))
    exact = values.double().numpy()
    step = abs(exact).max(1, keepdims=True) / 127
    assert (abs(codes.numpy() * step - exact) <= step * (0.5 + 1e-4)).all()
    assert (codes.abs().amax(1) == 127).sum() == 49
    np.testing.assert_allclose(scale.numpy(), step[:, 0], rtol=1e-6)


@pytest.mark.parametrize("way", [*VARIANTS, WITHOUT])
@pytest.mark.parametrize("tokens", [1, 6, 9])
@pytest.mark.parametrize(("count", "columns"), [(48, 64), (33, 100), (130, 576), (7, 4099), (1, 1)])
def test_products_agree_with_float64(
    monkeypatch: pytest.MonkeyPatch, folder: Path, way: str, tokens: int, count: int, columns: int
) -> None:
    choose(monkeypatch, rows, "rows", way, folder)
    linear, x = Int8Linear(*quantise(random(count, columns))), random(tokens, columns, seed=1)
    y, weight = linear(x), linear.twin().double()
    assert (y.shape, y.dtype) == ((tokens, count), torch.float32)
    in_float32 = way != WITHOUT and tokens <= 8
    bound = (1e-5 if in_float32 else 3 * 2**-8) * (x.double().abs() @ weight.abs().T)
    assert bool(((y.double() - x.double() @ weight.T).abs() <= bound).all())
    assert linear(x[:0]).shape == (0, count)
    if in_float32:
        assert all(torch.equal(linear(x[n : n + 1])[0], y[n]) for n in range(tokens))
    x[0, 0] = float("nan")
    assert not torch.isfinite(linear(x)[0]).any()


# from a file ------------------------------------------------------------------------------------------------------


def sources() -> dict[str, Stored]:
    values = random(48, 64) * 0.1
    return {
        "float32": Plain(values),
        "bfloat16": Plain(values.bfloat16()),
        "two types": Joined([Plain(values[:, :32]), Plain(values[:, 32:].half())], 1),
        "Q4_1": Blocks(quantize(values, Q4_1), Q4_1),
        "with a merged adapter": LowRank(Plain(values), random(2, 64, seed=1), random(48, 2, seed=2), 0.1),
    }


@pytest.mark.parametrize(("weights", "device"), [("int8", "cuda"), ("llm-int8", "cpu")])
@pytest.mark.parametrize("name", sources())
def test_any_source_becomes_rows_of_int8(name: str, weights: str, device: str) -> None:
    source, x = sources()[name], random(3, 64, seed=3)
    linear = build([source, source], weights, device)
    assert isinstance(linear, Int8Linear if weights == "int8" else LlmInt8Linear)
    exact = torch.cat([source.float32(), source.float32()])
    assert linear.nbytes() == 96 * 64 + 4 * 96
    step = exact.abs().amax(1, keepdim=True) / 127
    assert bool(((linear.twin() - exact).abs() <= step * 0.51 + 2**-11 * exact.abs()).all())
    expected = (quantise if weights == "int8" else quantise_as_bitsandbytes)(exact)
    assert all(torch.equal(*pair) for pair in zip(linear.tensors(), expected, strict=True))
    assert float((linear(x) - x @ exact.T).norm() / (x @ exact.T).norm()) < 0.02


@needs_tiles
@pytest.mark.parametrize("name", sources())
def test_on_the_cpu_any_source_becomes_blocks_in_tiles(name: str) -> None:
    source, x = sources()[name], random(3, 64, seed=3)
    linear = build([source, source], "int8")
    assert isinstance(linear, TiledLinear)
    assert (linear.format, linear.nbytes()) == (Q8_0, 96 * 64 * 34 // 32)
    exact = torch.cat([source.float32(), source.float32()])
    assert torch.equal(linear.twin(), dequantize(quantise_blocks_twin(exact), Q8_0))
    assert float((linear(x) - x @ exact.T).norm() / (x @ exact.T).norm()) < 0.008


@needs_tiles
def test_a_scale_for_each_32_loses_less_than_one_for_each_row() -> None:
    values = random(32, 1024)
    lost = [float((build([Plain(values)], "int8", device).twin() - values).norm()) for device in ("cpu", "cuda")]
    assert lost[0] < 0.7 * lost[1]  # the largest of 32 normal numbers is 2.1, of 1024 it is 3.2


@needs_tiles
def test_blocks_of_8_bits_are_kept() -> None:
    """Also with scales that quantising would not choose."""
    raw = quantize(random(48, 64) * 0.1, Q8_0)
    raw.view(48, 2, 34)[:, :, 2:] //= 2
    one, other = Blocks(raw, Q8_0), Plain(random(32, 64))
    linear = build([one, other, one], "int8")
    assert torch.equal(linear.twin()[:48], dequantize(raw, Q8_0))
    assert torch.equal(linear.twin()[80:], dequantize(raw, Q8_0))
    assert torch.equal(build([one], "int8").twin(), build([one], "original").twin())


@needs_tiles
def test_matrices_that_do_not_stack_are_products_of_their_own() -> None:
    few, codes = Plain(random(20, 64)), torch.randint(-127, 128, (32, 64), dtype=torch.int8)
    uneven = build([few, few], "int8")
    assert isinstance(uneven, SplitLinear)
    assert [type(part) for part in uneven.parts] == [TiledLinear, TiledLinear]
    mixed = build([Int8Rows(codes, torch.rand(32)), Plain(random(32, 64))], "int8")
    assert isinstance(mixed, SplitLinear)
    assert [type(part) for part in mixed.parts] == [Int8Linear, TiledLinear]
    odd = build([Plain(random(32, 40))], "int8")  # columns are no whole groups
    assert isinstance(odd, Int8Linear)


def test_without_compiled_products_rows_as_they_are_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantised, "multiplies_rightly", lambda _: False)
    monkeypatch.setattr(sizes, "compiled_products", lambda: False)
    checkpoint = open_checkpoint(write_tiny(tmp_path / "m.gguf", TinyModel(weights="F16", tied=False)))
    loaded = load_model(checkpoint, "int8", "tiny")
    assert isinstance(loaded.model.layers[0].wqkv, Int8Linear)
    assert loaded.weight_bytes == sizes.weight_bytes("int8", checkpoint.config, checkpoint.tensors)


@pytest.mark.parametrize("weights", ["int8", "original"])
def test_parts_beside_a_gpu_take_what_the_cpus_form_takes(tmp_path: Path, weights: str) -> None:
    """Rows on the device and tiles on the CPU; the plan knows which."""
    checkpoint = open_checkpoint(write_tiny(tmp_path / "m.gguf", TinyModel(weights="Q8_0", tied=False)))
    products = sizes.products(weights, checkpoint.config, checkpoint.tensors, tiled=False)
    parts = [product.part("cpu" if product.weights[0].kind in ("w1", "w2") else "resident") for product in products]
    loaded = load_model(checkpoint, weights, "tiny", parts=parts, device="meta")
    assert loaded.host_bytes == placed_bytes(parts, "cpu") > 0


@needs_tiles
def test_layers_in_tiles_beside_a_packed_head_are_one_compiled_step(tmp_path: Path) -> None:
    options = {"weights": "Q4_0", "formats": {"token_embd.weight": "Q8_0"}}
    checkpoint = open_checkpoint(write_tiny(tmp_path / "m.gguf", TinyModel(**options)))  # type: ignore[arg-type]
    session = Session(checkpoint, "int8")
    runner = session._runner
    assert CompiledStep.of(runner.model, runner.pool) is not None


# the blocks -------------------------------------------------------------------------------------------------------


def hard_rows() -> torch.Tensor:
    values = random(40, 416) * 0.02
    values[1] = 0
    values[2] *= 1e-6  # scales that are hardly a float16
    values[3] *= 1e-4
    values[4] *= 1e9  # beyond what float16 scales hold
    values[5, ::32] = 50
    values[6] = -3
    values[7] *= 1e-30
    return values


@pytest.mark.parametrize("way", [*VARIANTS, WITHOUT])
def test_compiled_blocks_are_those_of_the_twin(monkeypatch: pytest.MonkeyPatch, folder: Path, way: str) -> None:
    choose(monkeypatch, quantise_compiled, "quantise", way, folder)
    values = hard_rows()
    assert torch.equal(quantise_blocks(values), quantise_blocks_twin(values))
    many = random(300, 1024)  # enough for several threads
    assert torch.equal(quantise_blocks(many), quantise_blocks_twin(many))


def by_gguf(values: torch.Tensor) -> np.ndarray:
    return gguf.quants.quantize(values.numpy(), gguf.GGMLQuantizationType.Q8_0)


def test_every_number_is_as_near_as_its_scale_allows_and_nearer_than_ggmls() -> None:
    values = hard_rows()
    values[4] = random(416)
    blocks = quantise_blocks(values).view(-1, 34)
    found = gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType.Q8_0).astype(np.float64)
    exact, scale = values.view(-1, 32).double().numpy(), blocks[:, :2].view(torch.float16).double().numpy()
    off = abs(found - exact)
    assert (off <= scale * 0.50001 + 1e-25).all()
    ggml = by_gguf(values).reshape(-1, 34)
    usual = scale[:, 0] >= 2.0**-14  # below, the next larger scale may be taken
    np.testing.assert_array_equal(ggml[usual, :2], blocks.numpy()[usual, :2])
    theirs = abs(gguf.quants.dequantize(ggml, gguf.GGMLQuantizationType.Q8_0) - exact)
    assert (off[usual] <= theirs[usual] + 1e-5 * scale[usual]).all()
    assert np.linalg.norm(off) < np.linalg.norm(theirs)


def test_where_scales_need_no_rounding_blocks_are_ggmls() -> None:
    values = random(64, 256) * 0.02
    groups = values.view(-1, 32)
    scale = (groups.abs().amax(1) / 127).half().float()
    groups[:, 5] = 127 * scale  # exact in float32: 7 bits and 11
    groups[:, :5] *= 0.9
    groups[:, 6:] *= 0.9
    found, ggml = (raw.reshape(-1, 34) for raw in (quantise_blocks(values).numpy(), by_gguf(values)))
    np.testing.assert_array_equal(found[:, :2], ggml[:, :2])
    halves = abs((groups / scale[:, None]).numpy() % 1 - 0.5) < 1e-4  # we round these to even, ggml does not
    np.testing.assert_array_equal(found[:, 2:][~halves], ggml[:, 2:][~halves])
    assert halves.mean() < 0.01


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_refused(bad: float) -> None:
    values = random(4, 64)
    values[2, 5] = bad
    with pytest.raises(ValueError, match="not finite"):
        quantise_blocks(values)


# codes that are there ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["original", "int8", "llm-int8"])
def test_codes_that_are_there_are_kept(weights: str) -> None:
    codes = torch.randint(-127, 128, (32, 64), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    stored = Int8Rows(codes, torch.rand(32))
    linear = build([stored, stored], weights)
    assert isinstance(linear, LlmInt8Linear if weights == "llm-int8" else Int8Linear)
    found, scale = linear.tensors()
    assert torch.equal(found, torch.cat([codes, codes]))
    assert torch.equal(scale, torch.cat([stored.scale, stored.scale]))


@pytest.mark.parametrize("weights", ["int8", "llm-int8", "int4", "nf4"])
def test_adapters_of_packed_weights_stay_beside_them(weights: str) -> None:
    base = Blocks(quantize(random(48, 64) * 0.1, Q4_0), Q4_0)
    stored = LowRank(base, random(2, 64, seed=1), random(48, 2, seed=2), 0.1)
    linear, x = build([stored, base], weights), random(3, 64, seed=3)
    assert isinstance(linear, SplitLinear)
    assert isinstance(linear.parts[0], LoraLinear)
    exact = x @ torch.cat([stored.float32(), base.float32()]).T
    assert float((linear(x) - exact).norm() / exact.norm()) < (0.15 if weights == "nf4" else 0.02)
