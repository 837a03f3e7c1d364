"""A long prompt beside a running reply: read a little at a time, so that the reply goes on.

Where a step is one compiled call it is set aside in C; where it is torch operations, between the halves of layers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from math import inf

import pytest
import torch

from backend.engine import pacing
from backend.engine.partly import FIRST, SIZES, PartlyComputed, piece_tokens
from backend.engine.speculation import Speculation
from backend.errors import OutOfMemoryError
from backend.params import GenerationParams
from backend.runtime import Runtime
from tests.real import read, starter, tiny_runtime
from tests.tiny import TinyModel, write_tiny

LONG = [(7919 * place) % 251 + 1 for place in range(1200)]
SHORT = [(104729 * place) % 251 + 1 for place in range(40)]
TALK = GenerationParams(max_tokens=400, ignore_eos=True, temperature=1.0, seed=3)
ANSWER = GenerationParams(max_tokens=5, ignore_eos=True, temperature=1.0, seed=4)


@pytest.fixture(scope="module")
def torch_runtime(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runtime]:
    model = TinyModel(context=2048, scale=0.3, n_layers=8)
    runtime = tiny_runtime(write_tiny(tmp_path_factory.mktemp("reading") / "tiny.gguf", model), weights="f32")
    assert not runtime.runner.in_one_call
    yield runtime
    runtime.close(drain=False)


@pytest.fixture(params=["compiled", "torch"])
def runtime(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Runtime]:
    runtime = starter("original") if request.param == "compiled" else request.getfixturevalue("torch_runtime")
    if request.param == "compiled" and not runtime.runner.in_one_call:
        pytest.skip("not run: there is no C compiler")
    monkeypatch.setattr(runtime._engine, "speculation", None)
    if runtime.runner._compiled is not None:
        monkeypatch.setattr(runtime.runner._compiled._described, "uniform", 1)
    return runtime


@pytest.fixture
def done(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the engine does, in order: `step`, `part` of a piece, or its `end`."""
    found: list[str] = []
    run, go_on = runtime.runner.run, runtime.runner.go_on

    def noted_run(work):  # type: ignore[no-untyped-def]
        found.append("step")
        return run(work)

    def noted_go_on(going, seconds):  # type: ignore[no-untyped-def]
        logits = go_on(going, seconds)
        found.append("part" if logits is None else "end")
        return logits

    monkeypatch.setattr(runtime.runner, "run", noted_run)
    monkeypatch.setattr(runtime.runner, "go_on", noted_go_on)
    return found


def wait(until: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not until():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_reply_goes_on_while_a_long_prompt_is_read(runtime: Runtime, done: list[str]) -> None:
    long = LONG[:600]  # read before the talk is over, also on a busy machine
    alone = [read(runtime.start(ids, params, use_cache=False))[1] for ids, params in ((SHORT, TALK), (long, ANSWER))]
    assert set(done) == {"step"}, "where nobody else writes a prompt is read at once"
    done.clear()
    talk = runtime.start(SHORT, TALK, use_cache=False)
    wait(lambda: talk.stats.completion_tokens >= 20)
    answer = runtime.start(long, ANSWER, use_cache=False)
    both = [read(answer)[1], read(talk)[1]]
    assert both == alone[::-1]
    if runtime.runner.in_one_call:
        assert done.count("end") == -(-len(long) // 128)
    else:  # as many tokens at once as half a layer may take
        assert -(-len(long) // SIZES[-1]) <= done.count("end") <= -(-len(long) // SIZES[0])
    assert done.count("part") > done.count("end"), "pieces are set aside"
    pairs = list(zip(done, done[1:], strict=False))
    assert not [pair for pair in pairs if "step" not in pair], "after some of a piece every reply has its token"


def test_guesses_leave_time_for_a_prompt(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    speculation = Speculation()
    monkeypatch.setattr(runtime._engine, "speculation", speculation)
    add_drafts, limits = speculation.add_drafts, []

    def noted(work, room, slower):  # type: ignore[no-untyped-def]
        limits.append((bool(runtime._engine.scheduler.readers), slower))
        return add_drafts(work, room, slower)

    monkeypatch.setattr(speculation, "add_drafts", noted)
    talk = runtime.start(SHORT, TALK, use_cache=False)
    wait(lambda: talk.stats.completion_tokens >= 20)
    answer = runtime.start(LONG[:300], ANSWER, use_cache=False)
    read(answer)
    read(talk)
    assert set(limits) == {(False, inf), (True, pacing.MOST - pacing.LEAST)}
    assert limits.count((True, pacing.MOST - pacing.LEAST)) > 2


def test_who_stops_while_a_prompt_is_read_takes_nobody_along(
    runtime: Runtime, done: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pacing, "SHORT", 0.0)  # however fast the machine, these are long prompts
    expected = read(runtime.start(SHORT, TALK, use_cache=False))[1]
    answer_alone = read(runtime.start(LONG[:300], ANSWER, use_cache=False))[1]
    talk = runtime.start(SHORT, TALK, use_cache=False)
    wait(lambda: talk.stats.completion_tokens >= 20)
    stopped, answer = (runtime.start(ids, ANSWER, use_cache=False) for ids in (LONG, LONG[:300]))
    wait(lambda: "part" in done[-50:])
    stopped.stop()
    assert read(stopped)[2].finish_reason == "cancelled"
    assert read(answer)[1] == answer_alone
    assert read(talk)[1] == expected
    assert runtime.blocks.in_use == 0
    assert runtime._engine._piece is None


@pytest.mark.parametrize("always", [False, True])
def test_a_piece_for_which_memory_does_not_suffice(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch, always: bool
) -> None:
    """It is read at once in smaller ones, or its request ends; the reply beside it goes on either way."""
    alone = [read(runtime.start(ids, params, use_cache=False))[1] for ids, params in ((SHORT, TALK), (LONG, ANSWER))]
    run, failed = runtime.runner.run, []

    def begin(work):  # type: ignore[no-untyped-def]
        failed.append(work)
        raise MemoryError

    def run_or_fail(work):  # type: ignore[no-untyped-def]
        if always and any(item.tokens > 1 for item in work):
            raise MemoryError
        return run(work)

    talk = runtime.start(SHORT, TALK, use_cache=False)
    wait(lambda: talk.stats.completion_tokens >= 20)
    monkeypatch.setattr(runtime.runner, "begin", begin)
    monkeypatch.setattr(runtime.runner, "run", run_or_fail)
    answer = runtime.start(LONG, ANSWER, use_cache=False)
    _, ids, last = read(answer)
    assert read(talk)[1] == alone[0]
    assert failed
    if always:
        assert isinstance(last.error, OutOfMemoryError)
    else:
        assert ids == alone[1]
    assert runtime.blocks.in_use == 0


def test_halves_of_layers_are_computed_for_as_long_as_they_fit() -> None:
    """By the clock: attention takes 3 seconds, a feed-forward 5, the output 1."""
    now = 0.0

    def computed() -> Iterator[torch.Tensor | None]:
        nonlocal now
        for seconds in (3, 5) * 3:
            now += seconds
            yield None
        now += 1
        yield torch.ones(1)

    piece = PartlyComputed(computed(), 64, lambda: now)
    assert piece.seconds_per_token is None
    ends = []
    for seconds in (7.9, 0.5, 7.9, 8.0):
        assert piece.go_on(seconds) is None
        ends.append(now)
    assert ends == [8, 11, 16, 24], "one part in any case, and another one where it takes what it took before"
    assert piece.seconds_per_token == 5 / 64
    assert piece.go_on(0.0) == torch.ones(1)
    assert PartlyComputed(computed(), SIZES[0] - 1).seconds_per_token is None


def test_a_piece_has_as_many_tokens_as_half_a_layer_may_take() -> None:
    assert piece_tokens(None, 0.03) == FIRST
    assert piece_tokens(0.001, 0.3) == 256
    assert piece_tokens(0.001, 0.01) == SIZES[0], "some tokens in any case"
    assert piece_tokens(0.001, 10) == SIZES[-1]


def test_seconds_that_a_step_may_read() -> None:
    pace = pacing.Pacing(128)
    assert pace.seconds(0) == pacing.LONGEST
    pace.record(2, 0, 0.010)
    fitting = (pacing.MOST - 1) * 0.010
    assert pace.seconds(2) == pytest.approx(fitting)
    assert pace.seconds(2, 1, spent=0.012) == pytest.approx(fitting - 0.002), "what took longer leaves less"
    assert pace.seconds(2, 6, spent=0.010) == pytest.approx(3 * fitting)
    assert pace.seconds(2, 100, spent=0.010) == pytest.approx(pacing.BRIEF)
    assert pace.seconds(2, 1, spent=1.0) == pytest.approx(pacing.LEAST * 0.010), "some of it is read all the same"
    assert pacing.Pacing(128).seconds(2, 1, spent=0.030) == pytest.approx(0.030), "nobody knows what is usual"


def test_several_short_prompts_are_read_in_a_few_long_gaps() -> None:
    pace = pacing.Pacing(128)
    pace.record(2, 0, 0.010)
    fitting = (pacing.MOST - 1) * 0.010
    assert pace.seconds(2, 2, tokens=80) == pytest.approx(fitting), "nobody knows yet how long they take"
    pace.record(0, 100, 0.100)
    assert pace.seconds(2, 2, tokens=80) == pytest.approx(pacing.BRIEF)
    assert pace.seconds(2, 2, tokens=4000) == pytest.approx(fitting), "long ones take turns with those who write"
    assert pace.seconds(2, 1, tokens=40) == pytest.approx(fitting), "one alone is read beside them"
    assert pace.budget(2, 2, tokens=80) > pace.budget(2, 2), "the same where a step cannot be set aside"
