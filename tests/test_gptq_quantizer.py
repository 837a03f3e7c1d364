"""GPTQ: the algorithm against the textbook loop in float64, and rounding to nearest as what to beat."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from backend.weights.gptq import GPTQLayer, Hessian, gptq_quantize, pack, rtn_quantize
from backend.weights.grouped import unpack
from tests import gptqfiles


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def correlated(tokens: int, columns: int, seed: int, spread: float = 0.0) -> torch.Tensor:
    """Inputs that share directions, as those of a language model do; `spread`: how unequal the columns are."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns // 4, columns, generator=generator)
    x = torch.randn(tokens, columns // 4, generator=generator) @ mix / 4
    x += 0.3 * torch.randn(tokens, columns, generator=generator)
    return x * torch.exp(spread * torch.randn(columns, generator=generator))


def random_weight(rows: int, columns: int, seed: int) -> torch.Tensor:
    return 0.05 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def hessian_of(x: torch.Tensor) -> torch.Tensor:
    return 2 * x.double().T @ x.double()


def output_error(x: torch.Tensor, weight: torch.Tensor, layer: GPTQLayer) -> float:
    """||X W^T - X Wq^T||, Wq by the formula of the files and not by the product's own `values`."""
    group = layer.g_idx.long()
    decoded = layer.scales.double().T[:, group] * (layer.codes.double() - layer.zeros.double().T[:, group])
    return float((x.double() @ (weight.double() - decoded).T).norm())


def textbook(
    weight: torch.Tensor, hessian: torch.Tensor, bits: int, size: int, act_order: bool, sym: bool, damp: float = 0.01
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scales, zeros and groups by the paper's algorithm 1: float64, no blocks, H^-1 itself inverted."""
    w, h = weight.double().clone(), hessian.double().clone()
    columns = w.shape[1]
    dead = h.diag() == 0
    h[dead, dead] = 1
    w[:, dead] = 0
    order = torch.argsort(h.diag(), descending=True, stable=True) if act_order else torch.arange(columns)
    w, h = w[:, order], h[order][:, order]
    h += damp * h.diag().mean() * torch.eye(columns, dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    codes, scales, zeros, top = torch.zeros_like(w), [], [], 2**bits - 1
    for i in range(columns):
        if i % size == 0:
            low, high = w[:, i : i + size].amin(1).clamp(max=0), w[:, i : i + size].amax(1).clamp(min=0)
            if sym:
                high = torch.maximum(-low, high)
                low = -high
            scales.append(((high - low).float() / top).half())
            scale = scales[-1].double()
            zero = torch.full_like(scale, 2 ** (bits - 1)) if sym else (-low / scale).round()
            zeros.append(zero)
        codes[:, i] = ((w[:, i] / scale).round() + zero).clamp(0, top)
        error = (w[:, i] - scale * (codes[:, i] - zero)) / upper[i, i]
        w[:, i + 1 :] -= error[:, None] * upper[i, i + 1 :]
    place = torch.argsort(order)
    return codes[:, place], torch.stack(scales), torch.stack(zeros), place // size


# the algorithm --------------------------------------------------------------------------------------------------------


def test_the_hessian_is_that_of_float64() -> None:
    x = correlated(80, 1100, 0)  # wider than one product, so that the mirrored half counts
    hessian = Hessian(1100)
    for sample in x.split(20):
        hessian.add(sample)
    expected = np.zeros((1100, 1100))
    for row in x.double().numpy():
        expected += np.outer(row, row)
    found = hessian.matrix().numpy()
    assert hessian.samples == 4
    np.testing.assert_allclose(found, 2 / 4 * expected, atol=1e-6 * np.abs(expected).max())
    assert np.array_equal(found, found.T)


CASES = [
    # columns, bits, group, act-order, sym, block
    (64, 4, 16, False, False, 128),
    (200, 4, 128, True, False, 128),
    (160, 3, 160, True, True, 128),
    (150, 4, 50, False, False, 128),
    (300, 8, 256, True, False, 128),
    (96, 2, 48, False, True, 20),
    (96, 2, 32, True, False, 1),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("columns", "bits", "group", "act_order", "sym", "block"), CASES)
def test_codes_are_those_of_the_textbook_loop(
    columns: int, bits: int, group: int, act_order: bool, sym: bool, block: int, dtype: torch.dtype
) -> None:
    x, weight = correlated(400, columns, 1, spread=0.5), random_weight(24, columns, 2)
    hessian = hessian_of(x)
    found = gptq_quantize(weight, hessian.to(dtype), bits, group, act_order, sym, block=block)
    codes, scales, zeros, groups = textbook(weight, hessian, bits, group, act_order, sym)
    assert torch.equal(found.g_idx.long(), groups)
    same = found.codes == codes
    # In float32 a number may fall on the other side of a half, and then the rest of its row goes another way.
    assert bool(same.all()) if dtype == torch.float64 else float(same.all(1).double().mean()) > 0.9
    rows = same.all(1)
    assert torch.equal(found.scales[:, rows], scales[:, rows])
    assert torch.equal(found.zeros[:, rows].double(), zeros[:, rows])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [-1, 32, 128])
@pytest.mark.parametrize("sym", [False, True])
def test_the_output_errs_less_than_with_rounding(bits: int, group: int, sym: bool) -> None:
    x, weight = correlated(600, 256, 3), random_weight(64, 256, 4)
    nearest = output_error(x, weight, rtn_quantize(weight, bits, group, sym))
    for act_order in (False, True):
        layer = gptq_quantize(weight, hessian_of(x), bits, group, act_order, sym)
        assert output_error(x, weight, layer) < 0.65 * nearest
        assert layer.scales.shape == layer.zeros.shape == (1 if group == -1 else 256 // group, 64)
        assert int(layer.zeros.min()) >= 1
    # It is a trade: the weights themselves are further off than those rounded to the nearest.
    apart = [float((weight - each.values()).norm()) for each in (layer, rtn_quantize(weight, bits, group, sym))]
    assert apart[0] > apart[1]


def test_large_inputs_first_where_columns_are_unequal() -> None:
    for seed in range(4):
        x, weight = correlated(600, 256, 10 + seed, spread=1.5), random_weight(64, 256, 20 + seed)
        hessian = hessian_of(x)
        plain, sorted_ = (
            output_error(x, weight, gptq_quantize(weight, hessian, 4, 64, act_order=on)) for on in (False, True)
        )
        assert sorted_ < 0.9 * plain
    layer = gptq_quantize(weight, hessian, 4, 64, act_order=True)
    energy = hessian.diag()
    groups = [energy[layer.g_idx == group] for group in range(4)]
    assert all(len(one) == 64 for one in groups)
    assert all(float(one.min()) >= float(other.max()) for one, other in zip(groups, groups[1:]))


def test_columns_that_never_see_an_input() -> None:
    x, weight = correlated(300, 64, 5), random_weight(16, 64, 6)
    dead = [3, 40, 63]
    x[:, dead] = 0
    weight[:, dead] = 100.0  # would spoil every scale
    before = hessian_of(x)
    hessian = before.clone()
    layer = gptq_quantize(weight, hessian, 4, 16)
    assert torch.equal(hessian, before)
    assert not bool(layer.values()[:, dead].any())
    assert float(layer.scales.max()) < 0.1
    codes, *_ = textbook(weight, hessian, 4, 16, False, False)
    assert torch.equal(layer.codes.double(), codes)


def test_a_hessian_without_an_inverse_gets_more_damp() -> None:
    x, weight = correlated(5, 64, 7), random_weight(16, 64, 8)  # five inputs, rank five
    layer = gptq_quantize(weight, hessian_of(x).float(), 4, 32, damp=0.0)
    assert output_error(x, weight, layer) < output_error(x, weight, rtn_quantize(weight, 4, 32))


def test_no_zero_point_of_zero_is_made() -> None:
    """Stored minus one it would be -1, which programs read as 0 or as 16."""
    weight = random_weight(8, 64, 9).abs()
    weight[3] = 0
    weight[4] = -weight[4]
    for layer in (rtn_quantize(weight, 4, 32), gptq_quantize(weight, hessian_of(correlated(200, 64, 1)), 4, 32)):
        assert int(layer.zeros.min()) == 1
        assert int(layer.zeros.max()) == 15
        assert not bool(layer.values()[3].any())
    step = rtn_quantize(weight, 4, 32)
    bound = step.scales.float().T[:, step.g_idx.long()] * 0.51
    assert bool(((step.values() - weight).abs() <= bound).all())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w, h: w.mul_(float("nan")), "weights are not finite"),
        (lambda w, h: h.fill_(float("inf")), "calibration are not finite"),
        (lambda w, h: w.mul_(1e9), "more than f16 can hold"),
    ],
)
def test_numbers_that_cannot_be(change, words: str) -> None:
    weight, hessian = random_weight(8, 32, 1), hessian_of(correlated(50, 32, 2))
    change(weight, hessian)
    with pytest.raises(ValueError, match=words):
        gptq_quantize(weight, hessian, 4, 32)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_words_are_packed_as_the_files_have_them(bits: int) -> None:
    codes = torch.randint(2**bits, (5, 96), generator=torch.Generator().manual_seed(bits)).to(torch.uint8)
    words = pack(codes, bits)
    assert torch.equal(words, torch.from_numpy(gptqfiles.pack(codes.T.numpy(), bits).T.copy()))
    assert torch.equal(unpack(words, bits), codes)
    with pytest.raises(ValueError, match="whole words"):
        pack(codes[:, :33], bits)
