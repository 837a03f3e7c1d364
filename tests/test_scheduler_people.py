"""Who of several people runs, who reads what another reads, and how much of a prompt a step takes."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from backend.engine.admission import MAX_RUNNING
from backend.engine.pacing import FORGOTTEN, SAMPLES, SIZES, Pacing
from backend.engine.scheduler import PREFILL_TOKENS
from tests.stepping import Steps, alone, request

# between people ---------------------------------------------------------------------------------------------------


def test_reading_is_shared_evenly_and_in_order_for_each_person() -> None:
    steps = Steps(400)
    many = [request(300, tokens=1, person="many") for _ in range(3)]
    one, short = request(300, tokens=1, person="one"), request(20, tokens=1, person="short")
    for each in (*many, one, short):
        steps.scheduler.add(each)
    rest = PREFILL_TOKENS - 20
    assert {item.request: item.tokens for item in steps.step()} == {many[0]: rest // 2, one: rest // 2, short: 20}
    assert short.completion_tokens == 1, "a short prompt is read at once"
    steps.step()
    assert [each.computed for each in (*many, one)] == [rest // 2 + 64, 0, 0, rest // 2 + 64]


def test_one_with_many_requests_does_not_keep_out_one_with_a_single_one() -> None:
    steps = Steps(500)
    many = [request(10, tokens=60, person="many") for _ in range(20)]
    for each in many:
        steps.scheduler.add(each)
    for _ in range(5):
        steps.step()
    single = request(10, tokens=3, person="single")
    steps.scheduler.add(single)
    assert single.stats().people_ahead == MAX_RUNNING, "first of those who wait"
    for _ in range(3):
        steps.step()
    assert single in steps.done
    assert steps.scheduler.counts.preemptions == 1, "the latest of the person with many made way"
    steps.run()
    for each in (*many, single):
        assert each.ids == alone(each.prompt, each.params.max_tokens)
    assert steps.pool.in_use == 0


def test_a_place_is_taken_only_from_who_keeps_more() -> None:
    steps = Steps(500)
    for person in range(MAX_RUNNING // 2):
        for _ in range(2):
            steps.scheduler.add(request(10, tokens=30, person=f"p{person}"))
    steps.step()
    late = request(10, tokens=30, person="late")
    steps.scheduler.add(late)
    steps.step()
    assert late in steps.scheduler.running
    again = request(10, tokens=30, person="late")
    steps.scheduler.add(again)
    steps.step()
    assert again in steps.scheduler.waiting, "two against two is even"
    assert steps.scheduler.counts.preemptions == 1
    steps.run()


def test_who_was_served_least_is_next() -> None:
    steps = Steps(12)  # 96 tokens: one of these prompts at a time
    order: list[str] = []
    for person, prompt in (("a", 60), ("a", 60), ("a", 60), ("b", 60), ("c", 60), ("b", 60)):
        steps.scheduler.add(request(prompt, tokens=1, person=person))
    while steps.scheduler.running or steps.scheduler.waiting:
        steps.step()
        order += [each.person for each in steps.done[len(order) :]]
    assert order == ["a", "b", "c", "a", "b", "a"]


def test_who_holds_most_gives_way_and_the_oldest_never() -> None:
    steps = Steps(20)  # 160 tokens
    old = request(40, tokens=60, person="old")
    small, large = request(10, tokens=60, person="small"), request(60, tokens=60, person="large")
    for each in (old, small, large):
        steps.scheduler.add(each)
    while not steps.preemptions:
        steps.step()
    assert steps.scheduler.running == [old, small]
    steps.run()
    for each in (old, small, large):
        assert each.ids == alone(each.prompt, 60)


# reading what another reads -----------------------------------------------------------------------------------------


def test_what_two_have_in_common_is_read_once_also_when_they_come_together() -> None:
    steps, preface = Steps(400), list(range(1000))
    chats = [request([*preface, 5000 + n, 6000 + n], tokens=4, person=f"p{n}") for n in range(3)]
    other = request(50, tokens=4)
    for each in (*chats, other):
        steps.scheduler.add(each)
    steps.step()
    assert steps.scheduler.running == [chats[0], other], "who has nothing in common begins at once"
    steps.run()
    assert chats[0].stats().evaluated_tokens == 1002
    for each in chats[1:]:
        assert each.stats().cached_tokens == 1000
        assert each.stats().evaluated_tokens == 2
    for each in chats:
        assert each.ids == alone(each.prompt, 4)


@pytest.mark.parametrize("keep", [True, False])
def test_when_the_reader_goes_the_next_one_reads_on(keep: bool) -> None:
    steps, preface = Steps(400), list(range(1000))
    first, second, third = (request([*preface, 5000 + n], tokens=2) for n in range(3))
    for each in (first, second, third):
        steps.scheduler.add(each)
    for _ in range(3):
        steps.step()
    steps.scheduler.remove(first, keep=keep)
    steps.run()
    assert second.stats().cached_tokens == (3 * PREFILL_TOKENS if keep else 0)
    assert third.stats().cached_tokens == 1000
    assert third.ids == alone(third.prompt, 2)


def test_nobody_waits_for_blocks_that_are_not_for_them() -> None:
    steps, preface = Steps(400), list(range(500))
    salts = [request([*preface, n], tokens=2, salt=salt) for n, salt in enumerate((b"one", b"two"))]
    apart = request([*preface, 9], tokens=2, use_cache=False)
    for each in (*salts, apart):
        steps.scheduler.add(each)
    steps.step()
    assert steps.scheduler.running == [*salts, apart]


# how much of a prompt a step reads ------------------------------------------------------------------------------------


def settled(pacing: Pacing, added: Callable[[int], float], steps: int = 60) -> list[int]:
    """Pieces beside two replies on a machine on which a step takes 10 ms, and `added` more with a piece."""
    pieces = []
    for _ in range(steps):
        pieces.append(pacing.budget(2))
        pacing.record(2, pieces[-1], 0.010 + added(pieces[-1]))
    return pieces


def test_a_step_with_a_prompt_stays_below_two_of_those_without() -> None:
    pacing = Pacing(PREFILL_TOKENS)
    assert pacing.budget(0) == PREFILL_TOKENS
    assert pacing.budget(2) == 0, "first it is to be known how long a step takes without"
    for _ in range(3):
        pacing.record(2, 0, 0.010)
    assert pacing.budget(2) == SIZES[0], "and one careful piece, how long that takes"
    pieces = settled(pacing, lambda tokens: tokens * 0.0004)
    assert pieces[:6] == list(SIZES[:6]), "then longer ones"
    assert pieces[-1] == 22
    assert max(pieces) == 31, "tried once"
    assert pieces.count(31) == 1
    assert pacing.budget(5) == 22, "as if there were two: rather too little"
    assert pacing.budget(1) == 0
    pacing.record(2, 22, 1.0)  # another program had the processor: one step says nothing
    assert pacing.budget(2) == 22
    settled(pacing, lambda tokens: tokens * 0.0008, 2 * FORGOTTEN)
    assert pacing.budget(2) == 10, "it takes longer now"
    settled(pacing, lambda tokens: tokens * 0.00005, 2 * FORGOTTEN)
    assert pacing.budget(2) == PREFILL_TOKENS


def test_when_more_wait_to_be_read_than_write_they_are_read_sooner() -> None:
    """Seven people ask while one reply is being written: a gap that nobody notices, and all are served."""
    pacing = Pacing(PREFILL_TOKENS)
    pacing.record(0, 100, 0.040)
    pacing.record(1, 0, 0.005)
    assert pacing.budget(1) == 5, "a first piece by what a token took: twice that much"
    assert pacing.budget(1, 2) == 10
    assert pacing.budget(1, 7) == 31
    assert pacing.budget(1, 700) == 96, "at most a tenth of a second"
    pacing.record(1, 64, 0.005 + 0.030)
    pacing.record(1, 96, 0.005 + 0.120)
    assert pacing.budget(1, 7) == 64
    assert pacing.budget(1, 700) == 64
    assert pacing.budget(1) == 46, "for one the longest that is known is too long: a shorter one is tried"
    slow = Pacing(PREFILL_TOKENS)
    slow.record(0, 100, 10.0)
    slow.record(1, 0, 0.5)
    assert slow.budget(1, 50) == slow.budget(1) == SIZES[0], "where a step takes long enough nobody waits for more"


def test_however_slow_a_prompt_comes_to_its_end() -> None:
    pacing = Pacing(PREFILL_TOKENS)
    pacing.record(2, 0, 0.010)
    assert settled(pacing, lambda tokens: tokens * 0.1)[-1] <= SIZES[1]
    pacing = Pacing(PREFILL_TOKENS)
    pacing.record(2, 0, 0.010)
    pieces = settled(pacing, lambda tokens: 0.1 + tokens * 0.001)
    assert pieces[-1] == 22, "in pieces that take hardly longer than the shortest"


def test_while_nobody_writes_a_step_takes_half_a_second() -> None:
    pacing = Pacing(512, 128)
    assert pacing.budget(0) == 128
    pacing.record(0, 128, 0.128)
    assert pacing.budget(0) == 384
    for _ in range(SAMPLES):
        pacing.record(0, 128, 0.05)
    assert pacing.budget(0) == 512
    for _ in range(SAMPLES):
        pacing.record(0, 512, 5.0)
    assert pacing.budget(0) == 128
    assert Pacing(512).budget(0) == 512, "where a step brings weights from elsewhere"


@pytest.mark.parametrize("each", [0.0002, 0.001, 0.004])
def test_gaps_of_a_running_reply_while_a_long_prompt_is_read(each: float) -> None:
    """A machine on which a step takes 10 ms, 2 ms for every sequence that writes, and `each` seconds a prompt token."""
    steps = Steps(400, Pacing(PREFILL_TOKENS))
    talking = [request(5, tokens=800, person="t") for _ in range(2)]
    for one in talking:
        steps.scheduler.add(one)

    def step() -> float:
        work = steps.step()
        writing, reading = sum(item.tokens == 1 for item in work), sum(i.tokens for i in work if i.tokens > 1)
        seconds = 0.010 + 0.002 * writing + each * reading
        steps.scheduler.measured(work, seconds)
        return seconds

    normal = [step() for _ in range(10)][-1]
    long = request(2000, tokens=1)
    steps.scheduler.add(long)
    gaps = []
    while not long.completion_tokens:
        said = talking[0].completion_tokens
        gaps.append(step())
        assert talking[0].completion_tokens == said + 1
    assert sorted(gaps)[-2 - len(gaps) // FORGOTTEN] <= max(3 * normal, normal + 5 * each), "but for those that try"
    assert max(gaps) <= max(4 * normal, normal + 5 * each)
    assert len(gaps) <= 2000 / SIZES[0] + 1
