"""The block pool against a picture of the memory: every place of a block remembers the whole sequence it was computed
from, so that a wrongly shared, overwritten or too early reused place is seen at once."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backend.cache.blocks import BlockPool, Lease

BLOCK = 4


@dataclass(eq=False)
class Running:
    ids: list[int]
    lease: Lease
    computed: int


class Memory:
    """A pool, what its blocks really hold, and the sequences that run. Each method does what an engine would do."""

    def __init__(self, n_blocks: int) -> None:
        self.pool = BlockPool(n_blocks, BLOCK)
        self.places: dict[tuple[int, int], tuple[int, ...]] = {}
        self.running: list[Running] = []
        self.evaluated: list[list[int]] = []  # of sequences that are over

    def start(self, ids: list[int]) -> Running | None:
        room = self.pool.n_blocks - self.pool.in_use
        lease = self.pool.acquire(ids)
        if lease is None:
            # The blocks it shares and the source of the copy are not to be had, even if nobody else uses them.
            assert room <= (len(ids) - 1) // BLOCK + 1, "refused although a block could be had"
            return None
        if lease.copy is not None:
            for place in range(lease.copy.tokens):
                self.places[lease.copy.target, place] = self.places[lease.copy.source, place]
        assert 0 <= lease.cached <= len(ids) - 1
        request = Running(ids, lease, lease.cached)
        self.running.append(request)
        return request

    def compute(self, request: Running, tokens: int) -> bool:
        """Evaluate up to `tokens` more tokens, if there is room for them."""
        until = min(len(request.ids), request.computed + tokens)
        wanted = -(-until // BLOCK) - len(request.lease.blocks)
        room, before = self.pool.n_blocks - self.pool.in_use, list(request.lease.blocks)
        there = self.pool.extend(request.lease, until)
        assert there == (wanted <= room), "room is what nobody uses"
        if not there:
            assert request.lease.blocks == before
            return False
        for at in range(request.computed, until):
            self.places[request.lease.blocks[at // BLOCK], at % BLOCK] = tuple(request.ids[: at + 1])
        request.computed = until
        self.check()
        self.pool.commit(request.lease, request.ids[:until])
        return True

    def end(self, request: Running) -> None:
        self.pool.release(request.lease, request.ids[: request.computed])
        self.running.remove(request)
        self.evaluated.append(request.ids[: request.computed])

    def fail(self, request: Running) -> None:
        self.pool.discard(request.lease)
        self.running.remove(request)

    def check(self) -> None:
        """Every running sequence sees exactly its own tokens, and the books are in order."""
        for request in self.running:
            blocks = request.lease.blocks
            seen = [self.places[blocks[at // BLOCK], at % BLOCK] for at in range(request.computed)]
            assert seen == [tuple(request.ids[: at + 1]) for at in range(request.computed)]
            assert len(set(blocks)) == len(blocks)
        held = {block for request in self.running for block in request.lease.blocks}
        assert len(held) <= self.pool.in_use <= self.pool.n_blocks
        assert 0 <= self.pool.free <= self.pool.n_blocks - self.pool.in_use
        assert self.pool.cached <= self.pool.n_blocks - self.pool.free

    def check_all_over(self) -> None:
        assert not self.running
        assert self.pool.in_use == 0
        assert self.pool.free + self.pool.cached == self.pool.n_blocks

    def longest_known(self, ids: list[int]) -> int:
        """How much of a prompt earlier sequences evaluated, the last token excepted."""
        return max((shared(ids[:-1], other) for other in self.evaluated), default=0)


def shared(one: list[int], other: list[int]) -> int:
    length = 0
    while length < min(len(one), len(other)) and one[length] == other[length]:
        length += 1
    return length


TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=18)
# what to do, which of the running sequences, how many tokens, and tokens for a new sequence
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["start", "go on", "say", "end", "end", "fail"]), st.integers(0, 9), st.integers(1, 9), TOKENS
    ),
    max_size=60,
)  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(n_blocks=st.integers(2, 14), steps=STEPS)
def test_any_schedule(n_blocks: int, steps: list[tuple[str, int, int, list[int]]]) -> None:
    memory = Memory(n_blocks)
    for action, which, count, tokens in steps:
        request = memory.running[which % len(memory.running)] if memory.running else None
        if action == "start" or request is None:
            memory.start(list(tokens))
        elif action == "go on":
            memory.compute(request, count)
        elif action == "say" and memory.compute(request, len(request.ids)):
            request.ids.append(count % 2)
        elif action == "end":
            memory.end(request)
        elif action == "fail":
            memory.fail(request)
        memory.check()
    for request in list(memory.running):
        memory.end(request)
    memory.check_all_over()


@settings(max_examples=150, deadline=None)
@given(prompts=st.lists(st.tuples(TOKENS, st.lists(st.integers(0, 1), max_size=8)), max_size=12))
def test_the_longest_known_start_is_found_while_nothing_is_evicted(
    prompts: list[tuple[list[int], list[int]]],
) -> None:
    memory = Memory(200)
    for prompt, answer in prompts:
        expected = memory.longest_known(prompt)
        request = memory.start(list(prompt))
        assert request is not None
        assert request.lease.cached == expected
        memory.compute(request, 99)
        for token in answer:
            request.ids.append(token)
            memory.compute(request, 1)
        memory.end(request)
    memory.check_all_over()


@settings(max_examples=150, deadline=None)
@given(prompts=st.lists(st.tuples(TOKENS, st.booleans()), min_size=1, max_size=10))
def test_what_failed_is_not_found(prompts: list[tuple[list[int], bool]]) -> None:
    memory = Memory(200)
    for prompt, fails in prompts:
        request = memory.start(list(prompt))
        assert request is not None
        memory.compute(request, 99)
        (memory.fail if fails else memory.end)(request)
        if fails:
            again = memory.pool.acquire([*prompt, 0])
            assert again is not None
            # What others left behind beside it may still share a beginning; but not through a block of its own.
            assert again.cached <= max((shared(prompt, other) for other in memory.evaluated), default=0)
            memory.pool.release(again, prompt[: again.cached])
    memory.check_all_over()


def test_a_failed_sequence_leaves_nothing_alone() -> None:
    memory = Memory(10)
    request = memory.start(list(range(18)))
    assert request is not None
    memory.compute(request, 99)
    assert memory.pool.cached == 4
    memory.fail(request)
    assert (memory.pool.cached, memory.pool.free) == (0, 10)


def test_a_failure_heals_what_it_was_built_on() -> None:
    # A prefix that was found and then gave no numbers must not be found by the next try as well.
    memory = Memory(10)
    first = memory.start(list(range(10)))
    assert first is not None
    memory.compute(first, 99)
    memory.end(first)
    second = memory.start([*range(8), 99, 98])
    assert second is not None
    assert second.lease.cached == 8
    memory.compute(second, 99)
    memory.fail(second)
    assert (memory.pool.cached, memory.pool.free) == (0, 10)


def test_a_failure_does_not_take_blocks_from_under_others() -> None:
    memory = Memory(10)
    first = memory.start(list(range(10)))
    assert first is not None
    memory.compute(first, 99)
    second = memory.start([*range(8), 99, 98])
    assert second is not None
    assert second.lease.cached == 8
    memory.compute(second, 99)
    memory.fail(first)
    memory.check()
    memory.end(second)
    memory.check_all_over()


def test_a_chat_alone_stays_in_one_run() -> None:
    memory, ids = Memory(40), [1, 2, 3]
    for turn in range(6):
        request = memory.start(list(ids))
        assert request is not None
        assert request.lease.cached == (len(ids) - 2 if turn else 0)  # all but the answer's last token and the new one
        for token in range(5):
            memory.compute(request, 99)
            request.ids.append(turn * 10 + token)
        first = request.lease.blocks[0]
        assert request.lease.blocks == list(range(first, first + len(request.lease.blocks)))
        memory.end(request)
        ids = [*request.ids, 7]
    memory.check_all_over()


def test_two_chats_side_by_side_each_stay_in_one_run() -> None:
    memory = Memory(40)
    one, other = memory.start([1] * 6), memory.start([2] * 6)
    assert one is not None
    assert other is not None
    for _ in range(40):
        for request in (one, other):
            assert memory.compute(request, 99)
            request.ids.append(5)
    for request in (one, other):
        blocks = request.lease.blocks
        assert blocks == list(range(blocks[0], blocks[0] + len(blocks)))


def test_the_least_recently_used_goes_first() -> None:
    memory = Memory(3)
    for token in (1, 2, 3):
        request = memory.start([token] * 4)
        assert request is not None
        memory.compute(request, 99)
        memory.end(request)
    for token, cached in ((1, 3), (4, 0)):  # 1 is used again, so 2 has waited longest when 4 needs a block
        request = memory.start([token] * 4)
        assert request is not None
        assert request.lease.cached == cached
        memory.compute(request, 99)
        memory.end(request)
    found = {token: _cached(memory, [token] * 4) for token in (1, 2, 3, 4)}
    assert found[2] == 0
    assert found[4] == 3


def test_the_end_of_a_sequence_goes_before_its_beginning() -> None:
    memory = Memory(6)
    request = memory.start(list(range(24)))
    assert request is not None
    memory.compute(request, 99)
    memory.end(request)
    other = memory.start([99] * 8)  # takes two blocks
    assert other is not None
    memory.compute(other, 99)
    memory.end(other)
    assert _cached(memory, list(range(24))) == 16


def _cached(memory: Memory, ids: list[int]) -> int:
    request = memory.start(ids)
    assert request is not None
    memory.running.remove(request)
    memory.pool.release(request.lease, ids[: request.lease.cached])
    return request.lease.cached


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 9])
def test_the_last_token_is_always_left_to_evaluate(length: int) -> None:
    memory = Memory(20)
    for _ in range(3):
        request = memory.start(list(range(length)))
        assert request is not None
        cached = request.lease.cached
        memory.compute(request, 99)
        memory.end(request)
    assert cached == length - 1


def test_clear_forgets_everything() -> None:
    memory = Memory(5)
    request = memory.start([1] * 9)
    assert request is not None
    memory.compute(request, 99)
    memory.end(request)
    memory.pool.clear()
    assert (memory.pool.free, memory.pool.cached, memory.pool.in_use) == (5, 0, 0)
    lease = memory.pool.acquire([1] * 9)
    assert lease is not None
    assert lease.cached == 0
