"""Weight-only int8: codes, products, and what a file becomes with `weights: int8` and `weights: llm-int8`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from backend.kernels.cpu import rows
from backend.placement.linears import build
from backend.weights.blocks import Q4_0, Q4_1
from backend.weights.bnb import Int8Rows
from backend.weights.encode import quantize
from backend.weights.int8 import Int8Linear, quantise
from backend.weights.linear import SplitLinear
from backend.weights.llm_int8 import LlmInt8Linear
from backend.weights.llm_int8 import quantise as quantise_as_bitsandbytes
from backend.weights.lora import LoraLinear, LowRank
from backend.weights.stored import Blocks, Joined, Plain, Stored
from tests.cpuvariants import VARIANTS, WITHOUT, choose


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


@pytest.mark.parametrize("weights", ["int8", "llm-int8"])
@pytest.mark.parametrize("name", sources())
def test_any_source_becomes_rows_of_int8(name: str, weights: str) -> None:
    source, x = sources()[name], random(3, 64, seed=3)
    linear = build([source, source], weights)
    assert isinstance(linear, Int8Linear if weights == "int8" else LlmInt8Linear)
    exact = torch.cat([source.float32(), source.float32()])
    assert linear.nbytes() == 96 * 64 + 4 * 96
    step = exact.abs().amax(1, keepdim=True) / 127
    assert bool(((linear.twin() - exact).abs() <= step * 0.51 + 2**-11 * exact.abs()).all())
    expected = (quantise if weights == "int8" else quantise_as_bitsandbytes)(exact)
    assert all(torch.equal(*pair) for pair in zip(linear.tensors(), expected, strict=True))
    assert float((linear(x) - x @ exact.T).norm() / (x @ exact.T).norm()) < 0.02


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
