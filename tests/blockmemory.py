"""A block pool against a picture of the memory: every place of a block, in the pool and in the host tier, remembers the
whole sequence it was computed from, so that a wrongly shared, overwritten or too early reused place is seen at once.
"""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import strategies as st

from backend.cache.blocks import BlockCopy, BlockPool, BlockRestore, BlockStore, Lease
from backend.cache.tree import NOWHERE, Node, Root, shared

BLOCK = 4
TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=18)


@dataclass(eq=False)
class Running:
    ids: list[int]
    lease: Lease
    computed: int
    salt: bytes


class Slots:
    """A host tier that grows by two slots at a time, up to its limit."""

    def __init__(self, limit: int) -> None:
        self.limit, self.slots = limit, 0

    def grow(self) -> int:
        self.slots = min(self.limit, self.slots + 2)
        return self.slots


class Memory:
    """A pool, what its blocks really hold, and the sequences that run. Each method does what an engine would do.

    Moves are carried out when something is computed or looked at, not before: as an engine does it at its next step.
    """

    def __init__(self, n_blocks: int, slots: int = 0) -> None:
        self.tier = Slots(slots)
        self.pool = BlockPool(n_blocks, BLOCK, self.tier if slots else None)
        self.places: dict[tuple[int, int], tuple[object, ...]] = {}
        self.host: dict[tuple[int, int], tuple[object, ...]] = {}
        self.running: list[Running] = []
        self.evaluated: list[list[int]] = []  # of sequences that are over

    def start(self, ids: list[int], salt: bytes = b"", tokens: int = 0) -> Running | None:
        room = self.pool.n_blocks - self.pool.in_use
        before = (self.pool.free, self.pool.cached, self.pool.in_use, self.pool.hosted)
        lease = self.pool.acquire(ids, salt, tokens)
        if lease is None:
            # At most one block for each block of tokens is needed.
            assert room < -(-max(len(ids) - 1, tokens) // BLOCK), "refused although there was room"
            assert before == (self.pool.free, self.pool.cached, self.pool.in_use, self.pool.hosted)
            return None
        assert 0 <= lease.cached <= len(ids) - 1
        assert len(lease.blocks) >= -(-max(lease.cached, tokens) // BLOCK)
        request = Running(ids, lease, lease.cached, salt)
        self.running.append(request)
        return request

    def carry_out(self) -> None:
        """The moves that were written down, in their order; a place that was never written stays unknown."""
        for move in self.pool.take_moves():
            if isinstance(move, BlockCopy):
                here, source, there, target, tokens = self.places, move.source, self.places, move.target, move.tokens
            elif isinstance(move, BlockStore):
                here, source, there, target, tokens = self.places, move.block, self.host, move.slot, BLOCK
                assert move.slot < self.tier.limit
            else:
                assert isinstance(move, BlockRestore)
                here, source, there, target, tokens = self.host, move.slot, self.places, move.block, BLOCK
            for place in range(tokens):
                there[target, place] = here.get((source, place), ())

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
        self.carry_out()
        for at in range(request.computed, until):
            self.places[request.lease.blocks[at // BLOCK], at % BLOCK] = (request.salt, *request.ids[: at + 1])
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
        self.carry_out()
        for request in self.running:
            blocks = request.lease.blocks
            seen = [self.places[blocks[at // BLOCK], at % BLOCK] for at in range(request.computed)]
            assert seen == [(request.salt, *request.ids[: at + 1]) for at in range(request.computed)]
            assert len(set(blocks)) == len(blocks)
        held = {block for request in self.running for block in request.lease.blocks}
        assert len(held) <= self.pool.in_use <= self.pool.n_blocks
        self._check_tree()

    def _check_tree(self) -> None:
        """Each place is somebody's exactly once, holds what the tree says, and the counts are those of the nodes."""
        pool, places = self.pool, self.pool._places
        roots = list(pool._tree._roots.values())
        nodes = [(root, node) for root in roots for node in root.below()[1:]]
        owned = [block for request in self.running for block in request.lease._owned]
        blocks = [node.block for _, node in nodes if node.block != NOWHERE]
        free = [block for block in range(pool.n_blocks) if block in places.free]
        assert sorted(owned + blocks + free) == list(range(pool.n_blocks)), "a block was lost, or is had twice"
        slots = [node.slot for _, node in nodes if node.slot != NOWHERE]
        assert sorted(slots + places._slots) == list(range(self.tier.slots))
        assert (len(free), len(blocks), len(slots)) == (pool.free, pool.cached, pool.hosted)
        assert pool.in_use == len(owned) + sum(node.block != NOWHERE and node.pins > 0 for _, node in nodes)
        for root, node in nodes:
            assert (node.block == NOWHERE) != (node.slot == NOWHERE)
            assert node.near == sum(child.block != NOWHERE for child in node.children.values())
            assert node.sorted == sorted(node.children)
            assert node.parent is not None
            assert node.pins <= node.parent.pins
            assert node.parent is root or len(node.parent.tokens) == BLOCK
            assert node.block == NOWHERE or node.parent is root or node.parent.block != NOWHERE
            assert not node.pins or node.block != NOWHERE
            here, place = (self.places, node.block) if node.block != NOWHERE else (self.host, node.slot)
            before = beginning(node.parent)
            for at in range(len(node.tokens)):
                assert here[place, at] == (root.salt, *before, *node.tokens[: at + 1])
        assert all(root.children or root.pins for root in roots), "an empty root stays for ever"

    def check_all_over(self) -> None:
        assert not self.running
        assert self.pool.in_use == 0
        assert self.pool.free + self.pool.cached == self.pool.n_blocks

    def longest_known(self, ids: list[int]) -> int:
        """How much of a prompt earlier sequences evaluated, the last token excepted."""
        return max((shared(ids[:-1], other) for other in self.evaluated), default=0)


def beginning(node: Node) -> tuple[int, ...]:
    """All tokens up to the end of a node."""
    return () if isinstance(node, Root) or node.parent is None else (*beginning(node.parent), *node.tokens)


def finished(memory: Memory, ids: list[int], salt: bytes = b"") -> int:
    """Read a sequence from start to end. Returns how much of it was found."""
    request = memory.start(list(ids), salt)
    assert request is not None
    cached = request.lease.cached
    assert memory.compute(request, 99)
    memory.end(request)
    memory.check()
    return cached
