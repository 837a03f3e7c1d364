"""Guesses of what comes next, from what has been said: in this conversation, and by this engine. Plain Python.

Two sources. `Repeats` looks for the longest end of the conversation that stood earlier in it, and guesses that what
followed then follows now (prompt lookup, suffix decoding: arXiv:2411.04975). `Successors` remembers, for all replies of
an engine, which token came after the latest few (n-gram speculation, arXiv:2408.08696 for the idea of recycling what
was computed anyway). A guess is never more than that: the engine evaluates it, and the request's own sampler decides.
"""

from __future__ import annotations

from collections.abc import Sequence

MOST_PLACES = 16  # earlier places that are compared, latest first
LONGEST = 32  # tokens of a match that are counted: longer ones are no better
ORDERS = (3, 2)  # how many tokens a remembered successor follows, the most telling first
MOST_SUCCESSORS = 1 << 16  # entries that an engine keeps, about 10 MB


class Repeats:
    """The earlier places of one sequence, by their last two tokens."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self._places: dict[tuple[int, int], list[int]] = {}  # two tokens -> where what followed them begins, rising
        self._latest: dict[int, int] = {}  # one token -> the same, the latest only
        self.at = 0  # where the guess begins in `ids`; means nothing where `length` is 0
        self.length = 0  # tokens before `at` that are the sequence's end

    def append(self, token: int) -> None:
        """The sequence goes on with this token; finds the longest match of its new end. O(1) but for the comparisons,
        of which there are at most MOST_PLACES."""
        ids = self.ids
        follows = self.length > 0 and ids[self.at] == token
        ids.append(token)
        end = len(ids)
        if follows:
            self.at, self.length = self.at + 1, min(self.length + 1, LONGEST)
        else:
            self.length = 0
        if end > 1:
            places = self._places.setdefault((ids[-2], token), [])
            if self.length < LONGEST:
                self._search(places)
            places.append(end)
        if not self.length and token in self._latest:
            self.at, self.length = self._latest[token], 1
        self._latest[token] = end

    def rewind(self, tokens: int) -> None:
        """The last tokens were taken back. Costs no more than appending them did."""
        ids = self.ids
        for _ in range(tokens):
            end, token = len(ids), ids[-1]
            if end > 1:
                self._places[ids[-2], token].pop()
            if self._latest.get(token) == end:
                del self._latest[token]
            ids.pop()
        self.length = 0

    def guess(self, count: int) -> list[int]:
        """What followed last time; where that reaches the sequence's end it goes on with the guess itself."""
        if not self.length:
            return []
        guessed = self.ids[self.at : self.at + count]
        period = len(self.ids) - self.at
        while len(guessed) < count:
            guessed.append(guessed[len(guessed) - period])
        return guessed

    def _search(self, places: list[int]) -> None:
        ids = self.ids
        end = len(ids)
        for place in reversed(places[-MOST_PLACES:]):
            length = 2
            while length < LONGEST and length < place and ids[place - 1 - length] == ids[end - 1 - length]:
                length += 1
            if length > self.length:
                self.at, self.length = place, length
                if length == LONGEST:
                    return


class Successors:
    """What came after a few tokens in the replies of an engine, separately for each salt. Bounded: oldest go first."""

    def __init__(self, most: int = MOST_SUCCESSORS) -> None:
        self._most = most
        self._next: dict[int, int] = {}  # a hash of salt and tokens -> the token that followed last

    def __len__(self) -> int:
        return len(self._next)

    def add(self, salt: bytes, before: Sequence[int], token: int) -> None:
        """`token` came after `before`, of which the last few count."""
        for order in ORDERS:
            if len(before) >= order:
                key = _key(salt, before, order)
                self._next.pop(key, None)  # a dictionary keeps the order of arrival, so this one is young again
                self._next[key] = token
        while len(self._next) > self._most:
            del self._next[next(iter(self._next))]

    def after(self, salt: bytes, before: Sequence[int]) -> tuple[int, int]:
        """The token that followed last and after how many tokens that is known; order 0 when nothing is known."""
        for order in ORDERS:
            if len(before) >= order:
                token = self._next.get(_key(salt, before, order))
                if token is not None:
                    return token, order
        return 0, 0


def _key(salt: bytes, before: Sequence[int], order: int) -> int:
    # 64 bits of a hash that is seeded anew in every process: two texts that meet there cost one wrong guess.
    return hash((salt, *before[len(before) - order :]))
