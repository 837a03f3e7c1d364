"""Samplers against numpy formulas written from the papers, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from backend.engine.request import Request
from backend.params import KNOBS, GenerationParams
from backend.sampling import samplers
from backend.sampling.chain import log_probability
from backend.sampling.sampler import Sampler

NEUTRAL = GenerationParams.from_mapping({knob.name: knob.neutral for knob in KNOBS})
ALMOST_ONE = 1 - 2**-53


def sample(
    logits: torch.Tensor, params: GenerationParams, history: list[int], uniform: float, *, compiled: bool = True
) -> int:
    """One token after this prompt, with this number for chance."""
    token = Sampler(params, history, lambda: uniform, compiled=compiled).next(logits).token
    assert token is not None
    return token


def row(size: int = 200, seed: int = 0, spread: float = 3.0) -> torch.Tensor:
    """Logits without ties."""
    random = np.random.default_rng(seed)
    values = random.standard_normal(size) * spread
    return torch.tensor(values + np.arange(size) * 1e-5, dtype=torch.float32)


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits.astype(np.float64) - logits.max())
    return powers / powers.sum()


def kept(logits: torch.Tensor) -> set[int]:
    return set(torch.isfinite(logits).nonzero().flatten().tolist())


def with_params(**values: object) -> GenerationParams:
    return GenerationParams.from_mapping(values, NEUTRAL)


# each sampler by its formula --------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 40, 199, 200, 1000])
def test_top_k(k: int) -> None:
    logits = row()
    best = np.argsort(-logits.numpy(), kind="stable")[:k]
    out = samplers.top_k(logits, k)
    assert kept(out) == set(best.tolist())
    assert torch.equal(out[best], logits[best])


def nucleus(probabilities: np.ndarray, p: float) -> set[int]:
    """The smallest set of the likeliest tokens that reaches p (Holtzman et al. 2020)."""
    chosen: list[int] = []
    mass = 0.0
    for token in np.argsort(-probabilities, kind="stable"):
        if mass >= p and chosen:
            break
        chosen.append(int(token))
        mass += probabilities[token]
    return set(chosen)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9, 0.95, 0.999])
@pytest.mark.parametrize("seed", range(5))
def test_top_p(p: float, seed: int) -> None:
    logits = row(seed=seed)
    assert kept(samplers.top_p(logits, p)) == nucleus(softmax(logits.numpy()), p)


@pytest.mark.parametrize(
    ("spread", "p", "shortcut"),
    [(4, 0.9, True), (6, 0.99, True), (4, 0.99, False), (0.1, 0.2, False), (0.1, 0.9, False)],
)
def test_top_p_with_a_large_vocabulary(spread: float, p: float, shortcut: bool) -> None:
    # Steep rows end within the 1,024 likeliest, flat ones need the full sort: the answer is one definition.
    logits = row(20_000, seed=3, spread=spread)
    exact, found = nucleus(softmax(logits.numpy()), p), kept(samplers.top_p(logits, p))
    assert len(exact ^ found) <= len(exact) // 5000  # float32 sums may move the last places of a flat row
    assert (len(exact) < 1024) == shortcut


@pytest.mark.parametrize("p", [1e-30, 0.05, 0.5, 1.0])
def test_min_p(p: float) -> None:
    logits = row()
    probabilities = softmax(logits.numpy())
    assert kept(samplers.min_p(logits, p)) == set(np.nonzero(probabilities >= p * probabilities.max())[0].tolist())


@pytest.mark.parametrize("value", [0.05, 0.7, 1.3, 5.0])
def test_temperature(value: float) -> None:
    logits = row(50)
    expected = softmax(logits.numpy().astype(np.float64) / value)
    np.testing.assert_allclose(softmax(samplers.temperature(logits, value).numpy()), expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("value", [1e-3, 1e-20, 1e-39, 5e-324])
def test_a_tiny_temperature_takes_the_likeliest(value: float) -> None:
    for logits in (row(), row() - 100, row() + 100):
        assert sample(logits, with_params(temperature=value), [], 0.999) == int(logits.argmax())


@pytest.mark.parametrize("penalty", [0.5, 1.1, 3.0])
def test_repetition_penalty(penalty: float) -> None:
    logits, used = torch.tensor([2.0, -2.0, 0.0, 1.0, -1.0]), [0, 1, 2]
    expected = [2.0 / penalty, -2.0 * penalty, 0.0, 1.0, -1.0]
    np.testing.assert_allclose(samplers.repetition_penalty(logits, torch.tensor(used), penalty), expected, rtol=1e-6)
    assert logits.tolist() == [2.0, -2.0, 0.0, 1.0, -1.0], "the row that was given is not changed"


def test_log_probability() -> None:
    logits = row()
    expected = np.log(softmax(logits.numpy()))
    assert [log_probability(logits, i) for i in range(200)] == pytest.approx(expected.tolist(), abs=1e-5)


# drawing ----------------------------------------------------------------------------------------------------------


def test_draw_is_the_inverse_of_the_cumulative_distribution() -> None:
    logits = torch.log(torch.tensor([0.1, 0.2, 0.3, 0.4]))
    drawn = [samplers.draw(logits, u) for u in (0.0, 0.0999, 0.1001, 0.2999, 0.3001, 0.5999, 0.6001, ALMOST_ONE)]
    assert drawn == [0, 0, 1, 1, 2, 2, 3, 3]


def test_draws_follow_the_distribution() -> None:
    logits, count = row(20, spread=1.0), 20_000
    uniforms = np.random.default_rng(5).random(count)
    seen = np.bincount([samplers.draw(logits, u) for u in uniforms], minlength=20)
    expected = softmax(logits.numpy()) * count
    chi_square = ((seen - expected) ** 2 / expected).sum()
    assert chi_square < 43.8  # 19 degrees of freedom: exceeded once in a thousand times


def test_a_chain_follows_its_distribution() -> None:
    params, logits, count = with_params(temperature=1.7, top_k=6, top_p=0.9, min_p=0.05), row(30, spread=1.5), 5_000
    probabilities = softmax(logits.numpy())
    best = np.argsort(-probabilities)[:6]
    among = {int(i): probabilities[i] / probabilities[best].sum() for i in best}
    kept_by_top_p = nucleus(np.array([among.get(i, 0.0) for i in range(30)]), 0.9)
    inside = [i for i in kept_by_top_p if probabilities[i] >= 0.05 * probabilities.max()]
    weights = softmax(logits.numpy().astype(np.float64)[inside] / 1.7)
    uniforms = np.random.default_rng(6).random(count)
    drawn = [sample(logits, params, [], u) for u in uniforms]
    assert set(drawn) == set(inside)
    chi_square = sum((drawn.count(i) - count * w) ** 2 / (count * w) for i, w in zip(inside, weights))
    assert chi_square < 20.5  # at most 5 degrees of freedom: once in a thousand times


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    top_k=st.integers(0, 8),
    top_p=st.floats(0, 1),
    min_p=st.floats(0, 1),
    temperature=st.floats(1e-3, 5),
    uniform=st.sampled_from([0.0, 5e-324, 1e-17, 0.5, 1 - 1e-9, 1 - 2**-52, ALMOST_ONE]),
)
def test_a_removed_token_is_never_drawn(
    seed: int, top_k: int, top_p: float, min_p: float, temperature: float, uniform: float
) -> None:
    logits = row(16, seed)
    logits[0] = logits[-1] = float("-inf")  # where rounding would fall to
    params = with_params(top_k=top_k, top_p=top_p, min_p=min_p, temperature=temperature)
    token = sample(logits, params, [], uniform)
    order = np.argsort(-logits.numpy(), kind="stable").tolist()
    probabilities = softmax(logits.numpy())
    assert np.isfinite(logits[token])
    assert not top_k or order.index(token) < top_k
    assert probabilities[token] >= min_p * probabilities.max() * (1 - 1e-5)
    before = sum(probabilities[t] for t in order[: order.index(token)])
    assert order[0] == token or before < top_p + 1e-5 or top_k  # with top-k, mass is counted among the kept


def test_greedy_ignores_the_random_number() -> None:
    assert {sample(row(), with_params(temperature=0), [], u) for u in (0.0, 0.5, ALMOST_ONE)} == {int(row().argmax())}


def test_greedy_feels_the_penalty() -> None:
    logits = torch.tensor([5.0, 4.0, 1.0])
    assert sample(logits, with_params(temperature=0, repetition_penalty=2.0), [0], 0.0) == 1


# neutral values ---------------------------------------------------------------------------------------------------


def test_neutral_values_add_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    for name in ("repetition_penalty", "likeliest", "top_p", "min_p", "temperature"):
        real = getattr(samplers, name)

        def noted(*args: object, name: str = name, real: Callable[..., object] = real) -> object:
            called.append(name)
            return real(*args)

        monkeypatch.setattr(samplers, name, noted)
    sample(row(), NEUTRAL, [1, 2], 0.5, compiled=False)
    assert called == []
    params = with_params(repetition_penalty=1.2, top_k=9, top_p=0.9, min_p=0.1, temperature=0.5)
    sample(row(), params, [1], 0.5, compiled=False)
    assert called == ["repetition_penalty", "likeliest", "top_p", "min_p", "temperature"]


# random streams ---------------------------------------------------------------------------------------------------


class Nobody:
    def on_token(self, token_id: int, logprob: float | None, *, visible: bool = True) -> bool:
        return False

    def on_finish(self, reason: str, error: Exception | None = None) -> None: ...


def uniforms(seed: int | None, count: int = 5) -> list[float]:
    request = Request((1,), GenerationParams(seed=seed), frozenset(), Nobody(), 64)  # type: ignore[arg-type]
    return [request.uniform() for _ in range(count)]


def test_seeds() -> None:
    assert uniforms(7) == uniforms(7)
    assert uniforms(7) != uniforms(8)
    assert uniforms(None) != uniforms(None)
    assert all(0 <= u < 1 for u in uniforms(2**63 - 1, 1000))
    # Another implementation of the same published generator (Philox4x64-10, Salmon et al. 2011) is its own oracle.
    assert uniforms(7) == np.random.Generator(np.random.Philox(7)).random(5).tolist()
    assert math.isclose(np.mean(uniforms(1, 4000)), 0.5, abs_tol=0.02)


@pytest.mark.parametrize("seed", range(5))
def test_the_short_row_draws_what_the_full_row_would(seed: int) -> None:
    logits = row(5000, seed=seed)
    params = with_params(top_k=40, top_p=0.9, min_p=0.02, temperature=0.8)
    full = samplers.temperature(samplers.min_p(samplers.top_p(samplers.top_k(logits, 40), 0.9), 0.02), 0.8)
    for uniform in np.linspace(0, ALMOST_ONE, 101):
        assert sample(logits, params, [], float(uniform)) == samplers.draw(full, float(uniform))
