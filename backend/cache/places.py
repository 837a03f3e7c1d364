"""Where the blocks of a cache are: in the pool, or in the host tier below it; and who has to go when room is needed.

Plain Python. Least recently used leaves leave the pool first, into the host tier where there is one; what has waited
longest there is lost for good. What is to be moved is written down in order; whoever owns the memory carries it out, in
that order and before anything else is computed. So a place may be promised to the next one as soon as its move is
written down.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import Protocol

from backend.cache.runs import FreeRuns
from backend.cache.tree import NOWHERE, LeastUsed, Node, Tree, add_child, remove_child


@dataclass(frozen=True)
class BlockCopy:
    """The first `tokens` tokens of block `source` are to be copied into block `target`."""

    source: int
    target: int
    tokens: int


@dataclass(frozen=True)
class BlockStore:
    """Block `block` is to be copied into the host tier's slot `slot`."""

    block: int
    slot: int


@dataclass(frozen=True)
class BlockRestore:
    """The host tier's slot `slot` is to be copied into block `block`."""

    slot: int
    block: int


Move = BlockCopy | BlockStore | BlockRestore


class Tier(Protocol):
    """Memory for evicted blocks, in slots that are numbered from 0."""

    slots: int  # that there are now

    def grow(self) -> int:
        """Make room for more blocks, as far as the limit and memory allow; how many slots there are now."""
        ...


@dataclass
class CacheCounts:
    """Blocks, since the model was loaded."""

    evicted: int = 0  # had to leave the pool, to the host tier or for good
    stored: int = 0  # of these, to the host tier
    restored: int = 0  # came back from there
    dropped: int = 0  # left the host tier for good


class Places:
    """`n_blocks` places in the pool, the slots of the host tier, and the nodes that have them."""

    def __init__(self, n_blocks: int, tier: Tier | None, tree: Tree, counts: CacheCounts) -> None:
        self._n_blocks, self._tier, self._tree, self._counts = n_blocks, tier, tree, counts
        self.free = FreeRuns(n_blocks)
        self.cached = self.idle = 0  # nodes in the pool; of these, those nobody uses
        self.moves: list[Move] = []
        self._slots: list[int] = []  # heap of free slots: the lowest first, so that memory is used late
        self._slot_count = 0
        self._leaves = LeastUsed(lambda node: node.block != NOWHERE and not node.pins and not node.near)
        self._hosted = LeastUsed(lambda node: node.slot != NOWHERE and not node.pins and not node.children)
        if tier is not None:
            self._add_slots(tier.slots)

    @property
    def available(self) -> int:
        """Blocks that hold nothing, or what nobody uses."""
        return len(self.free) + self.idle

    @property
    def hosted(self) -> int:
        return self._slot_count - len(self._slots)

    def pin(self, node: Node, now: int) -> None:
        """Somebody uses it from now on; it stays where it is."""
        if not node.pins and node.block != NOWHERE:
            self.idle -= 1
        node.pins += 1
        node.used = now

    def unpin(self, node: Node) -> None:
        node.pins -= 1
        if node.pins:
            return
        if node.block != NOWHERE:
            self.idle += 1
        self._may_go(node)
        self._leaves.tidy(self._n_blocks)
        self._hosted.tidy(self._slot_count)

    def add(self, node: Node) -> None:
        """A new node, in the tree from now on, that has its place already."""
        assert node.parent is not None
        add_child(node.parent, node)
        if node.block != NOWHERE:
            self.cached += 1
            self.idle += not node.pins
        self._may_go(node)

    def settle(self, node: Node, block: int) -> None:
        """A pinned node of the host tier has this block of the pool from now on, and no slot."""
        assert node.parent is not None
        assert node.pins
        heapq.heappush(self._slots, node.slot)
        node.block, node.slot = block, NOWHERE
        node.parent.near += 1
        self.cached += 1

    def bring_back(self, node: Node, after: int | None) -> None:
        """A pinned node of the host tier, whose parent is in the pool, comes back to the pool."""
        block = self.allocate(after)
        self.copy_in(node, block)
        self.settle(node, block)

    def copy_in(self, node: Node, block: int) -> None:
        """What the host tier has of a node is wanted in this block."""
        self.moves.append(BlockRestore(node.slot, block))
        self._counts.restored += 1

    def detach(self, node: Node) -> None:
        """Out of the tree; its block or slot is the caller's. It has no children and nobody uses it."""
        parent = node.parent
        assert parent is not None
        assert not node.pins
        remove_child(node)
        if node.block != NOWHERE:
            self.cached -= 1
            self.idle -= 1
        node.block = node.slot = NOWHERE
        self._may_go(parent)
        self._tree.leave(parent)

    def remove(self, node: Node) -> None:
        """Out of the tree, and its place is free."""
        block, slot = node.block, node.slot
        self.detach(node)
        if block != NOWHERE:
            self.free.add(block)
        if slot != NOWHERE:
            heapq.heappush(self._slots, slot)

    def forget(self, top: Node) -> None:
        """Remove a node and everything below it, unless somebody's path goes through there."""
        for node in reversed(top.below()):
            gone = node.block == node.slot == NOWHERE
            if not gone and not node.pins and not node.children:
                self.remove(node)

    def allocate(self, after: int | None) -> int:
        """A free block, the one right after `after` if possible: a sequence in one run needs no gathering.

        There must be one, or one that can be evicted: `available`.
        """
        if not self.free:
            self._evict()
        block = after + 1 if after is not None and after + 1 in self.free else self.free.start_of_new()
        self.free.take(block)
        return block

    def free_slot(self) -> int | None:
        """A slot of the host tier that holds nothing; the tier grows for it as far as it may."""
        if not self._slots and self._tier is not None:
            self._add_slots(self._tier.grow())
        return heapq.heappop(self._slots) if self._slots else None

    def _evict(self) -> None:
        """Free the block of the least recently used leaf that nobody uses."""
        node = self._leaves.pop()
        assert node is not None, "blocks were promised that nobody can give"
        self._counts.evicted += 1
        slot = self.free_slot()
        if slot is None:
            slot = self._slot_of_another()
        if slot is None:
            self.remove(node)  # it has no children: theirs could have been taken
            return
        parent, block = node.parent, node.block
        assert parent is not None
        self.moves.append(BlockStore(block, slot))
        self._counts.stored += 1
        node.block, node.slot = NOWHERE, slot
        parent.near -= 1
        self.cached -= 1
        self.idle -= 1
        self.free.add(block)
        self._may_go(parent)
        self._may_go(node)

    def _slot_of_another(self) -> int | None:
        """That of the host tier's least recently used leaf, which is lost."""
        oldest = self._hosted.pop()
        if oldest is None:
            return None
        slot = oldest.slot
        self.detach(oldest)
        self._counts.dropped += 1
        return slot

    def _may_go(self, node: Node) -> None:
        self._leaves.add(node)
        self._hosted.add(node)

    def _add_slots(self, count: int) -> None:
        """There are `count` slots from now on."""
        for slot in range(self._slot_count, count):
            heapq.heappush(self._slots, slot)
        self._slot_count = max(self._slot_count, count)
