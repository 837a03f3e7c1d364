"""Who runs when: fairness, taking turns when blocks run out, and blocks that go back. No model: tokens are made up."""

from __future__ import annotations

import pytest

from backend.cache.blocks import BlockPool
from backend.engine.pacing import FEWEST, SAMPLES, Pacing
from backend.engine.request import Request
from backend.engine.scheduler import MAX_RUNNING, PREFILL_TOKENS, Scheduler, Work
from backend.params import GenerationParams

BLOCK = 8


class Nobody:
    def on_token(self, token_id: int, logprob: float | None, *, visible: bool = True) -> bool:
        return False

    def on_finish(self, reason: str, error: Exception | None = None) -> None: ...


def request(prompt: list[int] | int, tokens: int = 20, **options: object) -> Request:
    """`prompt` may be a length: then its tokens are like no other prompt's."""
    request = Request((0,), GenerationParams(max_tokens=tokens), frozenset(), Nobody(), 4096, **options)  # type: ignore[arg-type]
    number = int(request.id[1:])
    request.prompt = (
        tuple(range(number * 10_000, number * 10_000 + prompt)) if isinstance(prompt, int) else tuple(prompt)
    )
    request.ids = list(request.prompt)
    return request


class Steps:
    """Drives a scheduler as the engine does; the next token of a sequence depends on its ids alone."""

    def __init__(self, n_blocks: int, pacing: Pacing | None = None) -> None:
        self.pool = BlockPool(n_blocks, BLOCK)
        self.scheduler = Scheduler(self.pool, pacing=pacing)
        self.done: list[Request] = []
        self.preemptions = 0

    def step(self) -> list[Work]:
        before = set(self.scheduler.running)
        work = self.scheduler.schedule()
        self.preemptions += len(before - set(self.scheduler.running))
        self.pool.take_moves()
        self._check(work)
        for item in work:
            gives = item.gives_logits
            self.scheduler.advance(item)
            if gives:
                item.request.ids.append(next_token(item.request.ids))
                if len(item.request.ids) >= item.request.max_length:
                    self.scheduler.remove(item.request)
                    self.done.append(item.request)
        return work

    def run(self, limit: int = 2000) -> None:
        while self.scheduler.running or self.scheduler.waiting:
            limit -= 1
            assert limit, "it does not come to an end"
            self.step()

    def _check(self, work: list[Work]) -> None:
        reading = [item.tokens for item in work if len(item.request.ids) - item.request.computed > 1]
        assert sum(reading) <= PREFILL_TOKENS
        assert len({item.request for item in work}) == len(work)
        for item in work:
            assert item.tokens >= 1
            assert item.request.lease is not None
            assert len(item.request.lease.blocks) * BLOCK >= item.request.computed + item.tokens
        held = [block for r in self.scheduler.running if r.lease for block in r.lease._owned]
        assert len(held) == len(set(held)), "two sequences write to one block"


def next_token(ids: list[int]) -> int:
    return hash(tuple(ids)) % 1000


def alone(prompt: tuple[int, ...], tokens: int) -> list[int]:
    ids = list(prompt)
    for _ in range(tokens):
        ids.append(next_token(ids))
    return ids


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


def test_a_step_with_a_prompt_stays_below_three_of_those_without() -> None:
    pacing = Pacing(PREFILL_TOKENS)
    assert pacing.budget(0) == PREFILL_TOKENS
    assert pacing.budget(2) == 0, "first it is to be known how long a step takes without"
    for _ in range(3):
        pacing.record(2, 0, 0.010)
    assert pacing.budget(2) == FEWEST, "and one careful piece, how long that takes"
    for _ in range(SAMPLES):  # a prompt token takes 0.4 ms
        pacing.record(2, 64, 0.010 + 64 * 0.0004)
    assert pacing.budget(2) == 48
    assert pacing.budget(5) == 48, "as if there were two: rather too little"
    assert pacing.budget(1) == 0
    pacing.record(2, 64, 1.0)  # another program had the processor: one step says nothing
    assert pacing.budget(2) == 48
    for _ in range(SAMPLES):
        pacing.record(2, 16, 0.010 + 16 * 0.01)
    assert pacing.budget(2) == FEWEST, "however slow, a prompt comes to its end"
    for _ in range(SAMPLES):
        pacing.record(0, 128, 0.001)
    assert pacing.budget(2) == PREFILL_TOKENS


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
    assert max(gaps) <= max(3 * normal, normal + FEWEST * each)
    assert len(gaps) <= 2000 / FEWEST + 1
