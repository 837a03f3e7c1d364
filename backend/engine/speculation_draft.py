"""A smaller model that guesses what a larger one will say. It must have the same vocabulary.

Each sequence of the engine has a twin here, with blocks in a cache of its own. Whatever the twin says is a guess like
any other: the larger model evaluates it, and the request's sampler decides.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from backend.cache.blocks import BlockPool
from backend.engine.request import Request
from backend.engine.runner import Runner
from backend.engine.scheduler import Work
from backend.errors import NumericalError
from backend.events import FinishReason
from backend.params import GenerationParams

PIECE = 128  # tokens of prompts that the twins read between two steps of the larger model
LEAST_SURE = 0.4  # guessing goes on while the product of the probabilities is above this


class _Nobody:
    """A twin has no reader."""

    def on_token(
        self, token_id: int, logprob: float | None, *, visible: bool = True, top: tuple[tuple[int, float], ...] = ()
    ) -> bool:
        return False

    def on_finish(self, reason: FinishReason, error: Exception | None = None) -> None: ...


@dataclass
class _Twin:
    """`request`: its ids are those of the original, then guesses, which begin at `known`."""

    request: Request
    known: int
    wanted: int = 0
    sure: float = 1.0


class DraftModel:
    """Belongs to the engine thread, as its runner and its blocks do."""

    def __init__(self, runner: Runner, blocks: BlockPool, context: int) -> None:
        self._runner, self._blocks, self._context = runner, blocks, context
        self._twins: dict[Request, _Twin] = {}
        self.rounds, self.seconds = 0, 0.0  # of the latest guess, without reading

    def guess(self, wanted: Sequence[tuple[Request, int]]) -> list[tuple[list[int], list[float]]]:
        """For each request at most so many tokens that may come next, and how probable each is by this model.

        None for a sequence that this model has not read yet, or for which it has no room; it reads on by one piece.
        Raises whatever goes wrong: then everybody that was asked about has to be dropped (`drop`).
        """
        self.rounds, self.seconds = 0, 0.0
        twins = [self._follow(request, count) for request, count in wanted]
        self._runner.copy_blocks(self._blocks.take_moves())
        budget, going = PIECE, []
        works = []
        for twin in twins:
            if twin is None:
                continue
            left = len(twin.request.ids) - twin.request.computed
            tokens = min(left, budget)
            if tokens:
                works.append((twin, Work(twin.request, tokens)))
                budget -= tokens
            if tokens == left:
                going.append(twin)
        guesses: dict[int, list[float]] = {id(twin): [] for twin in going}
        while works:
            begin, reads = time.perf_counter(), any(work.tokens > 2 for _, work in works)
            probabilities, tokens_of = self._run([work for _, work in works])
            drawn = [twin for twin, work in works if work.tokens + twin.request.computed == len(twin.request.ids)]
            for twin, work in works:
                twin.request.computed += work.tokens
            for twin, probability, token in zip(drawn, probabilities, tokens_of, strict=True):
                twin.request.ids.append(token)
                guesses[id(twin)].append(probability)
                twin.wanted, twin.sure = twin.wanted - 1, twin.sure * probability
            if not reads:
                self.rounds, self.seconds = self.rounds + 1, self.seconds + time.perf_counter() - begin
            works = [(twin, Work(twin.request, 1)) for twin in drawn if twin.wanted and twin.sure > LEAST_SURE]
        return [
            ([], []) if twin is None or id(twin) not in guesses else (twin.request.ids[twin.known :], guesses[id(twin)])
            for twin in twins
        ]

    def rewound(self, request: Request) -> None:
        """The last tokens of the original were taken back."""
        twin = self._twins.get(request)
        if twin is not None:
            twin.known = min(twin.known, len(request.ids))

    def forget(self, request: Request) -> None:
        """The original is over; what its twin has read can be found by the next one."""
        twin = self._twins.pop(request, None)
        if twin is not None and twin.request.lease is not None:
            ids = twin.request.ids[: min(twin.known, twin.request.computed)]
            self._blocks.release(twin.request.lease, ids if request.use_cache else ())

    def drop(self, request: Request) -> None:
        """Something went wrong with its twin: what that has read is not to be found again."""
        twin = self._twins.pop(request, None)
        if twin is not None and twin.request.lease is not None:
            self._blocks.discard(twin.request.lease)

    def _follow(self, request: Request, count: int) -> _Twin | None:
        """The twin, with the original's ids and room for `count` guesses."""
        length = len(request.ids)
        if not count or length + count > self._context:
            return None
        twin = self._twins.get(request)
        if twin is None:
            lease = self._blocks.acquire(request.ids, request.salt, length + count)
            if lease is None:
                return None
            own = Request(request.prompt, GenerationParams(), frozenset(), _Nobody(), self._context, salt=request.salt)
            own.lease, own.computed = lease, lease.cached
            twin = self._twins[request] = _Twin(own, length)
        own = twin.request
        same = twin.known
        while same < min(length, len(own.ids)) and own.ids[same] == request.ids[same]:
            same += 1
        own.ids = list(request.ids)
        own.computed = min(own.computed, same, length - 1)
        twin.known, twin.wanted, twin.sure = length, count, 1.0
        assert own.lease is not None
        return twin if self._blocks.extend(own.lease, length + count) else None

    def _run(self, works: list[Work]) -> tuple[list[float], list[int]]:
        """Of those that are read to their end: the likeliest next tokens, and their probabilities."""
        logits = self._runner.run(works)
        if not len(logits):
            return [], []
        best = torch.softmax(logits, -1).max(-1)
        if not bool(torch.isfinite(best.values).all()):
            raise NumericalError("the output of the model that guesses contains NaN or Inf")
        return best.values.tolist(), best.indices.tolist()
