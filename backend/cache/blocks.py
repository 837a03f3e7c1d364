"""Which blocks of the KV cache hold which tokens. Plain Python, no torch: numbers of blocks, not their contents.

Sequences that begin alike share blocks. Every block that was ever filled stays findable in a tree until its place is
needed: a chat's next turn finds all its earlier tokens, so nothing that any sequence has evaluated is evaluated again
while there is room. Which blocks have to go, and where to, is the business of `places.py`.

Matches are exact to the token: when a match ends inside a block, its first tokens are copied into a new block of the
taker, or the whole block changes hands when nobody else has a use for it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from backend.cache.places import BlockCopy, BlockRestore, BlockStore, CacheCounts, Move, Places, Tier
from backend.cache.tree import NOWHERE, Node, Root, Tree

__all__ = ["BlockCopy", "BlockPool", "BlockRestore", "BlockStore", "CacheCounts", "Lease", "Move", "Tier"]


@dataclass
class _Match:
    """What the tree has of a sequence: whole blocks, and the first `tokens` tokens of one more."""

    path: list[Node]
    part: Node | None = None
    tokens: int = 0

    @property
    def whole(self) -> bool:
        """Whether the last block is wanted as it is and nobody else has a use for it: it changes hands."""
        part = self.part
        return part is not None and self.tokens == len(part.tokens) and not part.children and not part.pins


class Lease:
    """The blocks of one running sequence, in order, and how many of its tokens the cache already held."""

    def __init__(self, root: Root) -> None:
        self.blocks: list[int] = []
        self.cached = 0  # tokens found in the cache
        self._root: Root | None = root  # None: it is over
        self._path: list[Node] = []  # pinned tree nodes, one for each of the first blocks
        self._owned: set[int] = set()  # blocks that are not in the tree: ours to free


class BlockPool:
    """`n_blocks` blocks of `block_size` tokens. Not thread-safe: it belongs to the engine thread."""

    def __init__(self, n_blocks: int, block_size: int, tier: Tier | None = None) -> None:
        """tier: memory that evicted blocks go to; None: they are lost."""
        self.n_blocks, self.block_size = n_blocks, block_size
        self._tier, self._clock = tier, 0
        self.counts = CacheCounts()
        self.clear()

    def clear(self) -> None:
        """Forget everything, and moves that were not carried out; no lease may be open."""
        self._tree = Tree()
        self._places = Places(self.n_blocks, self._tier, self._tree, self.counts)

    @property
    def clock(self) -> int:
        """Changes whenever a sequence begins or ends."""
        return self._clock

    # counts -----------------------------------------------------------------------------------------------------------

    @property
    def free(self) -> int:
        """Blocks that hold nothing."""
        return len(self._places.free)

    @property
    def cached(self) -> int:
        """Blocks of the pool in the tree, whether in use or not."""
        return self._places.cached

    @property
    def in_use(self) -> int:
        """Blocks that some lease holds: everything that could not be had by evicting. From any thread."""
        return self.n_blocks - self._places.available

    @property
    def hosted(self) -> int:
        """Blocks in the host tier."""
        return self._places.hosted

    def take_moves(self) -> list[Move]:
        """What is to be moved, in this order, before anything is computed. Each is given out once."""
        moves, self._places.moves = self._places.moves, []
        return moves

    # a sequence's life ------------------------------------------------------------------------------------------------

    def acquire(self, ids: Sequence[int], salt: bytes = b"", tokens: int = 0) -> Lease | None:
        """Start a sequence of these tokens, with room for `tokens` tokens in all. At least the last of `ids` is left to
        evaluate, for its logits.

        `salt`: only sequences of the same salt find each other's blocks. None, and nothing changed, when there are too
        few blocks for these tokens and for what has to be copied or brought back; try again when others have ended.
        """
        root = self._tree.root(salt)
        match = self._match(root, ids)
        if match.part is not None and not self._has_room(match, tokens):
            match = _Match(match.path)  # without the copy it may do
        if not self._has_room(match, tokens):
            self._tree.leave(root)
            return None
        self._clock += 1
        lease = Lease(root)
        root.pins += 1
        self._take(lease, match)
        lease.cached = len(match.path) * self.block_size + match.tokens
        while len(lease.blocks) * self.block_size < tokens:
            self._add_own(lease)
        return lease

    def needed(self, ids: Sequence[int], salt: bytes, tokens: int, leaving: Sequence[Lease] = ()) -> int:
        """How many of the available blocks `acquire` would take, at most; with so many it succeeds. `leaving`: as if
        these leases had ended."""
        root = self._tree.root(salt)
        path = self._match(root, ids).path
        self._tree.leave(root)
        pins = _pins(leaving)
        return max(-(-tokens // self.block_size), len(path)) - sum(node.pins > pins[node] for node in path)

    def available_without(self, leaving: Sequence[Lease]) -> int:
        """How many blocks could be had for new sequences if these leases had ended."""
        given_up = sum(node.block != NOWHERE and node.pins == pins for node, pins in _pins(leaving).items())
        return self._places.available + given_up + sum(len(lease._owned) for lease in leaving)

    def extend(self, lease: Lease, tokens: int) -> bool:
        """Make room for `tokens` tokens in all. False, and nothing changed, when there are too few blocks."""
        wanted = -(-tokens // self.block_size) - len(lease.blocks)
        if wanted > self._places.available:
            return False
        for _ in range(wanted):
            self._add_own(lease)
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
            known, length = self._end(lease).longest_start(rest)
            if known is None or length < len(rest):
                self._publish(lease, index, rest)
        for node in lease._path:
            node.used = self._clock
        for node in lease._path:
            self._places.unpin(node)
        self._close(lease)

    def discard(self, lease: Lease) -> None:
        """The sequence went wrong: its blocks, and what was built on them, are not to be found by anyone again.

        Blocks that another lease is using stay until that one ends.
        """
        for node in lease._path:
            self._places.unpin(node)
        for node in lease._path:
            self._places.forget(node)
        self._close(lease)

    # what is kept over a restart --------------------------------------------------------------------------------------

    def latest(self, most: int, ids: Sequence[int] | None = None, salt: bytes = b"") -> list[Node]:
        """Up to `most` cached blocks, those used last, parents before children; to be read before anything is moved.

        `ids`: only what belongs to this sequence, its beginning first.
        """
        root = self._tree.root(salt)
        if ids is not None:
            match = self._match(root, [*ids, NOWHERE])  # all of it: here nothing has to be left to evaluate
            found = [*match.path, *([match.part] if match.part is not None else [])]
        else:
            found = _parents_first(sorted(root.below()[1:], key=lambda node: -node.used))
        self._tree.leave(root)
        return found[:most]

    def plant(
        self, parent: Node | None, tokens: Sequence[int], salt: bytes = b"", age: int = 0
    ) -> tuple[Node, bool] | None:
        """A block that was computed at another time, as a child of `parent` (None: it begins a sequence).

        `age`: how long ago it was used, in turns of the pool; who is oldest has to go first.
        Its node, and whether it is new: then its place, in the pool or in the host tier, has to be filled before
        anything else is asked of the cache. None: there is no room for it without evicting.
        """
        root, key = self._tree.root(salt), tuple(tokens)
        above = parent or root
        known = above.children.get(key)
        if known is not None:
            return known, False
        node = Node(key, above)
        node.used = self._clock - age
        if self.free and (parent is None or parent.block != NOWHERE):
            node.block = self._places.allocate(after=None if parent is None else parent.block)
        else:
            slot = self._places.free_slot()
            if slot is None:
                self._tree.leave(root)
                return None
            node.slot = slot
        self._places.add(node)
        return node, True

    # helpers ----------------------------------------------------------------------------------------------------------

    def _match(self, root: Root, ids: Sequence[int]) -> _Match:
        path: list[Node] = []
        node: Node = root
        at, limit = 0, len(ids) - 1
        while at + self.block_size <= limit:
            child = node.children.get(tuple(ids[at : at + self.block_size]))
            if child is None:
                break
            path.append(child)
            node, at = child, at + self.block_size
        part, tokens = node.longest_start(ids[at : min(limit, at + self.block_size)])
        return _Match(path, part, tokens)

    def _has_room(self, match: _Match, tokens: int) -> bool:
        """Whether the blocks can be had that a match needs, and those after it for `tokens` tokens in all."""
        there = self._places.available - sum(node.block != NOWHERE and not node.pins for node in match.path)
        needed = sum(node.block == NOWHERE for node in match.path)
        later, blocks, part = there, len(match.path), match.part
        if part is not None:
            blocks += 1
            idle = part.block != NOWHERE and not part.pins
            there -= idle  # the source of a copy cannot be had before it is made
            if idle and match.whole:
                later = there
            else:
                needed += 1
        after = -(-tokens // self.block_size) - blocks
        return needed <= there and needed + max(0, after) <= later

    def _take(self, lease: Lease, match: _Match) -> None:
        """The blocks of a match into the lease."""
        places, part, whole = self._places, match.part, match.whole
        for node in (*match.path, *([part] if part is not None else [])):
            places.pin(node, self._clock)  # they must survive the search for free blocks
        for node in match.path:
            if node.block == NOWHERE:
                places.bring_back(node, after=lease.blocks[-1] if lease.blocks else None)
            lease.blocks.append(node.block)
            lease._path.append(node)
        if part is None:
            return
        if whole and part.block != NOWHERE:  # nothing to copy, and the blocks stay in one run
            block = part.block
            places.unpin(part)
            places.detach(part)
            lease.blocks.append(block)
            lease._owned.add(block)
            return
        block = self._add_own(lease)
        if part.block != NOWHERE:
            places.moves.append(BlockCopy(part.block, block, match.tokens))
        else:
            places.copy_in(part, block)
        places.unpin(part)
        if whole:
            places.remove(part)

    def _add_own(self, lease: Lease) -> int:
        """A further block of the lease's own."""
        block = self._places.allocate(after=lease.blocks[-1] if lease.blocks else None)
        lease.blocks.append(block)
        lease._owned.add(block)
        return block

    def _publish(self, lease: Lease, index: int, tokens: tuple[int, ...]) -> None:
        """Put the lease's block `index` into the tree, or follow an equal block that is there already."""
        parent, block = self._end(lease), lease.blocks[index]
        node = parent.children.get(tokens)
        if node is None:
            node = Node(tokens, parent, block)
            node.pins, node.used = 1, self._clock
            self._places.add(node)
            lease._owned.discard(block)
            self._drop_shorter(parent, node)
        else:
            self._places.pin(node, self._clock)
            if node.block == NOWHERE:  # in the host tier until now
                self._places.settle(node, block)
            else:  # the same tokens, so the same keys and values: one of the two blocks is enough
                lease.blocks[index] = node.block
                self._places.free.add(block)
            lease._owned.discard(block)
        lease._path.append(node)

    def _drop_shorter(self, parent: Node, node: Node) -> None:
        """A part-filled leaf that is a beginning of the new block says nothing the new block does not."""
        for length in range(1, len(node.tokens)) if len(parent.children) > 1 else ():
            other = parent.children.get(node.tokens[:length])
            if other is not None and not other.pins and not other.children:
                self._places.remove(other)

    def _end(self, lease: Lease) -> Node:
        assert lease._root is not None, "a lease was used after its end"
        return lease._path[-1] if lease._path else lease._root

    def _close(self, lease: Lease) -> None:
        for block in lease._owned:
            self._places.free.add(block)
        if lease._root is not None:
            lease._root.pins -= 1
            self._tree.leave(lease._root)
        lease.blocks, lease._path, lease._owned, lease._root = [], [], set(), None


def _pins(leases: Sequence[Lease]) -> Counter[Node]:
    """How often these leases pin each node."""
    return Counter(node for lease in leases for node in lease._path)


def _parents_first(nodes: Sequence[Node]) -> list[Node]:
    """The same nodes; each one's ancestors come right before it where they have not come yet."""
    found: dict[Node, None] = {}
    for node in nodes:
        way = []
        above: Node | None = node
        while above is not None and above not in found and not isinstance(above, Root):
            way.append(above)
            above = above.parent
        found |= dict.fromkeys(reversed(way))
    return list(found)
