"""The less common samplers, against transformers' own and against formulas in float64 from where they are described."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TypicalLogitsWarper,
)

from backend.params import KNOBS, STEPS, GenerationParams
from backend.sampling import bends, cuts, penalties, samplers
from backend.sampling.copies import Copies
from backend.sampling.history import History
from backend.sampling.sampler import Sampler
from tests.test_sampling import NEUTRAL, kept, row, softmax, with_params

SEEDS = pytest.mark.parametrize("seed", range(6))
NO_IDS = torch.zeros((1, 1), dtype=torch.int64)
NOWHERE = np.zeros(0, dtype=bool)


def of_transformers(warper: Callable[..., torch.Tensor], logits: torch.Tensor) -> set[int]:
    return kept(warper(NO_IDS, logits[None].clone())[0])


def with_holes(seed: int) -> torch.Tensor:
    """A row from which an earlier step removed tokens."""
    logits = row(300, seed)
    logits[torch.randperm(300, generator=torch.Generator().manual_seed(seed))[:100]] = float("-inf")
    return logits


# cuts -------------------------------------------------------------------------------------------------------------


@SEEDS
@pytest.mark.parametrize("mass", [0.05, 0.3, 0.9, 0.99])
def test_typical(seed: int, mass: float) -> None:
    for logits in (row(seed=seed), with_holes(seed)):
        # transformers counts how many cumulative sums are below the mass, and keeps one more: the same set
        theirs = of_transformers(TypicalLogitsWarper(mass=mass), logits)
        assert kept(cuts.typical_p(logits, mass)) == theirs


@SEEDS
@pytest.mark.parametrize("epsilon", [3e-4, 0.01, 0.9])
def test_epsilon_and_eta(seed: int, epsilon: float) -> None:
    for logits in (row(seed=seed), with_holes(seed)):
        assert kept(cuts.epsilon_cutoff(logits, epsilon)) == of_transformers(EpsilonLogitsWarper(epsilon), logits)
        assert kept(cuts.eta_cutoff(logits, epsilon)) == of_transformers(EtaLogitsWarper(epsilon), logits)


@SEEDS
@pytest.mark.parametrize("n", [0.5, 1.0, 2.0])
def test_top_n_sigma(seed: int, n: float) -> None:
    logits = with_holes(seed)
    alive = logits.numpy()[np.isfinite(logits.numpy())].astype(np.float64)
    limit = alive.max() - n * alive.std()
    assert kept(cuts.top_n_sigma(logits, n)) == set(np.flatnonzero(logits.numpy() >= limit).tolist())


@SEEDS
@pytest.mark.parametrize("a", [0.1, 0.5, 1.0])
def test_top_a(seed: int, a: float) -> None:
    logits = row(seed=seed)
    p = softmax(logits.numpy())
    assert kept(cuts.top_a(logits, a)) == set(np.flatnonzero(p >= a * p.max() ** 2).tolist())


def tail_free_by_hand(p: np.ndarray, z: float) -> set[int]:
    """The loop of the description: differences, their differences, the share of them that is spent."""
    order = np.argsort(-p, kind="stable")
    first = [p[order[i + 1]] - p[order[i]] for i in range(len(p) - 1)]
    second = [abs(first[i + 1] - first[i]) for i in range(len(first) - 1)]
    out, spent = {int(order[0])}, 0.0
    for i, value in enumerate(second):
        spent += value / sum(second)
        if spent > z:
            break
        out.add(int(order[i + 1]))
    return out


@SEEDS
@pytest.mark.parametrize("z", [0.0, 0.5, 0.95])
def test_tail_free(seed: int, z: float) -> None:
    logits = row(60, seed)
    assert kept(cuts.tail_free(logits, z)) == tail_free_by_hand(softmax(logits.numpy()), z)
    assert kept(cuts.tail_free(torch.zeros(5), 0.5)) == set(range(5))
    assert kept(cuts.tail_free(torch.tensor([1.0, 0.0]), 0.1)) == {0, 1}


def test_xtc() -> None:
    logits = torch.log(torch.tensor([0.4, 0.05, 0.3, 0.2, 0.05]))
    assert kept(cuts.xtc(logits, 0.1, 0.5, 0.49)) == {1, 3, 4}, "the least likely of the three top choices stays"
    assert kept(cuts.xtc(logits, 0.1, 0.5, 0.5)) == {0, 1, 2, 3, 4}, "as often as the probability says"
    assert kept(cuts.xtc(logits, 0.35, 1.0, 0.0)) == {0, 1, 2, 3, 4}, "one top choice is no choice"
    assert kept(cuts.xtc(logits, 0.0, 1.0, 0.0)) == {1}
    removed = torch.tensor([0.4, 0.0, 0.3, 0.2, 0.0]).log()
    assert kept(cuts.xtc(removed, 0.0, 1.0, 0.0)) == {3}, "a token that is removed is none to be spared"


# bends ------------------------------------------------------------------------------------------------------------


@SEEDS
@pytest.mark.parametrize(("low", "high", "exponent"), [(0.2, 1.8, 1.0), (0.5, 3.0, 2.5)])
def test_dynamic_temperature(seed: int, low: float, high: float, exponent: float) -> None:
    logits = with_holes(seed)
    p = softmax(logits.numpy())
    p = p[p > 0]
    share = -(p * np.log(p)).sum() / math.log(len(p))
    expected = softmax(logits.numpy().astype(np.float64) / (low + (high - low) * share**exponent))
    found = softmax(bends.dynamic_temperature(logits, low, high, exponent).numpy())
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-9)


def test_dynamic_temperature_at_its_ends() -> None:
    sure, unsure = torch.tensor([100.0, 0.0, 0.0]), torch.zeros(3)
    assert bends.dynamic_temperature(sure, 0.5, 2.0, 1.0).tolist() == pytest.approx([0.0, -200.0, -200.0])
    assert bends.dynamic_temperature(unsure, 0.5, 2.0, 1.0).tolist() == [0.0, 0.0, 0.0]
    assert kept(bends.dynamic_temperature(torch.tensor([3.0, float("-inf")]), 0.5, 2.0, 1.0)) == {0}


@SEEDS
@pytest.mark.parametrize(("factor", "curve"), [(0.3, 1.0), (1.0, 1.0), (0.5, 2.5)])
def test_smoothing(seed: int, factor: float, curve: float) -> None:
    logits = with_holes(seed)
    x = logits.numpy().astype(np.float64)
    d = x - x.max()
    k, s = (3 - curve) / 2, (curve - 1) / 2
    with np.errstate(invalid="ignore"):
        expected = np.where(np.isfinite(x), -(k * factor * d**2) + s * factor * d**3 + x.max(), -np.inf)
    np.testing.assert_allclose(bends.smoothing(logits, factor, curve).numpy(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("curve", [1.0, 2.0, 4.0, 10.0])
def test_smoothing_of_what_is_far_below(curve: float) -> None:
    """A strong penalty leaves numbers whose cubes are none in float32."""
    found = bends.smoothing(torch.tensor([1.0, 0.5, -1e20, -3e38, float("-inf")]), 10.0, curve)
    assert not found.isnan().any()
    assert found[0] == 1.0
    assert min(found[:2]) > found[2] == found[3] > found[4]


# what was said before ---------------------------------------------------------------------------------------------


def next_row(params: GenerationParams, prompt: list[int], reply: list[int], logits: torch.Tensor) -> np.ndarray:
    """The row from which the next token would be drawn, full length."""
    sampler = Sampler(params, prompt, lambda: 0.0, token_bytes=lambda token: bytes([token % 256]), compiled=False)
    for token in reply:
        sampler._take(token, token)
    return seen(sampler, logits)


def seen(sampler: Sampler, logits: torch.Tensor) -> np.ndarray:
    rows: list[torch.Tensor] = []
    real = samplers.draw

    def noted(row: torch.Tensor, uniform: float) -> int:
        rows.append(row)
        return real(row, uniform)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samplers, "draw", noted)
        sampler.next(logits)
    return rows[0].numpy()


def test_repetition_penalty_is_that_of_transformers() -> None:
    ids = [3, 3, 7, 90, 7]
    theirs = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([ids]), row()[None].clone())[0]
    np.testing.assert_allclose(
        next_row(with_params(repetition_penalty=1.3), ids[:3], ids[3:], row()), theirs, rtol=1e-6
    )


def test_range_and_slope() -> None:
    logits = torch.full((20,), 2.0)
    found = next_row(with_params(repetition_penalty=2.0, repetition_range=4), [1, 2, 3], [4, 5], logits)
    assert np.flatnonzero(found == 1.0).tolist() == [2, 3, 4, 5]
    found = next_row(with_params(repetition_penalty=2.0, repetition_slope=0.5), [1, 2, 3], [4, 5, 1], logits)
    expected = dict.fromkeys((4, 5, 1), 2 / 2.0) | dict.fromkeys((2, 3), 2 / 1.5)
    assert found.tolist() == pytest.approx([expected.get(token, 2.0) for token in range(20)])


def test_frequency_and_presence_are_those_of_openai() -> None:
    # "logits[j] -= count[j] * frequency + (count[j] > 0) * presence", of the tokens that were sampled: the reply's
    reply = [4, 4, 9, 4]
    expected = row().numpy().astype(np.float64)
    for token in set(reply):
        expected[token] -= reply.count(token) * 0.3 + 0.7
    params = with_params(frequency_penalty=0.3, presence_penalty=0.7)
    np.testing.assert_allclose(next_row(params, [4, 1, 9], reply, row()), expected, rtol=1e-5)
    np.testing.assert_allclose(next_row(params, [4, 1, 9], [], row()), row().numpy())


@SEEDS
@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_no_repeated_ngrams(seed: int, n: int) -> None:
    history = np.random.default_rng(seed).integers(0, 4, 60)
    theirs = NoRepeatNGramLogitsProcessor(n)(torch.tensor(history[None]), torch.zeros(1, 6))[0]
    banned = set(penalties.repeated_ngrams(history, n).tolist())
    assert banned == set(range(6)) - kept(theirs)
    assert not len(penalties.repeated_ngrams(history[: n - 1], n))


def dry_by_description(ids: list[int], breakers: set[int], multiplier: float, base: float, allowed: int) -> dict:
    """The text of the proposal, step by step: for each earlier occurrence of the last token, walk both ends back."""
    if len(ids) < 2 or ids[-1] in breakers:
        return {}
    longest: dict[int, int] = {}
    for i in range(len(ids) - 1):
        if ids[i] != ids[-1] or ids[i + 1] in breakers:
            continue
        length = 1
        while length < 50 and i - length >= 0 and ids[i - length] == ids[-1 - length]:
            if ids[-1 - length] in breakers:
                break
            length += 1
        longest[ids[i + 1]] = max(longest.get(ids[i + 1], 0), length)
    return {t: multiplier * base ** (n - allowed) for t, n in longest.items() if n >= allowed}


@pytest.mark.parametrize("seed", range(60))
def test_dry(seed: int) -> None:
    random = np.random.default_rng(seed)
    ids = random.integers(0, int(random.integers(2, 6)), int(random.integers(1, 150)))
    breakers = {1} if seed % 2 else set()
    breaks = np.isin(ids, list(breakers))
    tokens, amounts = penalties.dry(ids, breaks, 0.8, 1.75, 1 + seed % 4)
    found = dict(zip(tokens.tolist(), amounts.tolist(), strict=True))
    assert found == pytest.approx(dry_by_description(ids.tolist(), breakers, 0.8, 1.75, 1 + seed % 4))


@pytest.mark.parametrize("seed", range(40))
def test_copies_kept_from_token_to_token_are_those_found_anew(seed: int) -> None:
    """`Copies` against its slow twin, with rewinds, breakers, ranges, and several tokens between two looks."""
    random = np.random.default_rng(seed)
    size = int(random.integers(2, 5))
    pieces = [b"a", b"b", b"c", b"d"]
    start = random.integers(0, size, int(random.integers(0, 120))).tolist()
    history = History(start, ["b", "cd"] if seed % 2 else [], pieces.__getitem__)
    copies = Copies(history)
    for step in range(150):
        if step > 100 and len(history) > 60:  # a long repetition, as long as is counted and longer
            history.append(int(history.ids[-7]))
        elif random.random() < 0.1 and len(history) > 4:
            history.rewind(int(random.integers(1, 4)))
            history.append(int(random.integers(0, size)))
        else:
            history.append(int(random.integers(0, size)))
        if random.random() < 0.3:
            continue
        window = int(random.integers(0, len(history) + 2))
        ids, breaks = history.latest(window), history.breaks[-window:] if window else history.breaks
        expected = penalties.dry(ids, breaks, 0.8, 1.1, 1 + seed % 3)
        found = copies.dry(window, 0.8, 1.1, 1 + seed % 3)
        assert [part.tolist() for part in found] == [part.tolist() for part in expected]


def test_dry_in_the_chain() -> None:
    text = b"the cat sat. the cat"
    params = with_params(dry_multiplier=1.0, dry_base=2.0, dry_allowed_length=3, dry_breakers=())
    found = next_row(params, list(text[:5]), list(text[5:]), torch.zeros(256))
    assert np.flatnonzero(found).tolist() == [ord(" ")]
    assert found[ord(" ")] == -(2.0 ** (len("the cat") - 3))
    broken = with_params(dry_multiplier=1.0, dry_base=2.0, dry_allowed_length=3, dry_breakers=("e c",))
    assert not next_row(broken, list(text[:5]), list(text[5:]), torch.zeros(256)).any(), "'at' alone is too short"
    ranged = with_params(dry_multiplier=1.0, dry_allowed_length=3, dry_breakers=(), dry_range=9)
    assert not next_row(ranged, list(text[:5]), list(text[5:]), torch.zeros(256)).any()


def test_breakers_are_found_over_token_borders() -> None:
    pieces = [b"one.", b"\n", b"\n", b"two", b"\n\n", b"x\n", b"\ny", b"\n"]
    history = History(range(8), ["\n\n", ":"], lambda token: pieces[token])
    assert history.breaks.tolist() == [False, False, True, False, True, False, True, False]
    history.rewind(3)
    history.append(1)
    assert history.breaks.tolist() == [False, False, True, False, True, False]
    assert history.ids.tolist() == [0, 1, 2, 3, 4, 1]


@pytest.mark.parametrize(
    "pieces", [(b"### ", b"Instruct", b"ion", b":"), (b"US", b"ER"), (b"x", b"U", b"S", b"E", b"R")]
)
def test_a_long_breaker_is_found_in_several_short_tokens(pieces: tuple[bytes, ...]) -> None:
    history = History(range(len(pieces)), ("### Instruction:", "USER"), pieces.__getitem__)
    assert history.breaks.tolist() == [False] * (len(pieces) - 1) + [True]


# the chain --------------------------------------------------------------------------------------------------------

ACTIVE: dict[str, dict[str, object]] = {
    "penalties": {"repetition_penalty": 1.5},
    "dry": {"dry_multiplier": 1.0, "dry_allowed_length": 1},
    "no_repeat_ngram": {"no_repeat_ngram": 1},
    "top_n_sigma": {"top_n_sigma": 1.0},
    "top_k": {"top_k": 30},
    "tfs": {"tfs": 0.9},
    "typical_p": {"typical_p": 0.5},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.1},
    "top_a": {"top_a": 0.5},
    "epsilon_cutoff": {"epsilon_cutoff": 0.01},
    "eta_cutoff": {"eta_cutoff": 0.05},
    "xtc": {"xtc_probability": 1.0, "xtc_threshold": 0.05},
    "smoothing": {"smoothing_factor": 0.5},
    "temperature": {"temperature": 2.0},
}


def test_every_step_has_a_value_here_that_does_something() -> None:
    assert set(ACTIVE) == set(STEPS)
    plain = next_row(NEUTRAL, [1, 2, 3, 1], [2], row())
    np.testing.assert_array_equal(plain, row().numpy())
    for name, values in ACTIVE.items():
        assert not np.array_equal(next_row(with_params(**values), [1, 2, 3, 1], [2], row()), plain), name


# tail-free looks at the likeliest tokens' differences down to the very last one
ON_ANY_LENGTH = [name for name in STEPS if name not in ("top_k", "tfs")]


@pytest.mark.parametrize("name", ON_ANY_LENGTH)
def test_a_step_does_the_same_on_a_narrowed_row(name: str) -> None:
    """With top-k first, every step sees forty logits and other places for the same tokens."""
    params = with_params(**ACTIVE[name], top_k=40, sampler_order=("top_k",))
    logits, wide = row(5000, 3), row(5000, 3)
    best = logits.topk(40).indices.sort().values
    cut = torch.full_like(wide, float("-inf")).index_copy(0, best, wide[best])
    prompt = [int(best[1]), 7, int(best[5]), int(best[1])]
    narrow = next_row(params, prompt, [int(best[1])], logits)
    full = next_row(with_params(**ACTIVE[name]), prompt, [int(best[1])], cut)
    assert len(narrow) == 40
    np.testing.assert_allclose(softmax(narrow), softmax(full)[best.numpy()], rtol=1e-4, atol=1e-7)


def test_the_order_can_be_set() -> None:
    # At temperature 5 the row is flat, so min-p keeps more when it comes after the temperature.
    values = {"temperature": 5.0, "min_p": 0.3}
    before = next_row(with_params(**values), [], [], row())
    after = next_row(with_params(**values, sampler_order=("temperature",)), [], [], row())
    assert np.isfinite(before).sum() < np.isfinite(after).sum()
    default = next_row(with_params(**values, sampler_order=STEPS), [], [], row())
    np.testing.assert_array_equal(default, before)


def test_all_steps_together_leave_something_to_draw() -> None:
    for seed in range(20):
        values: dict[str, object] = {}
        for part in ACTIVE.values():
            values |= part
        order = np.random.default_rng(seed).permutation(STEPS).tolist()
        params = with_params(**values | {"no_repeat_ngram": 3}, sampler_order=tuple(order))
        found = next_row(params, [1, 2, 3, 1], [2], row(500, seed))
        assert np.isfinite(found).any()
        assert not np.isnan(found).any()


# distributions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*STEPS[3:4], *STEPS[5:]])
def test_draws_follow_what_the_step_leaves(name: str) -> None:
    params, logits, count = with_params(**ACTIVE[name]), row(40, 2, spread=1.2), 4000
    expected = softmax(next_row(params, [], [], logits))
    uniforms = iter(np.random.default_rng(5).random(3 * count).tolist())
    sampler = Sampler(params, [], lambda: next(uniforms))
    drawn = np.bincount([sampler.next(logits).token or 0 for _ in range(count)], minlength=40)
    assert not drawn[expected == 0].any()
    likely = expected * count >= 5
    chi_square = ((drawn - expected * count) ** 2 / np.maximum(expected * count, 1e-9))[likely].sum()
    freedom = int(likely.sum()) - 1
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom) + 11  # beyond one in a thousand for 1 to 40 of them


def test_neutral_knobs_ask_for_no_step() -> None:
    assert Sampler(NEUTRAL, [1, 2], lambda: 0.0, compiled=False)._steps == []
    for knob in KNOBS:
        if knob.kind in ("int", "float"):
            assert Sampler(with_params(**{knob.name: knob.neutral}), [], lambda: 0.0, compiled=False)._steps == []
