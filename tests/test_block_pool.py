"""The block pool: any schedule keeps its books, what was computed is found, and who has to go goes in order."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backend.cache.blocks import BlockPool
from backend.cache.tree import shared
from tests.blockmemory import TOKENS, Memory

# what to do, which of the running sequences, how many tokens, and tokens for a new sequence
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["start", "go on", "say", "end", "end", "fail"]), st.integers(0, 9), st.integers(1, 9), TOKENS
    ),
    max_size=60,
)  # fmt: skip


@settings(max_examples=600, deadline=None)
@given(n_blocks=st.integers(2, 14), slots=st.integers(0, 9), steps=STEPS)
def test_any_schedule(n_blocks: int, slots: int, steps: list[tuple[str, int, int, list[int]]]) -> None:
    memory = Memory(n_blocks, slots)
    for action, which, count, tokens in steps:
        request = memory.running[which % len(memory.running)] if memory.running else None
        if action == "start" or request is None:
            memory.start(list(tokens), salt=b"another" if which == 9 else b"", tokens=len(tokens) if count > 6 else 0)
        elif action == "go on":
            memory.compute(request, count)
        elif action == "say" and memory.compute(request, len(request.ids)):
            request.ids.append(count % 2)
        elif action == "end":
            memory.end(request)
        elif action == "fail":
            memory.fail(request)
        if count % 2:  # often several things are written down before any is carried out
            memory.check()
    for request in list(memory.running):
        memory.end(request)
    memory.check()
    memory.check_all_over()


@settings(max_examples=150, deadline=None)
@given(prompts=st.lists(st.tuples(TOKENS, st.lists(st.integers(0, 1), max_size=8)), max_size=12), tier=st.booleans())
def test_the_longest_known_start_is_found_while_there_is_room(
    prompts: list[tuple[list[int], list[int]]], tier: bool
) -> None:
    """Whether all of it is in the pool, or the pool holds one sequence and everything else is in the host tier."""
    memory = Memory(9, slots=300) if tier else Memory(200)
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
    memory = Memory(5, slots=3)
    request = memory.start([1] * 9)
    assert request is not None
    memory.compute(request, 99)
    memory.end(request)
    memory.pool.clear()
    assert (memory.pool.free, memory.pool.cached, memory.pool.in_use) == (5, 0, 0)
    lease = memory.pool.acquire([1] * 9)
    assert lease is not None
    assert lease.cached == 0


def test_what_is_planted_is_found_with_its_salt_only() -> None:
    pool = BlockPool(8, 4)
    assert pool.plant(None, (1, 2, 3, 4), b"one")
    for salt, cached in ((b"one", 4), (b"two", 0), (b"", 0)):
        lease = pool.acquire([1, 2, 3, 4, 5], salt, 6)
        assert lease is not None
        assert lease.cached == cached
        pool.release(lease, ())
