"""The engine: `step()` = schedule, run, sample. Speaks only token ids; one thread at a time may call it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from backend.cache.blocks import BlockPool
from backend.engine.request import Request
from backend.engine.runner import Runner
from backend.engine.scheduler import PREFILL_TOKENS, Scheduler, Work
from backend.engine.shortage import run_step
from backend.errors import EngineError, NumericalError, UserError
from backend.events import FinishReason
from backend.sampling.chain import log_probability, top_log_probabilities
from backend.sampling.sampler import Sampler

REST_SECONDS = 0.02  # while every reply waits for its speed limit; a new request or a Stop waits this long at most

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Token:
    """One token on its way to the listener."""

    id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]


@dataclass
class _Drawing:
    """What draws a request's tokens, and those that nobody may see yet, because they may be taken back."""

    sampler: Sampler
    held: list[_Token] = field(default_factory=list)


class Engine:
    """Continues every submitted request, one step at a time."""

    def __init__(
        self,
        runner: Runner,
        blocks: BlockPool,
        sleep: Callable[[float], None] = time.sleep,
        prefill_tokens: int = PREFILL_TOKENS,
    ) -> None:
        """`prefill_tokens`: of prompts in one step."""
        self.runner, self.blocks, self._sleep = runner, blocks, sleep
        self.scheduler = Scheduler(blocks, prefill_tokens)
        self._drawing: dict[Request, _Drawing] = {}

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
                self._rest()
                return
            work, logits = run_step(self.runner.run, work, self._end)
            if not work:
                return
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

    def _end(self, request: Request, error: Exception) -> None:
        self._finish(request, "error", error, keep=False)

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
            drawing = self._drawing.get(request) or self._begin(request)
            drawn = drawing.sampler.next(logits)
            if drawn.token is None:
                del drawing.held[len(drawing.held) - drawn.rewind :]
                self.scheduler.rewind(request, drawn.rewind)
                return
            reason = self._take(request, drawing, self._token(request, logits, drawn.token))
        except Exception as error:  # this request's own trouble: the others go on
            if not isinstance(error, UserError):
                log.exception("request %s failed", request.id)
                error = EngineError("this reply failed inside the engine; the log has the details")
            self._finish(request, "error", error, keep=False)
            return
        if reason is not None:
            self._finish(request, reason)

    def _begin(self, request: Request) -> _Drawing:
        sampler = Sampler(
            request.params,
            request.prompt,
            request.uniform,
            end_ids=request.end_ids,
            token_bytes=request.token_bytes,
            matcher=request.matcher,
        )
        return self._drawing.setdefault(request, _Drawing(sampler))

    def _token(self, request: Request, logits: torch.Tensor, token: int) -> _Token:
        if not request.want_logprobs:
            return _Token(token, None, ())
        return _Token(token, log_probability(logits, token), top_log_probabilities(logits, request.top_logprobs))

    def _take(self, request: Request, drawing: _Drawing, token: _Token) -> FinishReason | None:
        now = request.clock()
        request.first_at = request.first_at or now
        request.last_at = now
        request.pace(now)
        request.ids.append(token.id)
        request.phase = "decode"
        drawing.held.append(token)
        ended = token.id in request.end_ids or token.id in request.params.stop_token_ids
        full = len(request.ids) >= request.max_length
        # At the end nothing is taken back any more: a beginning of a banned text is not one.
        keep = 0 if ended or full or drawing.sampler.complete else drawing.sampler.held
        while len(drawing.held) > keep:
            shown = drawing.held.pop(0)
            if request.listener.on_token(
                shown.id, shown.logprob, visible=not (ended and shown is token), top=shown.top
            ):
                drawing.held.clear()  # what comes after a stop string is not part of the reply
                return "stop"
        if ended or drawing.sampler.complete:
            return "stop"
        return "length" if full else None

    def _rest(self) -> None:
        """Wait a moment when all running replies have said what their speed limit allows by now."""
        due = [request.not_before - request.clock() for request in self.scheduler.running if request.not_before]
        if due and min(due) > 0:
            self._sleep(min(min(due), REST_SECONDS))

    def _finish(
        self, request: Request, reason: FinishReason, error: Exception | None = None, *, keep: bool = True
    ) -> None:
        self.scheduler.remove(request, keep=keep)
        request.phase = "done"
        drawing = self._drawing.pop(request, None)
        try:
            for shown in drawing.held if drawing is not None else ():
                if request.listener.on_token(shown.id, shown.logprob, top=shown.top):
                    break
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
