"""Free blocks as runs that lie side by side: the longest is found, and one is taken or given back, in O(log n).

Plain Python. What a sequence wants is to stay in one run, because attention reads a run without copying.
"""

from __future__ import annotations

import heapq


class FreeRuns:
    """Which of the blocks 0 .. n - 1 are free; at first all."""

    def __init__(self, n: int) -> None:
        self._ends: dict[int, int] = {}  # first block of a run -> the block after its last
        self._starts: dict[int, int] = {}  # the block after a run's last -> its first
        self._longest: list[tuple[int, int]] = []  # heap of (-length, first); entries that are no longer true stay
        self._free = bytearray(n)
        self._count = 0
        if n:
            self._free[:] = b"\1" * n
            self._count = n
            self._add_run(0, n)

    def __len__(self) -> int:
        return self._count

    def __contains__(self, block: int) -> bool:
        return 0 <= block < len(self._free) and bool(self._free[block])

    def add(self, block: int) -> None:
        """Give a block back. It must not be free."""
        assert not self._free[block]
        self._free[block] = 1
        self._count += 1
        first, end = block, block + 1
        if block in self._starts:
            first = self._starts.pop(block)
            del self._ends[first]
        if end in self._ends:
            after = self._ends.pop(end)
            del self._starts[after]
            end = after
        self._add_run(first, end)

    def take(self, block: int) -> None:
        """Take this block, which must be free."""
        assert self._free[block]
        self._free[block] = 0
        self._count -= 1
        first = block
        if first not in self._ends:  # inside of a run: its first block is to the left, and mostly near
            first = self._run_of(block)
        end = self._ends.pop(first)
        del self._starts[end]
        if first < block:
            self._add_run(first, block)
        if block + 1 < end:
            self._add_run(block + 1, end)

    def start_of_new(self) -> int:
        """Where a sequence has most room to grow: half-way into the longest run, so that whoever ends at the run's
        beginning can grow as well. Something must be free."""
        first, length = self._top()
        return first if first == 0 else first + length // 2

    def _top(self) -> tuple[int, int]:
        while True:
            length, first = -self._longest[0][0], self._longest[0][1]
            if self._ends.get(first) == first + length:
                return first, length
            heapq.heappop(self._longest)

    def _run_of(self, block: int) -> int:
        """The first block of the run that a free block is in."""
        first, length = self._top()  # a new sequence begins inside the longest
        if first <= block < first + length:
            return first
        return next(start for start, end in self._ends.items() if start <= block < end)

    def _add_run(self, first: int, end: int) -> None:
        self._ends[first] = end
        self._starts[end] = first
        heapq.heappush(self._longest, (first - end, first))
        if len(self._longest) > 64 + 4 * len(self._ends):  # mostly entries that are no longer true
            self._longest = [(start - after, start) for start, after in self._ends.items()]
            heapq.heapify(self._longest)
