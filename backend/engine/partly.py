"""A step of torch operations that is set aside between the halves of its layers, and goes on later.

The counterpart of a compiled step that is set aside in C, for weights that go through torch on the CPU: bf16 or f32
presets, Hugging Face folders as they are, LLM.int8, machines without a compiler. How long the next half of a layer
takes is what the same half of the layer before took. Many tokens at once are what torch is good at, so a piece has as
many as such a half may take without making anybody wait longer than they should.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from time import perf_counter

import torch

HALVES = 2  # of a layer: attention, feed-forward
SIZES = (32, 64, 128, 256, 512)  # tokens of a piece
FIRST = 128  # of one of which nobody knows how long it takes


class PartlyComputed:
    """`parts`: see `Llama.in_parts`, of so many `tokens`. `clock` is in seconds."""

    def __init__(
        self, parts: Iterator[torch.Tensor | None], tokens: int, clock: Callable[[], float] = perf_counter
    ) -> None:
        self.tokens = tokens
        self._parts, self._clock = parts, clock
        self._latest: deque[float] = deque(maxlen=HALVES)  # seconds of the latest parts

    @property
    def seconds_per_token(self) -> float | None:
        """Of the longer one of the latest two parts; None of few tokens, which would take longer one by one."""
        return max(self._latest) / self.tokens if self._latest and self.tokens >= SIZES[0] else None

    def go_on(self, seconds: float) -> torch.Tensor | None:
        """As many parts as fit into so many seconds, at least one. Returns the logits when all is done."""
        at = begin = self._clock()
        while (logits := next(self._parts)) is None:
            now = self._clock()
            self._latest.append(now - at)
            if now - begin + self._latest[0] > seconds:
                return None
            at = now
        return logits


def piece_tokens(seconds_per_token: float | None, seconds: float) -> int:
    """How many tokens to begin with, so that no part of a layer takes longer than so many seconds."""
    if not seconds_per_token:
        return FIRST
    return max((size for size in SIZES if size * seconds_per_token <= seconds), default=SIZES[0])
