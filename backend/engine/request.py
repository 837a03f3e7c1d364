"""One sequence being continued: token ids in, token ids out. No text, no tensors."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from backend.cache.blocks import Lease
from backend.events import FinishReason, Phase, PromptScore, Stats
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
    score_prompt: bool = False  # every token of the prompt gives logits, for `prompt_scores`
    only_prompt: bool = False  # it ends when the prompt is read
    token_bytes: Callable[[int], bytes] | None = None  # for DRY breakers and banned texts
    matcher: Any = None  # a grammar's state: `sampling.sampler.Matcher`
    use_cache: bool = True  # False evaluates the whole prompt: the slow twin
    salt: bytes = b""  # whoever has another one never meets this sequence's cached blocks
    person: str = ""  # whose it is: people share the engine evenly, however many requests each of them has
    clock: Callable[[], float] = time.monotonic
    id: str = field(default_factory=lambda: f"r{next(_numbers)}")
    cancelled: bool = False

    def __post_init__(self) -> None:
        self.ids: list[int] = list(self.prompt)
        self.computed = 0  # tokens whose keys and values are in the cache
        self.cached = 0  # of these, prompt tokens found there at the first admission
        self.evaluated = 0  # prompt tokens read by the model
        self.end_known = False  # the logits after its prompt are at hand, so none of it has to be evaluated
        self.prompt_scores: list[PromptScore] = []  # of the prompt's tokens from the second on
        self.shifted = 0  # tokens of the middle that were left out because the context was full
        self.partner: Request | None = None  # reads the negative prompt and the same reply, for guidance
        self.leader: Request | None = None  # of a partner: whose reply it is
        self.drafted = self.accepted = 0  # guesses of its next tokens that were evaluated, and the right ones of them
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
        return len(self.ids) + self.shifted - len(self.prompt)

    @property
    def max_length(self) -> int:
        """Tokens of prompt and reply together after which the request ends, or forgets its middle."""
        limit = self.params.max_tokens
        return min(self.context, len(self.prompt) + limit - self.shifted) if limit else self.context

    @property
    def shifts(self) -> bool:
        """Whether its context is full and it is to go on all the same. A reply without a set length ends then."""
        params = self.params
        return params.context_shift and len(self.ids) >= self.context and self.completion_tokens < params.max_tokens

    def together(self) -> list[Request]:
        """The request and its partner: they run, wait and end together."""
        leader = self.leader or self
        return [leader] if leader.partner is None else [leader, leader.partner]

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
            shifted_tokens=self.shifted,
            drafted_tokens=self.drafted,
            accepted_tokens=self.accepted,
        )


def middle(request: Request, held: int) -> tuple[int, int]:
    """What a request forgets whose context is full, as (first place, tokens): half of what is not kept, as llama.cpp.

    At most three quarters of the context are kept, so that something can be forgotten. `held`: latest tokens that
    may still be taken back, and so must stay.
    """
    asked = request.params.keep_tokens
    keep = min(len(request.prompt) if asked < 0 else asked, request.context * 3 // 4)
    rest = len(request.ids) - keep
    return keep, max(1, min(rest // 2, rest - held))
