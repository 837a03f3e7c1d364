"""Below and beside the block pool: the host tier, salts, what is kept over a restart, and the parts of all that."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from backend.cache.blocks import BlockPool
from backend.cache.runs import FreeRuns
from backend.cache.tree import NOWHERE, Node, Root, shared
from tests.blockmemory import BLOCK, TOKENS, Memory, finished

# the host tier -----------------------------------------------------------------------------------------------------


def test_what_had_to_leave_comes_back() -> None:
    memory = Memory(5, slots=10)
    assert finished(memory, [1] * 16) == 0
    assert finished(memory, [2] * 20) == 0  # takes all five blocks
    assert (memory.pool.hosted, memory.pool.counts.stored, memory.pool.counts.dropped) == (4, 4, 0)
    assert finished(memory, [1] * 16) == 15
    assert memory.pool.counts.restored == 4
    assert finished(memory, [2] * 20) == 19
    assert (memory.pool.counts.evicted, memory.pool.counts.stored) == (12, 12)


def test_the_tier_keeps_its_limit_and_loses_the_oldest() -> None:
    memory = Memory(2, slots=4)
    for token in range(1, 6):
        assert finished(memory, [token] * 8) == 0
    assert (memory.pool.hosted, memory.pool.counts.dropped) == (4, 4)
    assert finished(memory, [3] * 8) == 7
    assert finished(memory, [1] * 8) == 0


def test_without_a_tier_what_leaves_is_lost() -> None:
    memory = Memory(2)
    assert finished(memory, [1] * 8) == 0
    assert finished(memory, [2] * 8) == 0
    assert finished(memory, [1] * 8) == 0
    assert (memory.pool.counts.evicted, memory.pool.counts.stored, memory.pool.hosted) == (4, 0, 0)


def test_nobody_is_refused_for_ever() -> None:
    """A sequence that fills the whole pool and begins like one that is there: the copy's source is in its way."""
    memory = Memory(3)
    assert finished(memory, list(range(11))) == 0
    request = memory.start([*range(10), 99, 98], tokens=12)
    assert request is not None
    assert request.lease.cached == 8
    assert memory.compute(request, 99)


def test_a_refusal_evicts_nothing() -> None:
    memory = Memory(4, slots=4)
    assert finished(memory, [1] * 8) == 0
    other = memory.start([2] * 8, tokens=8)
    assert other is not None
    assert memory.compute(other, 99)
    assert memory.start([3] * 12, tokens=12) is None
    assert (memory.pool.counts.evicted, memory.pool.cached) == (0, 4)


def test_people_with_different_salts_never_meet() -> None:
    memory = Memory(40, slots=8)
    prompt = list(range(18))
    assert finished(memory, prompt, b"one") == 0
    assert finished(memory, prompt, b"other") == 0
    assert finished(memory, prompt) == 0
    assert finished(memory, prompt, b"one") == 17
    assert len(memory.pool._tree) == 3
    memory.pool.clear()
    assert len(memory.pool._tree) == 0


def test_a_salt_that_is_gone_leaves_nothing() -> None:
    memory = Memory(3)
    for person in range(20):
        assert finished(memory, [person] * 12, bytes([person])) == 0
    assert len(memory.pool._tree) == 1
    assert memory.start([1] * 40, b"nobody", tokens=40) is None
    assert len(memory.pool._tree) == 1


# what is kept over a restart ---------------------------------------------------------------------------------------


def test_the_latest_blocks_come_first_and_parents_before_children() -> None:
    memory = Memory(20)
    finished(memory, [1] * 10)
    finished(memory, [2] * 10)
    found = memory.pool.latest(99)
    assert [node.tokens for node in found] == [(2,) * 4, (2,) * 4, (2,) * 2, (1,) * 4, (1,) * 4, (1,) * 2]
    assert [node.tokens for node in memory.pool.latest(2)] == [(2,) * 4, (2,) * 4]
    assert [node.tokens for node in memory.pool.latest(99, [1] * 9)] == [(1,) * 4, (1,) * 4, (1,) * 2]
    assert memory.pool.latest(99, salt=b"other") == []


@settings(max_examples=100, deadline=None)
@given(prompts=st.lists(TOKENS, max_size=8), blocks=st.integers(1, 30), slots=st.integers(0, 6))
def test_planted_blocks_are_found(prompts: list[list[int]], blocks: int, slots: int) -> None:
    first = Memory(200)
    for prompt in prompts:
        finished(first, prompt)
    second = Memory(blocks, slots)
    planted: dict[Node, Node] = {}
    for old in first.pool.latest(999):
        assert old.parent is not None
        parent = planted.get(old.parent)
        if parent is None and not isinstance(old.parent, Root):
            continue  # there was no room for it
        made = second.pool.plant(parent, old.tokens)
        if made is None:
            continue
        planted[old], new = made
        assert new
        there, place = (second.places, made[0].block) if made[0].block != NOWHERE else (second.host, made[0].slot)
        for at in range(len(old.tokens)):
            there[place, at] = first.places[old.block, at]
    second.check()
    assert len(planted) == min(first.pool.cached, blocks + slots)
    for old, new_node in planted.items():
        again = second.pool.plant(planted.get(old.parent) if old.parent is not None else None, old.tokens)
        assert again == (new_node, False)
    for prompt in prompts if blocks + slots > 30 else ():
        assert finished(second, prompt) == len(prompt) - 1


# its parts ---------------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(n=st.integers(0, 24), steps=st.lists(st.integers(0, 23), max_size=60))
def test_free_runs_are_those_that_a_look_at_all_blocks_finds(n: int, steps: list[int]) -> None:
    runs, free = FreeRuns(n), set(range(n))

    def start_of_longest() -> int:
        found = [[min(free)]]
        for block in sorted(free)[1:]:
            if block == found[-1][-1] + 1:
                found[-1].append(block)
            else:
                found.append([block])
        longest = max(found, key=len)
        return longest[0] if longest[0] == 0 else longest[0] + len(longest) // 2

    for step in steps:
        block = runs.start_of_new() if free and step % 3 == 0 else step
        if block in free:
            runs.take(block)
            free.remove(block)
        elif block < n:
            runs.add(block)
            free.add(block)
        assert len(runs) == len(free)
        assert all((each in runs) == (each in free) for each in range(-1, n + 1))
        if free:
            assert runs.start_of_new() == start_of_longest()


@given(children=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4), max_size=12), ids=TOKENS)
def test_the_longest_start_is_that_of_a_look_at_all_children(children: list[list[int]], ids: list[int]) -> None:
    memory = Memory(40)
    for tokens in children:
        memory.pool.plant(None, tokens)
    root = memory.pool._tree.root(b"")
    found, length = root.longest_start(ids)
    assert length == max((shared(tokens, ids) for tokens in children), default=0)
    assert (found is None) == (length == 0)
    assert found is None or shared(found.tokens, ids) == length
    if tuple(ids[:length]) in root.children:
        assert found is root.children[tuple(ids[:length])]


def test_a_pool_of_many_blocks_looks_at_few_of_them() -> None:
    """20,000 blocks, all used, each start evicting: what a step costs must not grow with the pool."""
    pool, looks = BlockPool(20_000, BLOCK), 0
    for person in range(5_000):
        lease = pool.acquire([person] * 16, tokens=16)
        assert lease is not None
        pool.release(lease, [person] * 16)
    assert pool.free == 0

    def counted(node: Node) -> bool:
        nonlocal looks
        looks += 1
        return fits(node)

    leaves = pool._places._leaves
    fits, leaves._fits = leaves._fits, counted
    for person in range(5_000, 5_100):
        lease = pool.acquire([person] * 16, tokens=16)
        assert lease is not None
        pool.release(lease, [person] * 16)
    assert pool.counts.evicted == 400
    assert looks < 100 * 60


def test_an_index_that_never_evicts_does_not_grow() -> None:
    memory = Memory(30)
    for _ in range(500):
        finished(memory, list(range(18)))
    assert len(memory.pool._places._leaves._heap) < 150
