"""Which block of the KV cache holds which tokens: a prefix index over fixed blocks. Plain Python, no tensors.

Finished sequences leave their blocks in a tree, keyed by the tokens they were computed from; a new sequence takes the
longest path that matches its own tokens, so nothing that any sequence has evaluated is evaluated again while there is
room. Blocks nobody uses are evicted, least recently used leaf first.

Matches are exact to the token: when a match ends inside a block, its first tokens are copied into a new block of the
taker (`Lease.copy`), or the whole block changes hands when nobody else has a use for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(eq=False)
class _Node:
    """A cached block: the tokens in it, all of whose predecessors are the path from the root."""

    block: int
    tokens: tuple[int, ...]
    parent: _Node | None
    children: dict[tuple[int, ...], _Node] = field(default_factory=dict)
    pins: int = 0  # leases whose path goes through here
    used: int = 0


@dataclass(frozen=True)
class BlockCopy:
    """The first `tokens` tokens of block `source` are to be copied into block `target` before use."""

    source: int
    target: int
    tokens: int


class Lease:
    """The blocks of one running sequence, in order, and how many of its tokens the cache already held."""

    def __init__(self) -> None:
        self.blocks: list[int] = []
        self.cached = 0  # tokens found in the cache
        self.copy: BlockCopy | None = None  # to be carried out once, right after `acquire`
        self._path: list[_Node] = []  # pinned tree nodes, one for each of the first blocks
        self._owned: set[int] = set()  # blocks that are not in the tree: ours to free


class BlockPool:
    """`n_blocks` blocks of `block_size` tokens. Not thread-safe: it belongs to the engine thread."""

    def __init__(self, n_blocks: int, block_size: int) -> None:
        self.n_blocks, self.block_size = n_blocks, block_size
        self._free = set(range(n_blocks))
        self._root = _Node(-1, (), None)
        self._nodes: dict[int, _Node] = {}  # by block
        self._clock = 0

    # counts -----------------------------------------------------------------------------------------------------------

    @property
    def free(self) -> int:
        """Blocks that hold nothing."""
        return len(self._free)

    @property
    def cached(self) -> int:
        """Blocks in the tree, whether in use or not."""
        return len(self._nodes)

    @property
    def in_use(self) -> int:
        """Blocks that some lease holds: everything that could not be had by evicting."""
        # A copy, because status may be asked from another thread.
        return self.n_blocks - self.free - sum(1 for node in list(self._nodes.values()) if self._unpinned(node))

    # a sequence's life ------------------------------------------------------------------------------------------------

    def acquire(self, ids: Sequence[int]) -> Lease | None:
        """Start a sequence of these tokens. At least the last token is left to evaluate, for its logits.

        None when there is no free block for a partial match's copy; try again when others have ended.
        """
        self._clock += 1
        lease = Lease()
        node, at, limit = self._root, 0, len(ids) - 1
        while at < limit:
            child = node.children.get(tuple(ids[at : at + self.block_size]))
            if child is None or len(child.tokens) < self.block_size or at + self.block_size > limit:
                break
            self._pin(lease, child)
            node, at = child, at + self.block_size
        child, length = self._longest_start(node, ids[at:limit])
        if child is not None and length:
            if not self._take_start(lease, child, length):
                self.release(lease, ids[:at])
                return None
            at += length
        lease.cached = at
        return lease

    def extend(self, lease: Lease, tokens: int) -> bool:
        """Make room for `tokens` tokens in all. False, and nothing changed, when there are too few blocks."""
        wanted = -(-tokens // self.block_size) - len(lease.blocks)
        taken: list[int] = []
        while len(taken) < wanted:
            before = taken or lease.blocks
            block = self._allocate(after=before[-1] if before else None)
            if block is None:
                self._free.update(taken)
                return False
            taken.append(block)
        lease.blocks += taken
        lease._owned.update(taken)
        return True

    def commit(self, lease: Lease, ids: Sequence[int]) -> None:
        """The keys and values of these first tokens of the sequence are computed: share its full blocks."""
        full = len(ids) // self.block_size
        while len(lease._path) < full:
            index = len(lease._path)
            tokens = tuple(ids[index * self.block_size : (index + 1) * self.block_size])
            self._publish(lease, index, tokens)

    def release(self, lease: Lease, ids: Sequence[int]) -> None:
        """The sequence is over, having computed exactly these tokens. Its blocks stay cached until evicted."""
        self._clock += 1
        self.commit(lease, ids)
        index, rest = len(lease._path), tuple(ids[len(lease._path) * self.block_size :])
        if rest and index < len(lease.blocks):
            parent = lease._path[-1] if lease._path else self._root
            known, length = self._longest_start(parent, rest)
            if known is None or length < len(rest):
                self._publish(lease, index, rest)
        for node in lease._path:
            node.pins -= 1
            node.used = self._clock
        self._free.update(lease._owned)
        lease.blocks, lease._path, lease._owned = [], [], set()

    def discard(self, lease: Lease) -> None:
        """The sequence went wrong: its blocks, and what was built on them, are not to be found by anyone again.

        Blocks that another lease is using stay until that one ends.
        """
        for node in lease._path:
            node.pins -= 1
        for node in lease._path:
            if self._nodes.get(node.block) is node:
                self._forget(node)
        self._free.update(lease._owned)
        lease.blocks, lease._path, lease._owned = [], [], set()

    def clear(self) -> None:
        """Forget everything; no lease may be open."""
        self._free = set(range(self.n_blocks))
        self._root, self._nodes = _Node(-1, (), None), {}

    # the tree ---------------------------------------------------------------------------------------------------------

    def _pin(self, lease: Lease, node: _Node) -> None:
        node.pins += 1
        node.used = self._clock
        lease._path.append(node)
        lease.blocks.append(node.block)

    def _publish(self, lease: Lease, index: int, tokens: tuple[int, ...]) -> None:
        """Put the lease's block `index` into the tree, or follow an equal block that is there already."""
        parent = lease._path[-1] if lease._path else self._root
        node = parent.children.get(tokens)
        if node is None:
            block = lease.blocks[index]
            node = _Node(block, tokens, parent)
            parent.children[tokens] = node
            self._nodes[block] = node
            lease._owned.discard(block)
            self._drop_shorter(parent, node)
        # With an equal node the lease keeps computing in its own block, and pins the node as the way to what follows.
        node.pins += 1
        node.used = self._clock
        lease._path.append(node)

    def _drop_shorter(self, parent: _Node, node: _Node) -> None:
        """A part-filled leaf that is a beginning of the new block says nothing the new block does not."""
        for other in list(parent.children.values()):
            shorter = len(other.tokens) < len(node.tokens) and node.tokens[: len(other.tokens)] == other.tokens
            if shorter and self._unpinned(other) and not other.children:
                self._remove(other)
                self._free.add(other.block)

    def _longest_start(self, node: _Node, ids: Sequence[int]) -> tuple[_Node | None, int]:
        """The child that shares the most first tokens with `ids`, and how many."""
        best, best_length = None, 0
        for child in node.children.values():
            length = 0
            for ours, theirs in zip(ids, child.tokens, strict=False):
                if ours != theirs:
                    break
                length += 1
            if length > best_length:
                best, best_length = child, length
        return best, best_length

    def _take_start(self, lease: Lease, child: _Node, length: int) -> bool:
        if length == len(child.tokens) and not child.children and self._unpinned(child):
            self._remove(child)  # the whole block changes hands: nothing to copy, and the blocks stay in one run
            lease.blocks.append(child.block)
            lease._owned.add(child.block)
            return True
        child.pins += 1  # it must survive the search for a free block
        target = self._allocate(after=lease.blocks[-1] if lease.blocks else None)
        child.pins -= 1
        if target is None:
            return False
        child.used = self._clock
        lease.blocks.append(target)
        lease._owned.add(target)
        lease.copy = BlockCopy(child.block, target, length)
        return True

    def _unpinned(self, node: _Node) -> bool:
        return node.pins == 0

    def _remove(self, node: _Node) -> None:
        assert node.parent is not None
        del node.parent.children[node.tokens]
        del self._nodes[node.block]

    def _forget(self, top: _Node) -> None:
        """Remove a node and everything below it, unless somebody's path goes through there."""
        below = [top]
        for node in below:  # grows while it is walked: parents before children
            below += node.children.values()
        for node in reversed(below):
            if self._unpinned(node) and not node.children:
                self._remove(node)
                self._free.add(node.block)

    # free blocks ------------------------------------------------------------------------------------------------------

    def _allocate(self, after: int | None) -> int | None:
        """A free block, the one right after `after` if possible: a sequence in one run needs no gathering."""
        if not self._free and not self._evict():
            return None
        block = after + 1 if after is not None and after + 1 in self._free else self._start_of_new_run()
        self._free.discard(block)
        return block

    def _start_of_new_run(self) -> int:
        """Where a sequence has most room to grow: half-way into the longest free run, so that whoever ends at the
        run's beginning can grow as well."""
        longest, start, previous = (-1, 0), -1, -2
        for block in sorted(self._free):
            if block != previous + 1:
                start = block
            previous = block
            if block - start + 1 > longest[1]:
                longest = (start, block - start + 1)
        first, length = longest
        return first if first == 0 else first + length // 2

    def _evict(self) -> bool:
        """Free the least recently used leaf that nobody uses. False when there is none."""
        leaves = [node for node in self._nodes.values() if self._unpinned(node) and not node.children]
        if not leaves:
            return False
        node = min(leaves, key=lambda leaf: leaf.used)
        self._remove(node)
        self._free.add(node.block)
        return True
