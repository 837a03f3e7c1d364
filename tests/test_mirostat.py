"""Mirostat 1 and 2 against the formulas of the paper (Basu et al. 2021, arXiv:2007.14966)."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from backend.sampling.mirostat import Mirostat, kept_tokens
from backend.sampling.sampler import Sampler
from tests.test_sampling import row, softmax, with_params


def k_of_the_authors(p: np.ndarray, mu: float) -> float:
    """The estimate and the k of the paper's program, written out: m = 100, the vocabulary for N."""
    p = np.sort(p)[::-1]
    b = sum_b = 0.0
    for i in range(99):
        b = math.log(p[i] / p[i + 1])
        t = math.log((i + 2) / (i + 1))
        sum_b, b = sum_b + t * b, b
    s = sum_b / sum(math.log((i + 2) / (i + 1)) ** 2 for i in range(99))
    eps = s - 1
    return ((eps * 2**mu) / (1 - len(p) ** (-eps))) ** (1 / s)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("mu", [1.0, 4.0, 8.0])
def test_mirostat_1_keeps_the_k_of_the_paper(seed: int, mu: float) -> None:
    logits = row(2000, seed, spread=2.0)
    ordered = torch.log_softmax(logits.sort(descending=True).values, 0)
    expected = min(2000, max(1, int(k_of_the_authors(softmax(logits.numpy()), mu))))
    found = kept_tokens(ordered[:100], 2000, mu)
    assert abs(found - expected) <= 1 + expected // 1000
    mirostat = Mirostat(1, mu / 2, 0.1)
    left = torch.isfinite(mirostat.cut(logits)).nonzero().flatten().tolist()
    assert set(left) == set(logits.argsort(descending=True)[:found].tolist())


def test_mirostat_1_where_its_law_does_not_hold() -> None:
    assert kept_tokens(torch.full((50,), -math.log(50)), 50, 3.0) == 50
    assert kept_tokens(torch.tensor([0.0, float("-inf"), float("-inf")]), 3, 3.0) == 1
    zipf = torch.log_softmax(-torch.log(torch.arange(1.0, 1001.0)), 0)  # s is exactly 1
    assert kept_tokens(zipf[:100], 1000, 3.0) == int(2**3 / math.log(1000))
    assert kept_tokens(torch.tensor([0.0, -1e6]), 2, 60.0) >= 1


def test_mirostat_2_keeps_what_is_not_too_surprising() -> None:
    logits = row(300)
    p = softmax(logits.numpy())
    for tau in (0.2, 1.0, 4.0):
        left = torch.isfinite(Mirostat(2, tau, 0.1).cut(logits)).nonzero().flatten().tolist()
        assert set(left) == set(np.flatnonzero(-np.log2(p) <= 2 * tau).tolist()) | {int(p.argmax())}


@pytest.mark.parametrize("version", [1, 2])
def test_mirostat_draws_from_what_it_kept_and_reaches_its_target(version: int) -> None:
    logits, count, tau = row(400, 4, spread=2.0), 6000, 5.5
    random = np.random.default_rng(1)
    params = with_params(mirostat=version, mirostat_tau=tau, mirostat_eta=0.1, temperature=1.5, top_k=2, min_p=0.9)
    sampler = Sampler(params, [], lambda: float(random.random()))
    logs = torch.log_softmax(logits / 1.5, 0) / math.log(2)
    surprises = [-float(logs[sampler.next(logits).token or 0]) for _ in range(count)]
    assert np.mean(surprises[500:]) == pytest.approx(tau, abs=0.1)
    # with eta 0 mu stands still: one fixed distribution, that of the kept tokens
    fixed = Sampler(
        with_params(mirostat=version, mirostat_tau=tau, mirostat_eta=0.0), [], lambda: float(random.random())
    )
    kept = softmax(Mirostat(version, tau, 0.0).cut(logits).numpy())
    drawn = np.bincount([fixed.next(logits).token or 0 for _ in range(count)], minlength=400)
    assert not drawn[kept == 0].any()
    often = kept * count >= 5
    chi_square = ((drawn - kept * count) ** 2 / np.maximum(kept * count, 1e-9))[often].sum()
    assert chi_square < often.sum() + 4 * math.sqrt(2 * often.sum()) + 11


@pytest.mark.parametrize("version", [1, 2])
def test_tokens_that_were_taken_back_leave_mu_as_it_was(version: int) -> None:
    mirostat = Mirostat(version, 3.0, 0.1)
    seen = [mirostat.mu]
    for place in (3, 40, 7, 0, 99):
        mirostat.cut(row(200, place))
        mirostat.observe(place)
        seen.append(mirostat.mu)
    mirostat.rewind(3)
    assert mirostat.mu == seen[2]
    mirostat.cut(row(200, 7))
    mirostat.observe(7)
    assert mirostat.mu == seen[3]
    mirostat.rewind(1)
    assert mirostat.mu == seen[2]


@pytest.mark.parametrize("version", [1, 2])
def test_a_banned_text_does_not_move_mu(version: int) -> None:
    """Where a reply comes back for a banned text, Mirostat goes on as if it had never been said."""
    pieces = [b"a", b"b", b"c", b"d"]
    params = with_params(mirostat=version, mirostat_tau=1.5, banned_strings=["abc"])
    sampler = Sampler(params, [], lambda: 0.5, token_bytes=pieces.__getitem__)

    def sure(token: int) -> torch.Tensor:
        return torch.tensor([3.0 if place == token else 0.0 for place in range(4)])

    assert sampler._mirostat is not None
    before = sampler._mirostat.mu
    assert [sampler.next(sure(token)).token for token in (0, 1)] == [0, 1]
    assert sampler.next(sure(2)).rewind == 2
    assert sampler._mirostat.mu == before
