"""The engine: `step()` = schedule, run, sample. Speaks only token ids; one thread at a time may call it."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import inf

import torch

from backend.cache.blocks import BlockPool
from backend.engine.ends import Ends
from backend.engine.pacing import LEAST, MOST, Pacing
from backend.engine.pairs import Pairs
from backend.engine.prompt_scores import score_prompt
from backend.engine.reading import Piece
from backend.engine.request import Request, middle
from backend.engine.runner import Runner
from backend.engine.scheduler import PREFILL_TOKENS, Scheduler, Work
from backend.engine.shortage import run_step
from backend.engine.speculation import Counts, Speculation
from backend.errors import EngineError, NumericalError, UserError
from backend.events import FinishReason
from backend.kernels.cpu.draws import finite_rows
from backend.memory import is_allocation_failure
from backend.metrics import Records
from backend.sampling.chain import log_probability, top_log_probabilities
from backend.sampling.guidance import guided
from backend.sampling.sampler import Sampler

NOT_FINITE = "the model's output contains NaN or Inf, so no token can be drawn from it"
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
        speculation: Speculation | None = None,
        least_tokens: int | None = None,
        *,
        apart: bool = False,
    ) -> None:
        """`prefill_tokens`: of prompts in one step, at most; `least_tokens`: see Pacing. `speculation` None: one token
        a step for every sequence; may be set while nobody is served. `apart`: the runner can set a step aside, so
        prompts are read a little at a time while replies are being written."""
        self.runner, self.blocks, self._sleep = runner, blocks, sleep
        self.scheduler = Scheduler(blocks, prefill_tokens, Pacing(prefill_tokens, least_tokens))
        self.speculation = speculation
        self.counts = Counts()
        self.records: Records | None = None  # of requests that go on and end, where somebody wants to know
        self.resting: Callable[[], None] = lambda: None  # called when there is nothing to compute for a moment
        self._drawing: dict[Request, _Drawing] = {}
        self._pairs = Pairs()
        self._ends = Ends()
        self.scheduler.knows_end = lambda request: self._ends.after(request) is not None
        self._apart = apart
        self._piece: Piece | None = None
        self._read_before = False  # whether the last step has also read

    @property
    def idle(self) -> bool:
        return not self.scheduler.waiting and not self.scheduler.running

    def submit(self, request: Request) -> None:
        self.scheduler.add(request)

    def step(self) -> None:
        """Do one batch of work. An exception of ours ends every running request with an error, and no other; where
        nobody runs, everybody who waits."""
        begin = time.perf_counter()
        try:
            self._drop_cancelled()
            work = self.scheduler.schedule(apart=self._apart, reading=self._piece is not None)
            if self.speculation is not None:
                # Guesses leave time for what has to be read, so that the step is no longer for that.
                slower = MOST - LEAST if self._apart and self.scheduler.readers else inf
                work = self.speculation.add_drafts(work, self.scheduler.room, slower)
            self.runner.copy_blocks(self.blocks.take_moves())
            begun = self._begin_known()
            if not work:
                if self._piece is None:
                    self.resting()
                    if not begun:
                        self._rest()
                else:
                    self._read_on(0, time.perf_counter())
                return
            started = time.perf_counter()
            work, logits = run_step(self.runner.run, work, self._end)
            if not work:
                return
            computed = time.perf_counter()
            writing = self._take_step(work, logits, begin, started, computed)
            if self._apart and writing:
                self._read_on(writing, begin)
        except Exception as error:  # whatever it is, the readers must hear of it and the next request must work
            log.exception("the engine failed in a step")
            self._fail_all(error)

    def _take_step(self, work: list[Work], logits: torch.Tensor, begin: float, started: float, computed: float) -> int:
        """Draw, and learn from how long it took. Returns how many sequences of it write."""
        share = self.speculation.observe(work, computed - started) if self.speculation is not None else 1.0
        drawn, writing = self.counts.drawn, sum(1 for item in work if item.tokens == 1)
        self._drawn(work, logits)
        ended = time.perf_counter()
        if self.speculation is not None and self.counts.drawn > drawn:
            self.speculation.observe_draws(self.counts.drawn - drawn, ended - computed)
        if not self._read_before:  # after a prompt has had the caches a step takes longer
            self.scheduler.measured(work, (ended - begin) * share)
        return writing

    def _read_on(self, writing: int, begin: float) -> None:
        """Read prompts for as long as so many writers may wait, who wait since `begin`."""
        piece = self._piece
        if piece is not None and not piece.valid(self.scheduler.running):
            piece = self._piece = None
        if piece is None:
            spare = self.scheduler.spare_seconds(writing, time.perf_counter() - begin)
            work = self.scheduler.piece(self.runner.piece_tokens(spare)) if writing else []
            self.runner.copy_blocks(self.blocks.take_moves())
            self._read_before = bool(work)
            if not work:
                return
        try:
            piece = self._piece = piece or Piece(self.runner, work)
            spent = time.perf_counter() - begin
            work, logits = piece.work, piece.go_on(self.scheduler.spare_seconds(writing, spent))
        except Exception as error:
            if not is_allocation_failure(error):
                raise
            work = piece.work if piece is not None else work
            work, logits = run_step(self.runner.run, work, self._end)
        if logits is not None:
            self._piece = None
            if work:  # else memory ran out for all of it
                self._drawn(work, logits)

    def _drawn(self, work: list[Work], logits: torch.Tensor) -> None:
        """The step has computed this work: draw what follows."""
        finite, rows = finite_rows(logits), logits.unbind()
        # Which rows are whose is settled before anything is drawn: to draw is to lengthen ids.
        ends = list(itertools.accumulate((item.logit_rows for item in work), initial=0))
        draws = [item.draws for item in work]
        for item, first, end, draw in zip(work, ends, ends[1:], draws, strict=False):
            begin_at, scored = item.request.computed, item.request.score_prompt
            self.scheduler.advance(item)
            if scored and not self._score(item.request, begin_at, logits[first:end]):
                continue
            if draw and item.request.phase != "done":
                drawn_from = slice(end - 1 - len(item.drafts), end)
                self._draw(item, rows[drawn_from], finite[drawn_from])

    def _begin_known(self) -> bool:
        """Draw the first token of those whose prompts were read before, to the end. False where there are none."""
        ready = self.scheduler.ready
        for request in ready:
            logits = self._ends.after(request)
            assert logits is not None, "nobody has forgotten it since it was asked"
            self._continue(Work(request, 0), [logits], [True])
        return bool(ready)

    def _end(self, request: Request, error: Exception) -> None:
        self._finish(request, "error", error, keep=False)

    def fail_all(self, error: Exception) -> None:
        """End everything, running and waiting, e.g. because the engine closes."""
        for request in [*self.scheduler.running, *self.scheduler.waiting]:
            self._finish(request, "error", error)

    def _draw(self, work: Work, logits: Sequence[torch.Tensor], finite: list[bool]) -> None:
        """Draw from the step's logits, row by row; for one of a guided pair, when the other's are here too."""
        leader = work.request.leader or work.request
        if leader.partner is None:
            self._continue(work, logits, finite)
            return
        if not all(finite):
            self._finish(leader, "error", NumericalError(NOT_FINITE), keep=False)
            return
        both = self._pairs.join(work.request, logits[0])
        if both is not None:
            own, negative = both
            self._continue(Work(leader, 1), [own], [True], guided(own, negative, leader.params.guidance_scale))

    def _continue(
        self, work: Work, logits: Sequence[torch.Tensor], finite: list[bool], drawn_from: torch.Tensor | None = None
    ) -> None:
        """Draw the next tokens of one request: one, and one more after each draft that is what was drawn.

        logits: 1 + drafts rows, float32 (vocab,); finite: whether all numbers of a row are. `drawn_from`, where it is
        not the model's own row that is drawn from: float32 (vocab,).
        """
        request = work.request
        if work.tokens and drawn_from is None and finite[0] and not request.completion_tokens:
            self._ends.remember(request, logits[0])
        if request.only_prompt:
            self._finish(request, "length")
            return
        self.counts.passes += 1
        self.counts.drafted += len(work.drafts)
        request.drafted += len(work.drafts)
        try:
            for row, draft in enumerate((*work.drafts, None)):
                if not finite[row]:
                    raise NumericalError(NOT_FINITE)
                drawing = self._drawing.get(request) or self._begin(request)
                drawn = drawing.sampler.next(logits[row] if drawn_from is None else drawn_from)
                if drawn.token is None:
                    del drawing.held[len(drawing.held) - drawn.rewind :]
                    self.scheduler.rewind(request, drawn.rewind)
                    if self.speculation is not None:
                        self.speculation.rewound(request)
                    return
                self.counts.drawn += 1
                reason = self._take(request, drawing, self._token(request, logits[row], drawn.token))
                if reason is None and request.shifts:
                    self._shift(request, len(drawing.held))
                    return
                if reason is not None or drawn.token != draft:
                    break
                self.scheduler.accept(request)
                self.counts.accepted += 1
                request.accepted += 1
        except Exception as error:  # this request's own trouble: the others go on
            if not isinstance(error, UserError):
                log.exception("request %s failed", request.id)
                error = EngineError("this reply failed inside the engine; the log has the details")
            # Of what it has read only NaN says that it is wrong; others may share it.
            self._finish(request, "error", error, keep=not isinstance(error, NumericalError))
            return
        if reason is not None:
            self._finish(request, reason)

    def _score(self, request: Request, start: int, logits: torch.Tensor) -> bool:
        """Score the prompt's tokens; False where that ends the request."""
        try:
            score_prompt(request, start, logits)
        except NumericalError as error:
            self._finish(request, "error", error, keep=False)
            return False
        return True

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
        if self.records is not None and request.last_at is not None:
            self.records.gap(now - request.last_at)
        request.first_at = request.first_at or now
        request.last_at = now
        request.pace(now)
        for each in request.together():
            each.ids.append(token.id)
        request.phase = "decode"
        drawing.held.append(token)
        ended = token.id in request.end_ids or token.id in request.params.stop_token_ids
        full = len(request.ids) >= request.max_length and not request.shifts
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

    def _shift(self, request: Request, held: int) -> None:
        """The context is full in the middle of a reply: keep the beginning and the later half of the rest."""
        if self.speculation is not None:
            self.speculation.forget(request)  # its places are no longer those of the ids
        self.scheduler.shift(request, *middle(request, held))

    def _rest(self) -> None:
        """Wait a moment when all running replies have said what their speed limit allows by now."""
        due = [request.not_before - request.clock() for request in self.scheduler.running if request.not_before]
        if due and min(due) > 0:
            self._sleep(min(min(due), REST_SECONDS))

    def _finish(
        self, request: Request, reason: FinishReason, error: Exception | None = None, *, keep: bool = True
    ) -> None:
        request = request.leader or request
        if request.phase == "done":
            return
        for each in request.together():
            each.phase = "done"
        drawing = self._drawing.pop(request, None)
        try:
            self.scheduler.remove(request, keep=keep)
            if self.records is not None:
                self.records.ended(request.stats(), request.clock() - request.submitted_at, reason, error)
            self._pairs.forget(request)
            if self.speculation is not None:
                self.speculation.forget(request)
            for shown in drawing.held if drawing is not None else ():
                if request.listener.on_token(shown.id, shown.logprob, top=shown.top):
                    break
        except Exception as trouble:  # whatever it is, who waits for the end must hear of it
            log.exception("request %s could not be ended in good order", request.id)
            reason, error = "error", error or EngineError(f"the reply's end failed ({type(trouble).__name__})")
        try:
            request.listener.on_finish(reason, error)
        except Exception:  # a broken listener must not take the engine down
            log.exception("a listener failed")

    def _drop_cancelled(self) -> None:
        for request in [*self.scheduler.running, *self.scheduler.waiting]:
            if request.cancelled:
                self._finish(request, "cancelled")

    def _fail_all(self, cause: Exception) -> None:
        self._piece = None
        error = EngineError(f"the engine failed ({type(cause).__name__}); the next request starts afresh")
        # Where nobody runs it is who waits that the engine cannot go on with.
        for request in list(self.scheduler.running or self.scheduler.waiting):
            self._finish(request, "error", error, keep=False)
        self.blocks.clear()  # half-written blocks must not be found by anyone
        self._ends.clear()
