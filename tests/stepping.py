"""A scheduler with a pool, stepped by hand: the next token is a function of the ids, so text tells what was read."""

from __future__ import annotations

from backend.cache.blocks import BlockPool
from backend.engine.pacing import Pacing
from backend.engine.request import Request
from backend.engine.scheduler import PREFILL_TOKENS, Scheduler, Work
from backend.params import GenerationParams

BLOCK = 8


class Nobody:
    def on_token(self, token_id: int, logprob: float | None, *, visible: bool = True) -> bool:
        return False

    def on_finish(self, reason: str, error: Exception | None = None) -> None: ...


def request(prompt: list[int] | int, tokens: int = 20, **options: object) -> Request:
    """`prompt` may be a length: then its tokens are like no other prompt's."""
    request = Request((0,), GenerationParams(max_tokens=tokens), frozenset(), Nobody(), 4096, **options)  # type: ignore[arg-type]
    number = int(request.id[1:])
    request.prompt = (
        tuple(range(number * 10_000, number * 10_000 + prompt)) if isinstance(prompt, int) else tuple(prompt)
    )
    request.ids = list(request.prompt)
    return request


class Steps:
    """Drives a scheduler as the engine does; the next token of a sequence depends on its ids alone."""

    def __init__(self, n_blocks: int, pacing: Pacing | None = None) -> None:
        self.pool = BlockPool(n_blocks, BLOCK)
        self.scheduler = Scheduler(self.pool, pacing=pacing)
        self.done: list[Request] = []
        self.preemptions = 0

    def step(self) -> list[Work]:
        before = set(self.scheduler.running)
        work = self.scheduler.schedule()
        self.preemptions += len(before - set(self.scheduler.running))
        self.pool.take_moves()
        self._check(work)
        for item in work:
            gives = item.gives_logits
            self.scheduler.advance(item)
            if gives:
                item.request.ids.append(next_token(item.request.ids))
                if len(item.request.ids) >= item.request.max_length:
                    self.scheduler.remove(item.request)
                    self.done.append(item.request)
        return work

    def run(self, limit: int = 2000) -> None:
        while self.scheduler.running or self.scheduler.waiting:
            limit -= 1
            assert limit, "it does not come to an end"
            self.step()

    def _check(self, work: list[Work]) -> None:
        reading = [item.tokens for item in work if len(item.request.ids) - item.request.computed > 1]
        assert sum(reading) <= PREFILL_TOKENS
        assert len({item.request for item in work}) == len(work)
        for item in work:
            assert item.tokens >= 1
            assert item.request.lease is not None
            assert len(item.request.lease.blocks) * BLOCK >= item.request.computed + item.tokens
        held = [block for r in self.scheduler.running if r.lease for block in r.lease._owned]
        assert len(held) == len(set(held)), "two sequences write to one block"


def next_token(ids: list[int]) -> int:
    return hash(tuple(ids)) % 1000


def alone(prompt: tuple[int, ...], tokens: int) -> list[int]:
    ids = list(prompt)
    for _ in range(tokens):
        ids.append(next_token(ids))
    return ids
