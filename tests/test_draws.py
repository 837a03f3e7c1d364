"""The compiled draw: against the chain of torch operations, and against numpy by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from backend.errors import SamplingError
from backend.kernels.cpu import draws
from backend.kernels.cpu.draws import Cut, Draw, finite_rows
from backend.params import GenerationParams
from backend.sampling.sampler import Sampler
from tests.cpuvariants import VARIANTS, WITHOUT, choose

NEVER = float("-inf")


@pytest.fixture(params=VARIANTS)
def variant(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> str:
    choose(monkeypatch, draws, "draw", request.param, tmp_path_factory.getbasetemp() / "draws")
    return str(request.param)


def by_hand(logits: NDArray[np.float32], cuts: Sequence[tuple[Cut, float]]) -> tuple[NDArray[np.int64], NDArray]:
    """Ids that are left, rising, and the ends of their shares of [0, 1]; float64."""
    ids = np.argsort(-logits, kind="stable")
    ids, values = ids[: int(cuts[0][1])], logits[ids][: int(cuts[0][1])].astype(np.float64)
    for cut, value in cuts[1:]:
        shares = np.exp(values - values[0]) / np.exp(values - values[0]).sum()
        if cut == "top_k":
            count = int(value)
        elif cut == "top_p":
            count = max(1, int((shares.cumsum() - shares < value).sum()))
        elif cut == "min_p":
            count = int((np.log(shares / shares[0]) >= value).sum())
        else:
            count, values = len(values), (values - values[0]) / value
        ids, values = ids[:count], values[:count]
    order = np.argsort(ids)
    weights = np.exp(values - values[0])[order]
    return ids[order], weights.cumsum() / weights.sum()


CHAINS: dict[str, list[tuple[Cut, float]]] = {
    "one": [("top_k", 1)],
    "usual": [("top_k", 40), ("top_p", 0.95), ("min_p", float(np.log(np.float32(0.05)))), ("temperature", 0.7)],
    "only top-k": [("top_k", 100)],
    "wide": [("top_k", 1024), ("temperature", 1.5), ("top_p", 0.5)],
    "hot first": [("top_k", 60), ("temperature", 3.0), ("min_p", -2.0), ("top_k", 7)],
    "cold": [("top_k", 5), ("temperature", 1e-30)],
}


@pytest.mark.parametrize("size", [1, 5, 63, 300, 4096, 4111, 49152, 128256])
@pytest.mark.parametrize("chain", CHAINS)
def test_a_draw_is_the_inverse_of_what_the_cuts_leave(variant: str, chain: str, size: int) -> None:
    draw = Draw.of(CHAINS[chain])
    assert draw is not None
    random = np.random.default_rng(size)
    for spread in (0.5, 3.0, 12.0):
        logits = (random.standard_normal(size) * spread).astype(np.float32)
        ids, ends = by_hand(logits, CHAINS[chain])
        for uniform in random.random(20):
            if np.abs(ends - uniform).min() > 1e-5:  # so near to an end rounding may decide
                expected = int(ids[np.searchsorted(ends, uniform, side="right")])
                assert draw(torch.from_numpy(logits), float(uniform)) == expected


def test_of_equal_logits_the_first_are_kept(variant: str) -> None:
    draw = Draw.of([("top_k", 3)])
    assert draw is not None
    row = torch.zeros(5000)
    assert [draw(row, uniform) for uniform in (0.0, 0.34, 0.99)] == [0, 1, 2]
    row[4999] = 1.0
    assert {draw(row, uniform) for uniform in np.linspace(0, 0.999, 50)} == {0, 1, 4999}


@pytest.mark.parametrize("place", [0, 17, 2500, 4998])
def test_what_is_removed_is_never_drawn(variant: str, place: int) -> None:
    draw = Draw.of([("top_k", 40), ("top_p", 1.0), ("temperature", 2.0)])
    assert draw is not None
    row = torch.full((4999,), NEVER)
    row[place] = -1e30
    assert {draw(row, uniform) for uniform in (0.0, 0.5, 0.999999)} == {place}


@pytest.mark.parametrize("size", [5, 300, 4111])
def test_what_is_barred_counts_as_removed(variant: str, size: int) -> None:
    draw = Draw.of([("top_k", 3), ("temperature", 1.5)])
    assert draw is not None
    random = np.random.default_rng(size)
    for count in (1, 3, min(size - 1, 1021)):
        row = torch.from_numpy(random.standard_normal(size).astype(np.float32))
        best = row.argsort(descending=True)[:count]
        removed = row.index_fill(0, best, NEVER)
        for uniform in random.random(20):
            assert draw(row, uniform, best.tolist()) == draw(removed, uniform)
        assert draw(row, 0.5, [size, size + 7]) == draw(row, 0.5), "ids of no row bar nothing"
    assert draw(row[:3], 0.5, [0, 1, 2]) == -1


@pytest.mark.parametrize("ends", [1, 100, 2000])
@pytest.mark.parametrize("values", [{"ignore_eos": True}, {"min_tokens": 5, "stop_token_ids": (8, 11)}])
def test_what_would_end_a_reply_is_barred_as_by_torch(values: dict[str, object], ends: int, variant: str) -> None:
    """As long as it must not end; of 2,000 that are too many for the short way it is the long one."""
    params = GenerationParams(seed=5, temperature=1.3, **values)  # type: ignore[arg-type]

    def drawn(compiled: bool) -> list[int | None]:
        numbers = np.random.Generator(np.random.Philox(5))
        own = Sampler(params, (), lambda: float(numbers.random()), end_ids=frozenset(range(ends)), compiled=compiled)
        assert own._direct == (compiled and ends < 1000)
        random = torch.Generator().manual_seed(1)
        return [own.next(torch.randn(3000, generator=random) * 3).token for _ in range(60)]

    found = drawn(True)
    assert found == drawn(False)
    if "ignore_eos" in values:
        assert min(token or 0 for token in found) >= ends
    none_left = Sampler(params, (), lambda: 0.5, end_ids=frozenset(range(ends)))
    with pytest.raises(SamplingError, match="leave no token"):
        none_left.next(torch.zeros(1))


def test_a_row_of_another_row_and_one_that_is_not_in_one_piece(variant: str) -> None:
    draw = Draw.of([("top_k", 1)])
    assert draw is not None
    rows = torch.randn(3, 777)
    assert [draw(row, 0.0) for row in rows] == rows.argmax(dim=1).tolist()
    assert draw(rows[:, 5], 0.0) == int(rows[:, 5].argmax())


@pytest.mark.parametrize(
    ("values", "short"),
    [
        ({}, True),
        ({"temperature": 0.0}, True),
        ({"temperature": 0.0, "repetition_penalty": 1.3}, True),
        ({"repetition_penalty": 1.2, "frequency_penalty": 0.5, "temperature": 1.2}, True),
        ({"sampler_order": ("temperature", "top_k")}, True),
        ({"sampler_order": ("top_k", "temperature", "top_p"), "temperature": 1.7}, True),
        ({"ignore_eos": True, "logit_bias": ((3, 5.0), (90, -100.0))}, True),
        ({"top_k": 0}, False),
        ({"top_k": 5000}, False),
        ({"xtc_probability": 0.5}, False),
        ({"typical_p": 0.9}, False),
        ({"dynatemp_low": 0.5, "dynatemp_high": 1.5}, False),
        ({"mirostat": 2}, False),
    ],
)
def test_the_same_tokens_as_by_torch(values: dict[str, object], short: bool, variant: str) -> None:
    params = GenerationParams(seed=5, **values)  # type: ignore[arg-type]

    def drawn(compiled: bool) -> list[int | None]:
        numbers = np.random.Generator(np.random.Philox(5))
        own = Sampler(params, (1, 2, 3), lambda: float(numbers.random()), end_ids=frozenset({7}), compiled=compiled)
        assert (own._drawing is not None) == (compiled and short)
        random = torch.Generator().manual_seed(1)
        return [own.next(torch.randn(6000, generator=random) * 3).token for _ in range(200)]

    assert drawn(True) == drawn(False)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), NEVER])
@pytest.mark.parametrize("size", [1, 31, 1000])
def test_rows_that_are_not_finite(variant: str, bad: float, size: int) -> None:
    rows = torch.randn(4, size)
    rows[1, 0], rows[3, size - 1] = bad, -bad
    assert finite_rows(rows) == [True, False, True, False]
    assert finite_rows(rows.T.contiguous().T) == [True, False, True, False]


def test_without_a_compiler_torch_draws(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    choose(monkeypatch, draws, "draw", WITHOUT, tmp_path)
    assert Draw.of([("top_k", 1)]) is None
    assert finite_rows(torch.tensor([[1.0, float("nan")], [1.0, 2.0]])) == [False, True]


def test_no_draw_for_what_it_cannot_do(variant: str) -> None:
    assert Draw.of([]) is None
    assert Draw.of([("top_p", 0.5)]) is None
    assert Draw.of([("top_k", draws.MOST + 1)]) is None
