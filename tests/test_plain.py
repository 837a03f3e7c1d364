"""Products of 16-bit weights with few tokens, in float32: the formula, and the same bits whoever computes a row."""

from __future__ import annotations

import pytest
import torch

from backend.kernels.cpu import build
from backend.kernels.cpu.plain import KINDS, MOST_TOKENS, plain
from backend.weights.linear import PlainLinear

pytestmark = pytest.mark.skipif(build._compiler() is None, reason="not run: there is no C compiler")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "columns"), [(64, 96), (37, 100), (3, 7), (130, 4096), (1, 1)])
def test_it_is_the_product_in_float32(kind: torch.dtype, rows: int, columns: int) -> None:
    random = torch.Generator().manual_seed(rows)
    weight = torch.randn(rows, columns, generator=random).to(kind)
    for tokens in range(1, MOST_TOKENS + 1):
        x = torch.randn(tokens, columns, generator=random)
        found = plain(x, weight)
        assert found is not None
        # A sum of n products in float32 is off by at most n half units in the last place of the sum of sizes.
        bound = columns * 2**-24 * (x.abs().double() @ weight.abs().double().T) + 1e-12
        assert ((found.double() - x.double() @ weight.double().T).abs() <= bound).all()
        assert torch.equal(found, PlainLinear(weight)(x))
        for token in range(tokens):
            alone = plain(x[token : token + 1], weight)
            assert alone is not None
            assert torch.equal(alone[0], found[token])
        cut = torch.cat([PlainLinear(part)(x) for part in weight.split(5)], dim=1)
        assert torch.equal(cut, found)


@pytest.mark.parametrize("kind", KINDS)
def test_special_values_come_through(kind: torch.dtype) -> None:
    weight = torch.zeros(8, 64, dtype=kind)
    weight[0, 3], weight[1, 5], weight[2, 63] = float("inf"), float("nan"), torch.finfo(kind).tiny / 4
    found = plain(torch.ones(1, 64), weight)
    assert found is not None
    assert found[0, 0] == float("inf")
    assert found[0, 1].isnan()
    assert found[0, 2] == weight[2, 63].float() > 0
    assert (found[0, 3:] == 0).all()


def test_it_says_where_it_does_not_apply() -> None:
    weight = torch.zeros(8, 64, dtype=torch.bfloat16)
    assert plain(torch.zeros(MOST_TOKENS + 1, 64), weight) is None
    assert plain(torch.zeros(0, 64), weight) is None
    assert plain(torch.zeros(1, 64), weight.float()) is None
    assert plain(torch.zeros(1, 8), weight.T) is None
