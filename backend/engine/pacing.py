"""How much of prompts a step may read. Plain Python, no clock of its own.

A running reply gets one token a step, so a step that also reads a prompt is a longer gap in that reply. How long a step
takes is measured all the time; from that comes the number of prompt tokens with which it stays below `MOST` times a
step that only writes. Where more wait to be read than write, as when several ask at once, it may be as much longer as
they are more, within what nobody notices (`BRIEF`); where several short prompts come together it is `BRIEF` until they
are read, since whoever begins late is alone in the end. While nobody writes, a longer piece is faster, but a Stop has
to wait for its end: it takes about `LONGEST` seconds. How a prompt is cut changes its numbers by rounding at most.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from math import inf
from statistics import median

MOST = 2.0  # a step that writes and reads, in steps that only write without guesses
LEAST = 0.5  # of a step that only writes, in any case: a prompt must come to its end, beside slow steps too
BRIEF = 0.1  # seconds: a gap in a reply that is as good as none, once
SHORT = 2.5  # such gaps at most, in which several prompts together are read: else they are no short ones
LONGEST = 0.5  # seconds of a step that only reads
WORSE = 2.0  # a token beside replies, in tokens of a step that only reads: what a first piece is guessed to take
SIZES = (4, 5, 7, 10, 15, 22, 31, 46, 64, 96, 128, 192, 256, 384, 512)  # pieces: each at most half as long again
ALIKE = 1.25  # a piece that takes so much longer than the shortest costs nearly nothing more
SAMPLES = 7  # so many of the latest steps count; their median, since a machine has other things to do as well
FORGOTTEN = 64  # steps after which what a piece took is asked anew: it takes longer the longer the text before it


class Pacing:
    """Remembers the latest steps. `prefill_tokens`: of prompts in one step at most. `least`: while nobody writes, at
    least, however long that takes; all of them if None."""

    def __init__(self, prefill_tokens: int, least: int | None = None) -> None:
        self._most = prefill_tokens
        self._least = min(prefill_tokens, least or prefill_tokens)
        self._writing: dict[int, deque[float]] = {}  # seconds of steps that only wrote, by sequences
        self._reading: deque[float] = deque(maxlen=SAMPLES)  # seconds for each prompt token of steps that only read
        # Seconds that a piece adds to a step, by its place in SIZES, with the number of the latest such step.
        self._pieces: dict[int, tuple[deque[float], int]] = {}
        self._steps = 0

    def record(self, writing: int, reading: int, seconds: float) -> None:
        """A step has taken so long: `writing` sequences had one token each, `reading` tokens were of prompts."""
        if not reading:
            if writing:
                self._writing.setdefault(writing, deque(maxlen=SAMPLES)).append(seconds)
            return
        self._steps += 1
        if not writing:
            self._reading.append(seconds / reading)
        place = bisect_right(SIZES, reading) - 1
        alone = self._alone(writing) or 0.0
        if writing and place >= 0:
            times, _ = self._known(place) or (deque(maxlen=SAMPLES), 0)
            times.append(max(seconds - alone, 0.0))
            self._pieces[place] = times, self._steps

    def budget(self, writing: int, reading: int = 1, tokens: float = inf) -> int:
        """Prompt tokens for a step in which `writing` sequences write, while `reading` have still to be read, of so
        many `tokens` together.

        0 when it is not known how long such a step takes without a prompt: then this one finds out.
        """
        if not writing:
            each = median(self._reading) if self._reading else 0.0
            return min(self._most, max(1, int(LONGEST / each / self._least)) * self._least) if each else self._least
        alone = self._alone(writing)
        if alone is None:
            return 0
        fitting = self.seconds(writing, reading, tokens=tokens)
        known = {place: median(found[0]) for place in range(len(SIZES)) if (found := self._known(place))}
        guess = self._guess(fitting)
        if not known:
            return min(self._most, SIZES[guess])
        # The longest piece that fits; or, where none does, that takes hardly more than the shortest: a prompt must come
        # to its end. A piece next to it that nothing is known of is tried: a shorter one where this is too long.
        limit = max(fitting, ALIKE * min(known.values()))
        best = max(place for place, added in known.items() if added <= limit)
        if known[best] > fitting and best and best - 1 not in known:
            best -= 1
        elif best + 1 < len(SIZES) and best + 1 not in known:
            best = max(best + 1, guess) if guess > max(known) else best + 1
        return min(self._most, SIZES[best])

    def seconds(self, writing: int, reading: int = 1, spent: float | None = None, tokens: float = inf) -> float:
        """How long a step may read in which so many sequences write: that of `budget`, in seconds. `spent`: what the
        step has taken so far; without it, what one takes that only writes. `tokens`: of prompts, still to be read."""
        if not writing:
            return LONGEST
        alone = self._alone(writing) or spent or 0.0
        fitting = (MOST - 1) * alone
        longer = BRIEF if self._short(reading, tokens) else min(fitting * reading / writing, BRIEF)
        spent = alone if spent is None else spent
        return max(max(fitting, longer) + alone - spent, LEAST * alone)

    def _short(self, reading: int, tokens: float) -> bool:
        """Whether several prompts come to their end in a few brief gaps, by what steps took that only read."""
        return reading > 1 and bool(self._reading) and tokens * median(self._reading) <= SHORT * BRIEF

    def _guess(self, seconds: float) -> int:
        """Place in SIZES of a piece that should not take longer, by what steps took that only read."""
        each = WORSE * median(self._reading) if self._reading else 0.0
        return max(bisect_right(SIZES, seconds / each) - 1, 0) if each else 0

    def _known(self, place: int) -> tuple[deque[float], int] | None:
        found = self._pieces.get(place)
        return found if found is not None and self._steps - found[1] < FORGOTTEN else None

    def _alone(self, writing: int) -> float | None:
        """Seconds of a step that only writes, for as many sequences or the next fewer that are known: rather too few
        seconds, and so too short a piece, than too many."""
        known = [count for count in self._writing if count <= writing]
        return median(self._writing[max(known)]) if known else None
