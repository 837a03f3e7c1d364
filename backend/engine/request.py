"""One sequence being continued: token ids in, token ids out. No text, no tensors."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from backend.cache.blocks import Lease
from backend.events import FinishReason, Phase, Stats
from backend.params import GenerationParams

_numbers = itertools.count(1)


class Listener(Protocol):
    """Whoever wants the tokens. Called on the engine thread: return at once, never block."""

    def on_token(
        self, token_id: int, logprob: float | None, *, visible: bool = True, top: tuple[tuple[int, float], ...] = ()
    ) -> bool:
        """Take a token; True ends the request (a stop string was met). `visible` False marks an end token.

        `top`: the likeliest tokens at its place with their natural logs, where they were asked for.
        """
        ...

    def on_finish(self, reason: FinishReason, error: Exception | None = None) -> None: ...


@dataclass(eq=False)
class Request:
    """State of one sequence. Written by the engine thread only, except `cancelled`."""

    prompt: tuple[int, ...]
    params: GenerationParams
    end_ids: frozenset[int]  # tokens that end a reply
    listener: Listener
    context: int
    want_logprobs: bool = False
    top_logprobs: int = 0  # of each token, how many likelier ones are wanted beside its own; with want_logprobs
    token_bytes: Callable[[int], bytes] | None = None  # for DRY breakers and banned texts
    matcher: Any = None  # a grammar's state: `sampling.sampler.Matcher`
    use_cache: bool = True  # False evaluates the whole prompt: the slow twin
    clock: Callable[[], float] = time.monotonic
    id: str = field(default_factory=lambda: f"r{next(_numbers)}")
    cancelled: bool = False

    def __post_init__(self) -> None:
        self.ids: list[int] = list(self.prompt)
        self.computed = 0  # tokens whose keys and values are in the cache
        self.cached = 0  # of these, prompt tokens found there at the first admission
        self.evaluated = 0  # prompt tokens read by the model
        self.lease: Lease | None = None
        self.phase: Phase = "queued"
        self.ahead = 0
        self.submitted_at = self.clock()
        self.first_at: float | None = None
        self.last_at: float | None = None
        self.not_before = 0.0  # on the clock: the next token is not due earlier
        # Philox is counter-based: a seed gives the same stream on every machine, whatever else runs beside it.
        self._uniforms = np.random.Generator(np.random.Philox(self.params.seed))

    @property
    def completion_tokens(self) -> int:
        return len(self.ids) - len(self.prompt)

    @property
    def max_length(self) -> int:
        """Tokens of prompt and reply together after which the request ends."""
        limit = self.params.max_tokens
        return min(self.context, len(self.prompt) + limit) if limit else self.context

    def cancel(self) -> None:
        """Stop at the next step. Safe from any thread, never waits."""
        self.cancelled = True

    def pace(self, now: float) -> None:
        """Set when the next token is due, so that the reply keeps to `max_tokens_per_second`."""
        rate = self.params.max_tokens_per_second
        if rate:
            self.not_before = max(self.not_before, now) + 1 / rate

    def uniform(self) -> float:
        """The next number in [0, 1) of this request's own random stream."""
        return float(self._uniforms.random())

    def stats(self) -> Stats:
        first = self.first_at
        return Stats(
            phase=self.phase,
            people_ahead=self.ahead,
            prompt_tokens=len(self.prompt),
            cached_tokens=self.cached,
            evaluated_tokens=self.evaluated,
            completion_tokens=self.completion_tokens,
            seconds_to_first_token=None if first is None else first - self.submitted_at,
            decode_seconds=0.0 if first is None or self.last_at is None else self.last_at - first,
            context=self.context,
        )
