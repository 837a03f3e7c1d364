"""The index of a block cache: a tree of token blocks under one root for each salt. Plain Python, no torch.

A node's block is either in the pool or in the host tier. Nodes in the pool form the top of every tree: whoever has a
block there has a parent with one, because a sequence can only go on from keys and values that are in the pool.
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Callable, Sequence

NOWHERE = -1


class Node:
    """A cached block: the tokens in it, all of whose predecessors are the path from the root."""

    __slots__ = ("block", "children", "near", "parent", "pins", "slot", "sorted", "tokens", "used")

    def __init__(self, tokens: tuple[int, ...], parent: Node | None, block: int = NOWHERE, slot: int = NOWHERE) -> None:
        self.tokens, self.parent = tokens, parent
        self.block, self.slot = block, slot  # where it is: one of them is NOWHERE
        self.children: dict[tuple[int, ...], Node] = {}
        self.sorted: list[tuple[int, ...]] = []  # the keys of `children`
        self.near = 0  # children that are in the pool
        self.pins = 0  # leases whose path goes through here
        self.used = 0  # when, on the pool's clock

    def longest_start(self, ids: Sequence[int]) -> tuple[Node | None, int]:
        """The child that shares the most first tokens with `ids`, and how many.

        In sorted order it is a neighbour of `ids`. Of two, the one that ends there, since it can change hands whole.
        """
        if not self.children or not ids:
            return None, 0
        wanted = tuple(ids)
        at = bisect.bisect_left(self.sorted, wanted)
        around = self.sorted[max(0, at - 1) : at + 1]
        best = max(around, key=lambda tokens: shared(tokens, wanted))
        length = shared(best, wanted)
        if not length:
            return None, 0
        return self.children.get(wanted[:length]) or self.children[best], length

    def below(self) -> list[Node]:
        """This node and everything below it, parents before children."""
        found = [self]
        for node in found:  # grows while it is walked
            found += node.children.values()
        return found


class Root(Node):
    """Where the sequences of one salt begin. Its pins are the leases that began here."""

    __slots__ = ("salt",)

    def __init__(self, salt: bytes) -> None:
        super().__init__((), None)
        self.salt = salt


def shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many first tokens are equal."""
    length = 0
    for ours, theirs in zip(one, other, strict=False):
        if ours != theirs:
            break
        length += 1
    return length


class Tree:
    """The roots. Sequences of different salts never meet."""

    def __init__(self) -> None:
        self._roots: dict[bytes, Root] = {}

    def root(self, salt: bytes) -> Root:
        """Where sequences of this salt begin; made where it is not there yet."""
        return self._roots.setdefault(salt, Root(salt))

    def leave(self, root: Node | None) -> None:
        """Something of this root is gone: when nothing hangs on it any more and nobody uses it, it goes too."""
        if isinstance(root, Root) and not root.pins and not root.children and self._roots.get(root.salt) is root:
            del self._roots[root.salt]

    def __len__(self) -> int:
        return len(self._roots)


def add_child(parent: Node, node: Node) -> None:
    parent.children[node.tokens] = node
    bisect.insort(parent.sorted, node.tokens)
    parent.near += node.block != NOWHERE


def remove_child(node: Node) -> None:
    parent = node.parent
    assert parent is not None
    del parent.children[node.tokens]
    del parent.sorted[bisect.bisect_left(parent.sorted, node.tokens)]
    parent.near -= node.block != NOWHERE


class LeastUsed:
    """Nodes in the order of their last use. What has changed since it was added is passed over when its turn comes."""

    def __init__(self, fits: Callable[[Node], bool]) -> None:
        """fits: whether a node still belongs here."""
        self._fits = fits
        self._heap: list[tuple[int, int, Node]] = []
        self._number = 0

    def add(self, node: Node) -> None:
        """Whenever a node may have begun to belong here; again when its use changed."""
        if not self._fits(node):
            return
        self._number += 1
        heapq.heappush(self._heap, (node.used, self._number, node))

    def pop(self) -> Node | None:
        """The node that was used longest ago, or None. One that stays has to be added again."""
        while self._heap:
            used, _, node = heapq.heappop(self._heap)
            if used == node.used and self._fits(node):
                return node
        return None

    def tidy(self, most: int) -> None:
        """Forget entries that are no longer true, when there are more than twice as many as nodes there can be."""
        if len(self._heap) <= 64 + 2 * most:
            return
        kept = {}
        for used, number, node in self._heap:
            if used == node.used and self._fits(node):
                kept[id(node)] = (used, number, node)
        self._heap = list(kept.values())
        heapq.heapify(self._heap)
