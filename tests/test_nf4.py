"""NF4 against bitsandbytes to the bit, and products with code books against float64."""

from __future__ import annotations

from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch

from backend.kernels.cpu import quantise, rows
from backend.weights import nf4
from backend.weights.nf4 import CodebookLinear
from tests.cpuvariants import VARIANTS, WITHOUT, choose

EVERY_WAY = pytest.mark.parametrize("way", [*VARIANTS, WITHOUT])
FP4 = (0.0, 0.0052, 0.6667, 1.0, 0.3333, 0.5, 0.1667, 0.25, 0.0, -0.0052, -0.6667, -1.0, -0.3333, -0.5, -0.1667, -0.25)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weights_of_all_kinds() -> torch.Tensor:
    values = random(60, 320) * 0.02
    values[1] = 0
    values[2] *= 1e-5
    values[3] *= 1e4
    values[4, ::64] = 50  # one large number in each block
    values[5] = -3
    values[6] = values[6].bfloat16().float()
    values[7, :16] = torch.tensor(nf4.NF4)
    values[8, :15] = nf4.midpoints()  # exactly half-way
    values[8, 15] = 1
    values[9] = 1e-39
    return values


@EVERY_WAY
def test_codes_and_scales_are_those_of_bitsandbytes(monkeypatch: pytest.MonkeyPatch, folder: Path, way: str) -> None:
    choose(monkeypatch, quantise, "quantise", way, folder)
    values = weights_of_all_kinds()
    packed, absmax = nf4.quantise(values)
    expected, state = bnb.functional.quantize_4bit(values, blocksize=64, quant_type="nf4")
    assert torch.equal(packed.flatten(), expected.flatten())
    assert torch.equal(absmax.flatten(), state.absmax)
    assert torch.equal(torch.tensor(nf4.NF4), state.code)
    decoded = bnb.functional.dequantize_4bit(expected, state)
    torch.testing.assert_close(CodebookLinear(packed, absmax).twin(), decoded, rtol=1e-6, atol=0)


@EVERY_WAY
@pytest.mark.parametrize("tokens", [1, 7, 40])
@pytest.mark.parametrize(("count", "columns", "block", "book"), [
    (48, 64, 64, nf4.NF4), (33, 320, 64, FP4), (130, 576, 32, nf4.NF4), (7, 4096, 4096, nf4.NF4), (9, 60, 6, nf4.NF4),
])  # fmt: skip
def test_products_agree_with_float64(
    monkeypatch: pytest.MonkeyPatch, folder: Path, way: str, tokens: int, count: int, columns: int, block: int,
    book: tuple[float, ...],
) -> None:  # fmt: skip
    choose(monkeypatch, rows, "rows", way, folder)
    generator = torch.Generator().manual_seed(columns)
    packed = torch.randint(0, 256, (count, columns // 2), dtype=torch.uint8, generator=generator)
    absmax = torch.rand(count, columns // block, generator=generator)
    linear, x = CodebookLinear(packed, absmax, book), random(tokens, columns)
    exact = torch.stack([packed >> 4, packed & 15], dim=-1).flatten(1).long()
    weight = torch.tensor(book, dtype=torch.float64)[exact] * absmax.double().repeat_interleave(block, 1)
    torch.testing.assert_close(linear.twin().double(), weight, rtol=1e-6, atol=1e-12)
    y = linear(x)
    assert (y.shape, y.dtype) == ((tokens, count), torch.float32)
    in_float32 = way != WITHOUT and tokens <= 12 and block % 32 == 0
    # Else weight, activation and sum are rounded to bfloat16, 8 significant bits each.
    bound = (1e-5 if in_float32 else 3 * 2**-8) * (x.double().abs() @ weight.abs().T)
    assert bool(((y.double() - x.double() @ weight.T).abs() <= bound).all())


@EVERY_WAY
def test_a_row_of_many_is_the_row_alone(monkeypatch: pytest.MonkeyPatch, folder: Path, way: str) -> None:
    choose(monkeypatch, rows, "rows", way, folder)
    linear = CodebookLinear(*nf4.quantise(random(71, 128)))
    x = random(11, 128)
    if way != WITHOUT:
        assert all(torch.equal(linear(x[n : n + 1])[0], linear(x)[n]) for n in range(11))
    assert torch.equal(linear(random(128, 3).T), linear(random(128, 3).T.contiguous()))  # strides
    assert linear(x[:0]).shape == (0, 71)
    x[1, 5] = float("nan")
    assert not torch.isfinite(linear(x)[1]).any()


def test_the_number_of_threads_changes_nothing() -> None:
    values = random(1024, 512)
    linear, x = CodebookLinear(*nf4.quantise(values)), random(3, 512)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append((linear(x), *nf4.quantise(values)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(*pair) for other in found[1:] for pair in zip(found[0], other, strict=True))


def test_other_memory() -> None:
    linear, x = CodebookLinear(*nf4.quantise(random(32, 128)), FP4), random(2, 128)
    copies = [tensor.clone() for tensor in linear.tensors()]
    assert torch.equal(linear.with_tensors(copies)(x), linear(x))
    assert sum(tensor.nbytes for tensor in copies) == linear.nbytes() == 32 * 64 + 4 * 32 * 2
