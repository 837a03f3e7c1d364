"""Who runs when: fairness, taking turns when blocks run out, and blocks that go back. No model: tokens are made up."""

from __future__ import annotations

import pytest

from backend.engine.admission import MAX_RUNNING
from backend.engine.scheduler import PREFILL_TOKENS
from tests.stepping import Steps, alone, request


def test_a_short_request_from_start_to_end() -> None:
    steps, one = Steps(50), request(20, tokens=3)
    steps.scheduler.add(one)
    works = [steps.step() for _ in range(3)]
    assert [[(item.tokens, item.request) for item in work] for work in works] == [[(20, one)], [(1, one)], [(1, one)]]
    assert steps.done == [one]
    assert one.ids == alone(one.prompt, 3)
    assert one.stats().evaluated_tokens == 20
    assert steps.step() == []


def test_replies_go_on_while_a_long_prompt_is_read() -> None:
    steps = Steps(400)
    talking = [request(5, tokens=60), request(7, tokens=60)]
    for one in talking:
        steps.scheduler.add(one)
    steps.step()
    long = request(1000, tokens=2)
    steps.scheduler.add(long)
    for _ in range(-(-1000 // PREFILL_TOKENS)):
        said = [one.completion_tokens for one in talking]
        work = steps.step()
        assert [one.completion_tokens for one in talking] == [count + 1 for count in said]
        assert sum(item.tokens for item in work if item.request is long) <= PREFILL_TOKENS
    assert long.completion_tokens == 1, "and the long one is not slower than its chunks"


def test_a_reply_whose_prompt_is_known_does_not_wait_for_an_older_prompt() -> None:
    steps, prompt = Steps(400), list(range(33))
    steps.scheduler.add(request(prompt, tokens=1))
    steps.run()
    long, known = request(1000, tokens=1), request(prompt, tokens=20)
    steps.scheduler.add(long)
    steps.scheduler.add(known)
    for said in range(1, 1 + 1000 // PREFILL_TOKENS):
        steps.step()
        assert known.completion_tokens == said
    assert long.completion_tokens == 0


def test_the_oldest_prompt_is_read_first() -> None:
    steps, one, other = Steps(400), request(200, tokens=1), request(200, tokens=1)
    steps.scheduler.add(one)
    steps.scheduler.add(other)
    read = [{item.request: item.tokens for item in steps.step()} for _ in range(2)]
    assert read[0] == {one: PREFILL_TOKENS}
    assert read[1] == {one: 200 - PREFILL_TOKENS, other: 2 * PREFILL_TOKENS - 200}


def test_no_more_than_the_limit_run_and_the_others_are_told_their_place() -> None:
    steps = Steps(500)
    requests = [request(4, tokens=5) for _ in range(MAX_RUNNING + 3)]
    for one in requests:
        steps.scheduler.add(one)
    steps.step()
    assert steps.scheduler.running == requests[:MAX_RUNNING]
    assert [one.stats().people_ahead for one in requests[MAX_RUNNING:]] == [
        MAX_RUNNING,
        MAX_RUNNING + 1,
        MAX_RUNNING + 2,
    ]
    assert {one.stats().phase for one in requests[MAX_RUNNING:]} == {"queued"}
    steps.run()
    assert {one.id for one in steps.done} == {one.id for one in requests}


@pytest.mark.parametrize("n_blocks", [9, 12, 16, 24])
def test_too_few_blocks_change_no_text(n_blocks: int) -> None:
    steps = Steps(n_blocks)
    requests = [request(18, tokens=40) for _ in range(4)]
    for one in requests:
        steps.scheduler.add(one)
    steps.run()
    assert {one.id for one in steps.done} == {one.id for one in requests}
    for one in requests:
        assert one.ids == alone(one.prompt, 40)
    assert steps.preemptions > 0, "the test is about taking turns"
    assert steps.pool.in_use == 0
    assert steps.pool.free + steps.pool.cached == n_blocks


def test_the_youngest_gives_way_and_reads_again() -> None:
    steps = Steps(10)
    old, young = request(30, tokens=45), request(30, tokens=45)
    steps.scheduler.add(old)
    steps.scheduler.add(young)
    steps.step()
    third = request(60, tokens=1)
    steps.scheduler.add(third)
    while not steps.preemptions:
        steps.step()
    assert steps.scheduler.running == [old]
    assert list(steps.scheduler.waiting) == [young, third], "who was running before is first in the line"
    assert young.stats().phase == "queued"
    said = young.completion_tokens
    assert said > 0
    steps.run()
    assert young.ids == alone(young.prompt, 45)
    assert old in steps.done
    assert young in steps.done


@pytest.mark.parametrize("steps_before", [0, 1, 2, 5])
@pytest.mark.parametrize("keep", [True, False])
def test_a_removed_request_gives_its_blocks_back(steps_before: int, keep: bool) -> None:
    steps = Steps(60)
    one, other = request(300), request(10)
    steps.scheduler.add(one)
    steps.scheduler.add(other)
    for _ in range(steps_before):
        steps.step()
    steps.scheduler.remove(one, keep=keep)
    assert one not in steps.scheduler.running
    assert one not in steps.scheduler.waiting
    assert one.lease is None
    steps.scheduler.remove(other)
    assert steps.pool.in_use == 0
    lease = steps.pool.acquire(one.prompt)
    assert lease is not None
    assert lease.cached == (min(one.computed, 299) if keep else 0)


def test_removing_twice_is_harmless() -> None:
    steps, one = Steps(20), request(10)
    steps.scheduler.add(one)
    steps.step()
    steps.scheduler.remove(one)
    steps.scheduler.remove(one, keep=False)
    assert steps.pool.in_use == 0


def test_a_second_request_with_the_same_beginning_reads_only_the_rest() -> None:
    steps = Steps(60)
    beginning = list(range(50))
    first = request([*beginning, 1000], tokens=3)
    steps.scheduler.add(first)
    steps.run()
    second = request([*beginning, 2000, 2001], tokens=3)
    steps.scheduler.add(second)
    (work,) = steps.step()
    assert work.tokens == 2
    assert second.stats().cached_tokens == 50
    assert second.stats().evaluated_tokens == 2
    steps.run()
    assert second.ids == alone(second.prompt, 3)


def test_without_the_cache_everything_is_read_and_nothing_is_left() -> None:
    steps = Steps(60)
    prompt = list(range(40))
    for use_cache in (True, False):
        one = request(prompt, tokens=2, use_cache=use_cache)
        steps.scheduler.add(one)
        cached_before = steps.pool.cached
        steps.run()
        assert one.stats().evaluated_tokens == 40
        assert (steps.pool.cached > cached_before) == use_cache


def test_a_request_waits_when_there_is_no_room_and_runs_when_there_is() -> None:
    steps = Steps(12)
    first, second = request(80, tokens=10), request(80, tokens=10)
    steps.scheduler.add(first)
    steps.step()
    steps.scheduler.add(second)
    steps.step()
    assert steps.scheduler.running == [first]
    assert second.stats().people_ahead == 1
    steps.run()
    assert steps.done == [first, second]
