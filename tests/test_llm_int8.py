"""LLM.int8 against bitsandbytes on the same weights, and against its formula in float64."""

from __future__ import annotations

import logging
from pathlib import Path

import bitsandbytes as bnb
import numpy as np
import pytest
import torch

from backend.kernels.cpu import rows
from backend.weights import llm_int8
from backend.weights.llm_int8 import LlmInt8Linear, integer_product, quantise
from tests.cpuvariants import VARIANTS, WITHOUT, choose

EVERY_WAY = pytest.mark.parametrize("way", [*VARIANTS, WITHOUT])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def planted(tokens: int, columns: int) -> torch.Tensor:
    """Activations with outliers: a large one, a negative one in another token, one at the threshold, one just below."""
    x = random(tokens, columns, seed=tokens)
    x[0, 3] = 60
    x[-1, columns - 1] = -7.5
    x[0, 5] = 6.0
    x[-1, 8] = 5.99
    return x


def reference(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """bitsandbytes' own product, as Linear8bitLt does it when it answers."""
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # that it rounds to float16
    codes, absmax, _ = bnb.functional.int8_vectorwise_quant(weight.half())
    state = bnb.MatmulLtState()
    state.CB, state.SCB, state.threshold = codes, absmax, 6.0
    state.is_training = state.has_fp16_weights = False
    return bnb.matmul(x.clone(), weight, state=state, threshold=6.0)


def formula(x: torch.Tensor, linear: LlmInt8Linear) -> np.ndarray:
    """The paper's decomposition in float64, one step after the other."""
    rounded = x.half().double().numpy()
    large = abs(rounded) >= 6.0
    outliers = large.any(0)
    scale = np.where(large, 0, abs(rounded)).max(1, keepdims=True) / 127
    codes = np.where(outliers, 0, np.rint(rounded / np.where(scale > 0, scale, 1)))
    weight = linear.twin().double().numpy()
    return (codes * scale) @ weight.T + np.where(outliers, x.double().numpy(), 0) @ weight.T


@EVERY_WAY
@pytest.mark.parametrize("tokens", [1, 6, 40])
@pytest.mark.parametrize(("count", "columns"), [(48, 64), (33, 100), (96, 4096)])
def test_it_agrees_with_bitsandbytes(
    monkeypatch: pytest.MonkeyPatch, folder: Path, way: str, tokens: int, count: int, columns: int
) -> None:
    choose(monkeypatch, rows, "rows", way, folder)
    weight, x = random(count, columns, seed=count) * 0.05, planted(tokens, columns)
    linear = LlmInt8Linear(*quantise(weight))
    y, expected = linear(x), reference(x, weight)
    assert (y.shape, y.dtype) == ((tokens, count), torch.float32)
    assert float((y - expected).norm() / expected.norm()) < 1e-4  # asked for: 1e-3
    # A code that falls on the other side of a half would be this much:
    np.testing.assert_allclose(y.double().numpy(), formula(x, linear), atol=2e-3 * float(expected.norm(dim=1).max()))


def test_the_codes_of_weights_are_those_of_bitsandbytes() -> None:
    weight = random(40, 200) * torch.logspace(-3, 3, 40)[:, None]
    weight[3, 17] = 9e4  # beyond float16
    weight[5] = weight[5].bfloat16().float()
    codes, scale = quantise(weight)
    expected, absmax, _ = bnb.functional.int8_vectorwise_quant(weight.clamp(-65504, 65504).half())
    assert torch.equal(codes, expected)
    assert torch.equal(scale, absmax / 127)
    zeros, nothing = quantise(torch.zeros(2, 64))
    assert not zeros.any()
    assert not nothing.any()


@EVERY_WAY
def test_activations_are_quantised_as_in_bitsandbytes(monkeypatch: pytest.MonkeyPatch, folder: Path, way: str) -> None:
    choose(monkeypatch, rows, "rows", way, folder)
    # Sizes of all kinds, also below the least normal float16 and exactly half-way between two codes.
    x = random(30, 300) * torch.logspace(-7, 1, 30)[:, None]
    x[7] = torch.arange(300) / 100 - 1.5
    codes, scale, outliers = llm_int8.quantise_activations(x)
    expected, absmax, columns = bnb.functional.int8_vectorwise_quant(x.half(), threshold=6.0)
    assert torch.equal(outliers, columns)
    assert torch.equal(codes, expected)
    torch.testing.assert_close(scale * 127, absmax, rtol=1e-6, atol=0)


@EVERY_WAY
def test_what_is_no_number_shows(monkeypatch: pytest.MonkeyPatch, folder: Path, way: str) -> None:
    choose(monkeypatch, rows, "rows", way, folder)
    linear = LlmInt8Linear(*quantise(random(32, 128)))
    x = random(3, 128)
    x[0, 9], x[1, 20] = float("nan"), float("inf")
    y = linear(x)
    assert not torch.isfinite(y[:2]).any()
    assert torch.isfinite(linear(x[2:])).all()
    assert not linear(torch.zeros(2, 128)).any()


@EVERY_WAY
def test_a_row_of_many_is_the_row_alone(monkeypatch: pytest.MonkeyPatch, folder: Path, way: str) -> None:
    choose(monkeypatch, rows, "rows", way, folder)
    linear, x = LlmInt8Linear(*quantise(random(70, 256))), random(7, 256)  # no outliers: those depend on the batch
    together = linear(x)
    assert all(torch.equal(linear(x[n : n + 1])[0], together[n]) for n in range(7))
    assert torch.equal(linear(random(256, 7).T), linear(random(256, 7).T.contiguous()))  # strides
    assert linear(x[:0]).shape == (0, 70)


def test_the_number_of_threads_changes_nothing() -> None:
    linear, x = LlmInt8Linear(*quantise(random(1024, 512))), planted(3, 512)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(linear(x))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_sums_of_whole_numbers_are_exact() -> None:
    x = torch.full((3, 11008), 127, dtype=torch.int8)
    weight = torch.full((20, 11008), 127, dtype=torch.int8)
    weight[1] = -127
    expected = x.long() @ weight.long().T
    assert int(expected.max()) > 2**24
    assert torch.equal(integer_product(x, weight).long(), expected)


def test_sums_are_exact_without_torchs_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm_int8, "_multiplies_int8", lambda *_: False)
    test_sums_of_whole_numbers_are_exact()


def test_other_memory() -> None:
    linear, x = LlmInt8Linear(*quantise(random(32, 64))), planted(2, 64)
    copies = [tensor.clone() for tensor in linear.tensors()]
    assert torch.equal(linear.with_tensors(copies)(x), linear(x))
    assert sum(tensor.nbytes for tensor in copies) == linear.nbytes() == 32 * 64 + 4 * 32
