"""Which model answers, and how another takes its place: a transaction that never leaves people without a model.

Where both fit, the new model is loaded beside the old one and the switch is one assignment. Where they do not, the old
one finishes its replies (with a limit) and gives its memory back, and the new one is loaded while requests wait in a
line; whatever goes wrong then, the old one is loaded again. What cannot fit even alone is refused before anything is
touched. Loads are carried out one at a time, in the order in which they were asked for.

No frame and no variable may hold the old model while the new one is loaded: its memory would not return.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from backend.errors import EngineError, LoadCancelled, NotReadyError, OutOfMemoryError, UnloadingError, UserError
from backend.events import LoadProgress
from backend.generation import Generation
from backend.memory import give_back, is_allocation_failure, without_frames
from backend.metrics import Records, Totals
from backend.params import GenerationParams
from backend.placement.machine import Machine
from backend.room import Held, Suggest, fits, ran_out, too_large
from backend.runtime import Prepared, Runtime
from backend.store.caches import CacheFolder
from backend.turns import Report, Ticket, Turns
from backend.waiting import Ask, WaitingLine

Progress = Callable[[LoadProgress], None]
Result = TypeVar("Result")
STOPPING = "the server is being stopped"
LOOK = 0.02  # seconds between looks at replies that are being finished

log = logging.getLogger(__name__)


class Switch:
    """Holds the one loaded model. Thread-safe; `load` blocks, everything else returns at once."""

    def __init__(
        self,
        max_waiting: int,
        drain_seconds: float,
        machine: Callable[[], Machine],
        suggest: Suggest,
        records: Records | None = None,
        caches: CacheFolder | None = None,
    ) -> None:
        """`machine`: how things are now. `suggest`: a preset that fits into such a machine, for refusals. `records`:
        what every model tells of its requests. `caches`: where models find again what they had read."""
        self._caches = caches
        self._max_waiting, self._drain_seconds = max_waiting, drain_seconds
        self._machine, self._suggest, self._records = machine, suggest, records
        self._turns = Turns()
        self._lock = threading.Lock()  # guards the two below together
        self._runtime: Runtime | None = None
        self._gap = False  # no model, but one is on its way: requests wait
        self._line = WaitingLine(max_waiting)
        self._draining: list[Runtime] = []  # replaced, finishing their replies
        self._coming: GenerationParams | None = None
        self._closed = self._ending = False
        self.loading: LoadProgress | None = None
        self.error: str | None = None  # why the last load failed

    # what answers -----------------------------------------------------------------------------------------------------

    @property
    def runtime(self) -> Runtime | None:
        """What answers now. Hold it briefly: its memory cannot return while somebody does."""
        return None if self._gap else self._runtime

    @property
    def waiting(self) -> int:
        return len(self._line)

    @property
    def closed(self) -> bool:
        """Nothing new is taken any more."""
        return self._closed or self._ending

    @property
    def names(self) -> tuple[str, ...]:
        """Presets that are being loaded: the first one now, the others after it."""
        return self._turns.names

    def params(self) -> GenerationParams:
        """The sampling of the preset that answers, or of the one that requests wait for."""
        runtime = self._runtime
        return self._coming or (runtime.preset.sampling if runtime else GenerationParams())

    def start(self, ask: Ask) -> Generation:
        """Start a request on what answers now; while a model makes room for another, put it in line for that one."""
        while True:
            with self._lock:
                if self.closed:
                    raise NotReadyError(STOPPING)
                if self._gap:
                    return self._line.add(ask)
                runtime = self._runtime
            if runtime is None:
                raise self.not_ready()
            try:
                return ask(runtime)
            except UnloadingError:
                if runtime is self._runtime and not self._gap:
                    raise

    def not_ready(self) -> NotReadyError:
        return NotReadyError("no model is loaded yet" if self.loading else "no model is loaded")

    # loads ------------------------------------------------------------------------------------------------------------

    def load(
        self, name: str, prepare: Callable[[Progress], Prepared | None], progress: Progress | None, wait: bool = True
    ) -> None:
        """Load what `prepare` finds, when it is its turn; None: it is what answers already.

        `wait` False raises BusyError where another load is being carried out. On any failure, what answered before
        answers again.
        """
        ticket = self._turns.join(name, wait)
        try:
            self._turns.wait(ticket, lambda words: progress(LoadProgress(words)) if progress else None)
            self.error = None
            failure = self._carry_out(ticket, prepare, Report(ticket, self._publish, progress))
            if failure is not None and not isinstance(failure, LoadCancelled):
                self.error = failure.message
        finally:
            self.loading = self._coming = None
            self._turns.leave(ticket)
        if failure is not None:
            raise failure

    def cancel(self, name: str | None = None) -> bool:
        """Cancel the load that is being carried out, or those of the preset `name`. False: there is none."""
        return self._turns.cancel(name)

    def drain(self, seconds: float) -> None:
        """Take nothing new, and wait until what was asked for is answered, no longer than this. `close` ends it."""
        self._turns.close()
        self._ending = True
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self._closed and (self._busy() or len(self._line)):
            time.sleep(LOOK)

    def close(self) -> None:
        """Stop all replies, loads and waiting requests, and let the model go."""
        self._turns.close()
        with self._lock:
            self._closed, self._gap = True, False
            runtime, self._runtime = self._runtime, None
        self._line.fail(NotReadyError(STOPPING))
        for each in [*self._draining, *([runtime] if runtime else [])]:
            each.close(drain=False)
        while self._draining:  # their threads let the models go
            time.sleep(LOOK)

    def _carry_out(
        self, ticket: Ticket, prepare: Callable[[Progress], Prepared | None], report: Report
    ) -> UserError | None:
        report(LoadProgress(f"Opening {ticket.name}"))
        prepared = self._attempt(ticket.name, lambda: prepare(report))
        if prepared is None or isinstance(prepared, UserError):
            return prepared
        machine, held = self._machine(), self._held()
        plan = self._attempt(ticket.name, lambda: prepared.planned(held.given_back(machine)))
        if isinstance(plan, UserError):
            return plan
        room = fits(plan, machine)
        if room == "no":
            return too_large(plan, held.given_back(machine), self._suggest)
        prepared.plan = plan
        if room == "now":
            loaded = self._attempt(ticket.name, lambda: self._made(prepared, ticket, report), prepared)
            if isinstance(loaded, Runtime):
                self._put(loaded)
                return None
            if not isinstance(loaded, OutOfMemoryError) or self._runtime is None:
                return loaded
            log.warning("%s did not fit beside what is loaded after all: %s", ticket.name, loaded.message)
        return self._replace(prepared, ticket, report)

    def _replace(self, prepared: Prepared, ticket: Ticket, report: Report) -> UserError | None:
        """Unload, then load. Requests wait meanwhile."""
        with self._lock:
            self._gap, self._coming = True, prepared.preset.sampling
        early = self._attempt(ticket.name, lambda: self._finish_replies(ticket, report))
        if early is not None:  # cancelled while the old model was still whole
            self._reopen()
            return early
        previous = self._unload()
        loaded = self._attempt(ticket.name, lambda: self._made(prepared, ticket, report), prepared)
        if isinstance(loaded, Runtime):
            self._put(loaded)
            return None
        if previous is None or self._closed:
            self._abandon(loaded)
            return loaded
        self._coming = previous.preset.sampling
        label = previous.preset.title or previous.preset.name
        again = report.restoring(label)
        back = self._attempt(previous.preset.name, lambda: self._runtime_of(previous, again), previous)
        if isinstance(back, Runtime):
            self._put(back)
            return loaded
        both = EngineError(f"{loaded.message}; and '{label}' could not be loaded again: {back.message}")
        self._abandon(both)
        return both

    # steps of a load --------------------------------------------------------------------------------------------------

    def _attempt(self, name: str, work: Callable[[], Result], prepared: Prepared | None = None) -> Result | UserError:
        """What `work` gives, or why it failed. Of what failed, nothing stays in memory."""
        try:
            return work()
        except Exception as error:
            failure = self._failure(name, error, prepared)
            without_frames(error)
        give_back()
        if prepared is not None and isinstance(failure, OutOfMemoryError):
            failure = ran_out(failure, prepared.plan, self._held().given_back(self._machine()), self._suggest)
        return failure

    def _failure(self, name: str, error: Exception, prepared: Prepared | None) -> UserError:
        if isinstance(error, UserError):
            return error
        if is_allocation_failure(error):
            return OutOfMemoryError(f"memory ran out while preset {name} was loaded")
        log.exception("loading %s failed", name)
        return EngineError(f"preset {name} could not be loaded: {type(error).__name__}: {error}")

    def _runtime_of(self, prepared: Prepared, progress: Progress) -> Runtime:
        return Runtime(prepared, self._max_waiting, progress, self._records, self._caches)

    def _made(self, prepared: Prepared, ticket: Ticket, report: Progress) -> Runtime:
        # Measured now, because what an unloaded model leaves in the process (libraries, first pages) is not in a plan.
        process = self._held().given_back(self._machine()).process_bytes
        prepared.plan = replace(prepared.plan, ram_bytes=process + prepared.plan.extra_ram_bytes)
        runtime = self._runtime_of(prepared, report)
        if ticket.cancelled:
            runtime.close(drain=False)
            ticket.check()
        return runtime

    def _put(self, runtime: Runtime) -> None:
        """From now on this one answers, first those who waited; the one before finishes its replies aside."""
        with self._lock:
            closed = self._closed
            if not closed:
                before, self._runtime = self._runtime, runtime
        if closed:
            runtime.close(drain=False)
            return
        self._serve_line(runtime)
        if before is not None:
            self._draining.append(before)
            # In a list, because a thread would keep its arguments, and so the model, until it has ended.
            threading.Thread(target=self._drain, args=([before],), name="drain", daemon=True).start()

    def _reopen(self) -> None:
        """The unloading is called off: the model that is still there answers those who waited."""
        runtime = self._runtime
        if runtime is not None:
            self._serve_line(runtime)
        else:
            self._abandon(self.not_ready())

    def _serve_line(self, runtime: Runtime) -> None:
        while True:
            self._line.serve(runtime)
            with self._lock:  # whoever joined meanwhile is before those who find the door open
                if not len(self._line):
                    self._gap = False
                    return

    def _abandon(self, error: UserError) -> None:
        """There is no model: those who waited are told why."""
        with self._lock:
            self._gap = False
        self._line.fail(NotReadyError(f"no model can answer: {error.message}"))

    def _finish_replies(self, ticket: Ticket, report: Progress) -> None:
        """Wait for running replies, but no longer than the limit. Raises LoadCancelled."""
        deadline, told = time.monotonic() + self._drain_seconds, 0
        while time.monotonic() < deadline and not self._closed:
            ticket.check()
            busy = self._busy()
            if not busy:
                return
            if busy != told:
                told = busy
                noun = "reply" if busy == 1 else "replies"
                report(LoadProgress(f"Waiting for {busy} {noun} to finish before {ticket.name} is loaded"))
            time.sleep(LOOK)

    def _unload(self) -> Prepared | None:
        """Let go of every model, and return what the one that answered can be loaded again from."""
        reason = f"this reply was stopped after {self._drain_seconds:.0f} s, because another preset is being loaded"
        with self._lock:
            runtime, self._runtime = self._runtime, None
        previous = runtime.prepared if runtime else None
        for each in [*self._draining, *([runtime] if runtime else [])]:
            each.close(drain=False, reason=reason)
            del each
        del runtime
        while self._draining:  # their threads end as soon as they are closed
            time.sleep(LOOK)
        give_back()
        return previous

    def _drain(self, box: list[Runtime]) -> None:
        runtime = box.pop()
        try:
            runtime.close(drain=True)
        finally:
            self._draining.remove(runtime)
        del runtime
        give_back()

    def totals(self) -> list[Totals]:
        """What each loaded model has counted."""
        return [runtime.totals() for runtime in self._models()]

    def _busy(self) -> int:
        """Requests that some model is answering, or has in its line."""
        return sum(runtime.worker.running + runtime.worker.waiting for runtime in self._models())

    def _models(self) -> list[Runtime]:
        runtime = self._runtime
        return [*self._draining, *([runtime] if runtime else [])]

    def _held(self) -> Held:
        return Held.together([runtime.held() for runtime in self._models()])

    def _publish(self, step: LoadProgress) -> None:
        self.loading = step
