"""The engine: `step()` = schedule, run, sample. Speaks only token ids; one thread at a time may call it."""

from __future__ import annotations

import logging

import torch

from backend.cache.blocks import BlockPool
from backend.engine.request import Request
from backend.engine.runner import Runner
from backend.engine.scheduler import Scheduler, Work
from backend.errors import EngineError, NumericalError
from backend.events import FinishReason
from backend.sampling.chain import log_probability, sample

log = logging.getLogger(__name__)


class Engine:
    """Continues every submitted request, one step at a time."""

    def __init__(self, runner: Runner, blocks: BlockPool) -> None:
        self.runner, self.blocks = runner, blocks
        self.scheduler = Scheduler(blocks)

    @property
    def idle(self) -> bool:
        return not self.scheduler.waiting and not self.scheduler.running

    def submit(self, request: Request) -> None:
        self.scheduler.add(request)

    def step(self) -> None:
        """Do one batch of work. An exception of ours ends every running request with an error, and no other."""
        self._drop_cancelled()
        try:
            work = self.scheduler.schedule()
            copies, self.scheduler.copies = self.scheduler.copies, []
            self.runner.copy_blocks(copies)
            if not work:
                return
            logits = self.runner.run(work)
            finite = torch.isfinite(logits).all(dim=-1).tolist()
        except Exception as error:  # whatever it is, the readers must hear of it and the next request must work
            log.exception("the engine failed in a step")
            self._fail_all(error)
            return
        row = 0
        for item in work:
            gives_logits = item.gives_logits
            self.scheduler.advance(item)
            if gives_logits:
                self._continue(item, logits[row], finite[row])
                row += 1

    def fail_all(self, error: Exception) -> None:
        """End everything, running and waiting, e.g. because the engine closes."""
        for request in [*self.scheduler.running, *self.scheduler.waiting]:
            self._finish(request, "error", error)

    def _continue(self, work: Work, logits: torch.Tensor, finite: bool) -> None:
        """Draw the next token of one request and decide whether it is the last."""
        request = work.request
        try:
            if not finite:
                raise NumericalError("the model's output contains NaN or Inf, so no token can be drawn from it")
            token = sample(logits, request.params, request.ids, request.uniform())
            logprob = log_probability(logits, token) if request.want_logprobs else None
            reason = self._take(request, token, logprob)
        except Exception as error:  # this request's own trouble: the others go on
            if not isinstance(error, NumericalError):
                log.exception("request %s failed", request.id)
                error = EngineError("this reply failed inside the engine; the log has the details")
            self._finish(request, "error", error, keep=False)
            return
        if reason is not None:
            self._finish(request, reason)

    def _take(self, request: Request, token: int, logprob: float | None) -> FinishReason | None:
        now = request.clock()
        request.first_at = request.first_at or now
        request.last_at = now
        request.ids.append(token)
        request.phase = "decode"
        ended = token in request.end_ids
        stopped = request.listener.on_token(token, logprob, visible=not ended)
        if ended or stopped:
            return "stop"
        return "length" if len(request.ids) >= request.max_length else None

    def _finish(
        self, request: Request, reason: FinishReason, error: Exception | None = None, *, keep: bool = True
    ) -> None:
        self.scheduler.remove(request, keep=keep)
        request.phase = "done"
        try:
            request.listener.on_finish(reason, error)
        except Exception:  # a broken listener must not take the engine down
            log.exception("a listener failed")

    def _drop_cancelled(self) -> None:
        for request in [*self.scheduler.running, *self.scheduler.waiting]:
            if request.cancelled:
                self._finish(request, "cancelled")

    def _fail_all(self, cause: Exception) -> None:
        error = EngineError(f"the engine failed ({type(cause).__name__}); the next request starts afresh")
        for request in list(self.scheduler.running):
            self._finish(request, "error", error, keep=False)
        self.scheduler.copies = []
        self.blocks.clear()  # half-written blocks must not be found by anyone
