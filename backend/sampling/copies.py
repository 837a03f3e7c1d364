"""Where in the history the end of it was said before, for DRY: kept from token to token instead of searched anew.

A copy of the history's end that is as long as it was, and one more, where the next tokens agree; or it is a new one of
length 1. So a token costs one look through the ids for itself. `penalties.dry` is the slow twin: it compares backwards
from every place, at every token.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from backend.sampling.history import History
from backend.sampling.penalties import LONGEST_MATCH, costs


class Copies:
    """The earlier copies of how a history ends. Asked at any time; it catches up with what was appended or rewound."""

    def __init__(self, history: History) -> None:
        self._history = history
        self._ends: NDArray[np.int64] = np.zeros(0, dtype=np.int64)  # where copies end, rising
        self._lengths: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self._count = 0  # tokens of the history that were looked at
        self._rewinds = 0

    def dry(
        self, window: int, multiplier: float, base: float, allowed: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """As `penalties.dry` on the latest `window` tokens (0: all)."""
        history = self._history
        self._catch_up()
        count = len(history)
        start = max(0, count - window) if window else 0
        if count - start < 2 or history.breaks[-1]:
            return costs(history.ids[:0], history.ids[:0], multiplier, base, allowed)
        kept = (self._ends >= start) & ~history.breaks[self._ends + 1]
        ends = self._ends[kept]
        return costs(
            history.ids[ends + 1], np.minimum(self._lengths[kept], ends - start + 1), multiplier, base, allowed
        )

    def _catch_up(self) -> None:
        history = self._history
        if history.rewinds != self._rewinds or len(history) - self._count > LONGEST_MATCH:
            # No copy is counted longer than LONGEST_MATCH, so what lies before that many tokens changes nothing.
            self._count, self._rewinds = max(0, len(history) - LONGEST_MATCH), history.rewinds
            self._ends, self._lengths = history.ids[:0], history.ids[:0]
        while self._count < len(history):
            self._next(self._count)
            self._count += 1

    def _next(self, place: int) -> None:
        """The token at this place is the history's last one now."""
        ids = self._history.ids
        ends = np.flatnonzero(ids[:place] == ids[place])
        lengths = np.ones(len(ends), dtype=np.int64)
        if len(self._ends) and not self._history.breaks[place - 1]:
            before = np.searchsorted(self._ends, ends - 1)
            before[before == len(self._ends)] = 0
            goes_on = self._ends[before] == ends - 1
            lengths[goes_on] += self._lengths[before[goes_on]]
        self._ends, self._lengths = ends, np.minimum(lengths, LONGEST_MATCH)
