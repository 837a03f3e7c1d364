"""How much of prompts a step may read. Plain Python, no clock of its own.

A running reply gets one token a step, so a step that also reads a prompt is a longer gap in that reply. How long a step
takes is measured all the time; from that comes the number of prompt tokens with which it stays below `MOST` times a
step that only writes. While nobody writes, a longer piece is faster, but a Stop has to wait for its end: it takes about
`LONGEST` seconds. How a prompt is cut changes its numbers by rounding at most.
"""

from __future__ import annotations

from collections import deque
from statistics import median

MOST = 3.0  # a step that writes and reads, in steps that only write
LONGEST = 0.5  # seconds of a step that only reads
FEWEST = 4  # prompt tokens a step, however slow: a prompt must come to its end
SAMPLES = 7  # so many of the latest steps count; their median, since a machine has other things to do as well


class Pacing:
    """Remembers the latest steps. `prefill_tokens`: of prompts in one step at most. `least`: while nobody writes, at
    least, however long that takes; all of them if None."""

    def __init__(self, prefill_tokens: int, least: int | None = None) -> None:
        self._most = prefill_tokens
        self._least = min(prefill_tokens, least or prefill_tokens)
        self._writing: dict[int, deque[float]] = {}  # seconds of steps that only wrote, by sequences
        self._reading: deque[float] = deque(maxlen=SAMPLES)  # seconds for each prompt token, beside writing or alone

    def record(self, writing: int, reading: int, seconds: float) -> None:
        """A step has taken so long: `writing` sequences had one token each, `reading` tokens were of prompts."""
        if not reading:
            if writing:
                self._writing.setdefault(writing, deque(maxlen=SAMPLES)).append(seconds)
            return
        alone = self._alone(writing) or 0.0
        self._reading.append(max(seconds - alone, 0.0) / reading)

    def budget(self, writing: int) -> int:
        """Prompt tokens for a step in which `writing` sequences write.

        0 when it is not known how long such a step takes without a prompt: then this one finds out.
        """
        if not writing:
            each = median(self._reading) if self._reading else 0.0
            return min(self._most, max(1, int(LONGEST / each / self._least)) * self._least) if each else self._least
        alone = self._alone(writing)
        if alone is None:
            return 0
        if not self._reading:
            return min(FEWEST, self._most)
        each = median(self._reading)
        fitting = (MOST - 1) * alone / each if each > 0 else self._most
        return int(min(self._most, max(FEWEST, fitting // FEWEST * FEWEST)))

    def _alone(self, writing: int) -> float | None:
        """Seconds of a step that only writes, for as many sequences or the next fewer that are known: rather too few
        seconds, and so too short a piece, than too many."""
        known = [count for count in self._writing if count <= writing]
        return median(self._writing[max(known)]) if known else None
