"""Who runs in the next step, and with how many tokens. Plain Python: no tensors.

Every running sequence that has its prompt behind it gets one token; sequences still reading share what is left of the
step's token budget, oldest first. So nobody's reply waits for somebody's long prompt longer than one chunk. When blocks
run out, the youngest sequence gives its own back and reads again later: its ids, and with its random stream its text,
stay the same.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from backend.cache.blocks import BlockCopy, BlockPool, Lease
from backend.engine.request import Request

PREFILL_TOKENS = 128  # of prompts in one step, all sequences together; so long is what Stop may have to wait for
MAX_RUNNING = 16


@dataclass(frozen=True)
class Work:
    """`tokens` tokens of a request to evaluate in this step, beginning at `request.computed`."""

    request: Request
    tokens: int

    @property
    def gives_logits(self) -> bool:
        return self.request.computed + self.tokens == len(self.request.ids)


class Scheduler:
    def __init__(self, pool: BlockPool, prefill_tokens: int = PREFILL_TOKENS) -> None:
        """`prefill_tokens`: of prompts in one step; more where a step brings weights from elsewhere, however short."""
        self._pool, self._prefill_tokens = pool, prefill_tokens
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # oldest first
        self.copies: list[BlockCopy] = []  # to be carried out before the next step's work

    def add(self, request: Request) -> None:
        self.waiting.append(request)
        self._number_waiting()

    def schedule(self) -> list[Work]:
        """Admit who fits and divide the step. Only requests whose blocks are reserved are in the result."""
        self._admit()
        budget = self._prefill_tokens
        work: list[Work] = []
        for request in list(self.running):
            if request not in self.running:  # gave its blocks to an older one a moment ago
                continue
            if request.not_before and request.not_before > request.clock():
                continue
            left = len(request.ids) - request.computed
            tokens = 1 if left == 1 else min(left, budget)
            if not tokens or not self._reserve(request, request.computed + tokens):
                continue
            budget -= tokens if left > 1 else 0
            work.append(Work(request, tokens))
        return [item for item in work if item.request in self.running]

    def advance(self, work: Work) -> None:
        """The step has computed this work's keys and values."""
        request = work.request
        prompt_left = len(request.prompt) - request.computed
        request.evaluated += max(0, min(work.tokens, prompt_left))
        request.computed += work.tokens
        if request.lease is not None and request.use_cache:
            self._pool.commit(request.lease, request.ids[: request.computed])

    def rewind(self, request: Request, tokens: int) -> None:
        """Take back the last tokens of a running request. It gives up its blocks, since those of the taken tokens may
        be shared by now, and finds what is still true of them again when it is admitted, before all others."""
        self._preempt(request)
        del request.ids[len(request.ids) - tokens :]

    def remove(self, request: Request, *, keep: bool = True) -> None:
        """The request is over, wherever it is: its blocks go back, findable unless `keep` is False."""
        if request in self.waiting:
            self.waiting.remove(request)
        if request in self.running:
            self.running.remove(request)
        self._give_back(request, keep=keep)
        self._number_waiting()

    def _admit(self) -> None:
        while self.waiting and len(self.running) < MAX_RUNNING:
            request = self.waiting[0]
            lease = self._pool.acquire(request.ids if request.use_cache else request.ids[:1])
            if lease is None:
                return
            needed = min(len(request.ids), lease.cached + self._prefill_tokens)
            if not self._pool.extend(lease, needed):
                # A pending copy was never carried out, so then only the shared blocks are what they say.
                self._pool.release(lease, request.ids[: lease.cached] if lease.copy is None else ())
                return
            self._start(request, lease)

    def _start(self, request: Request, lease: Lease) -> None:
        self.waiting.popleft()
        if lease.copy is not None:
            self.copies.append(lease.copy)
        if request.phase == "queued" and not request.evaluated:
            request.cached = min(lease.cached, len(request.prompt))
        request.lease, request.computed, request.phase = lease, lease.cached, "prefill"
        self.running.append(request)
        self._number_waiting()

    def _reserve(self, request: Request, tokens: int) -> bool:
        assert request.lease is not None
        while not self._pool.extend(request.lease, tokens):
            youngest = self.running[-1]
            self._preempt(youngest)
            if youngest is request:
                return False
        return True

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self._give_back(request)
        request.computed, request.phase = 0, "queued"
        self.waiting.appendleft(request)
        self._number_waiting()

    def _give_back(self, request: Request, *, keep: bool = True) -> None:
        if request.lease is None:
            return
        if keep:
            self._pool.release(request.lease, request.ids[: request.computed] if request.use_cache else ())
        else:
            self._pool.discard(request.lease)
        request.lease = None

    def _number_waiting(self) -> None:
        for place, request in enumerate(self.waiting):
            request.ahead = place + len(self.running)
