"""What a step of n tokens costs beside one of a single token, learned from the steps themselves. Plain Python.

A cost is relative: seconds divided by the machine's present pace, which follows the clock of a shared machine and the
growing context, so that only the shape of the curve is remembered.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from statistics import median_low

SAMPLES = 31  # of each size of step; their median counts
PRIOR = 0.2  # what every further token is thought to cost before anything was measured
PACE = 0.3  # how fast the pace follows
FIRST = 8  # steps by which the pace is found
SELDOM = 4  # of steps of one token, which are many, the median is taken after so many steps
LARGEST_CHANGE = 0.7  # of the pace by one step, in natural logs: a step during which the system did something else
DRAWS = 0.1  # how fast the cost of drawing follows
SIZES = 64  # tokens; larger steps are not looked at


class StepCost:
    """Relative costs of steps that read no prompt, by the tokens in them."""

    def __init__(self) -> None:
        self._samples: dict[int, deque[float]] = {}
        self._medians: dict[int, float] = {}
        self._pace: float | None = None  # seconds of a step of one token, now
        self._steps = 0
        self._measured = False  # whether enough steps of one token were seen
        self._curve = [0.0, 1.0]  # by size
        self.token = 0.0  # cost of drawing one token, in steps of one token
        self.guess = 0.2  # the same of a smaller model's step

    def observe(self, size: int, seconds: float) -> None:
        """A step of `size` tokens took so long."""
        if size > SIZES or seconds <= 0:
            return
        expected = self.of(size)
        if self._pace is None or self._steps < FIRST:
            self._pace = seconds / expected  # the first steps of all take longer, for reasons of their own
        self._steps += 1
        self._samples.setdefault(size, deque(maxlen=SAMPLES)).append(seconds / self._pace)
        if size != 1 or not self._measured or self._steps % SELDOM == 0:
            self._learn(size)
        if size == 1 and not self._measured:
            return  # the first of these must not be measured by the next ones
        change = math.log(seconds / (expected * self._pace))
        self._pace *= math.exp(PACE * max(-LARGEST_CHANGE, min(LARGEST_CHANGE, change)))

    def _learn(self, size: int) -> None:
        before, self._medians[size] = self._medians.get(size), self._median(size)
        if size == 1 and not self._measured and len(self._samples[1]) >= FIRST:
            self._measure_anew()
            before = None
        if before != self._medians[size]:
            self._curve = self._computed()

    def observe_draw(self, seconds: float) -> None:
        """Drawing a token from its logits, and handing it on, took so long."""
        if self._pace is not None:
            self.token += DRAWS * (min(seconds / self._pace, 1.0) - self.token)

    def observe_guess(self, seconds: float) -> None:
        """A step of the smaller model that guesses took so long."""
        if self._pace is not None:
            self.guess += DRAWS * (min(seconds / self._pace, 2.0) - self.guess)

    def of(self, size: int) -> float:
        """The cost of a step of `size` tokens; sizes that were never measured lie on lines between those that were."""
        known = self._curve
        if size < len(known):
            return known[size]
        slope = (known[-1] - known[1]) / (len(known) - 2) if len(known) > 2 else PRIOR
        return known[-1] + max(slope, 0.0) * (size - len(known) + 1)

    def _median(self, size: int) -> float:
        samples = self._samples[size]
        # Until there are three, one that was slow for a reason of its own must not keep us from trying again.
        guess = [1 + PRIOR * (size - 1)] if len(samples) < 3 else []
        return median_low([*samples, *guess])

    def _measure_anew(self) -> None:
        """Once: until steps of one token were seen, the pace was a guess, and so is what was measured by it."""
        assert self._pace is not None
        self._measured, one = True, self._medians[1]
        self._pace *= one
        for size, samples in self._samples.items():
            for place in range(len(samples)):
                samples[place] /= one
            self._medians[size] = self._median(size)

    def _computed(self) -> list[float]:
        # The pace follows the mean, and what disturbs a step makes it longer: the median of steps of one token lies
        # below 1, and that of all others as far below theirs.
        one = self._medians.get(1, 1.0)
        points = {1: 1.0} | {size: max(1.0, median / one) for size, median in self._medians.items()}
        sizes = sorted(points)
        for size, larger in zip(reversed(sizes[:-1]), reversed(sizes[1:]), strict=True):
            points[size] = min(points[size], points[larger])  # more tokens never cost less
        curve = [0.0, points[1]]
        for left, right in itertools.pairwise(sizes):
            slope = (points[right] - points[left]) / (right - left)
            curve += [points[left] + slope * (size - left) for size in range(left + 1, right + 1)]
        return curve
