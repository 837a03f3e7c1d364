"""The one thread that drives an engine, and the thread-safe way to it."""

from __future__ import annotations

import collections
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from backend.engine.engine import Engine
from backend.engine.request import Request
from backend.errors import BusyError, EngineError, NotReadyError, UnloadingError

STOPPED = "the engine has stopped after an error; load the preset again"

Result = TypeVar("Result")
log = logging.getLogger(__name__)


class Worker:
    """Runs `engine.step()` while there is work and sleeps otherwise."""

    def __init__(
        self,
        engine: Engine,
        max_waiting: int,
        meanwhile: Callable[[], bool] = lambda: False,
        prepare: Callable[[], None] = lambda: None,
    ) -> None:
        """`meanwhile`: a few milliseconds of what is done while nobody wants anything; False when all is done.
        `prepare`: what the thread does first."""
        self._engine, self._max_waiting, self._meanwhile, self._prepare = engine, max_waiting, meanwhile, prepare
        self._inbox: collections.deque[Request] = collections.deque()
        self._errands: collections.deque[tuple[Callable[[], Any], Future[Any]]] = collections.deque()
        self._wake = threading.Condition()
        self._closing = self._drain = self._closed = False
        self._reason = "the model was unloaded before this reply was finished"
        self._failed = False
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    @property
    def running(self) -> int:
        """Replies, not sequences: a guided one is two."""
        return sum(1 for request in list(self._engine.scheduler.running) if request.leader is None)

    @property
    def waiting(self) -> int:
        return len(self._engine.scheduler.waiting) + len(self._inbox)

    def submit(self, request: Request) -> None:
        """Hand over a request. Raises BusyError when too many wait, UnloadingError when this worker is closing."""
        with self._wake:
            self._check_open()
            if self.waiting >= self._room_for(request.person):
                raise BusyError(f"{self.waiting} requests are waiting already; try again in a moment")
            self._inbox.append(request)
            self._wake.notify()

    def ask(self, errand: Callable[[], Result]) -> Result:
        """What `errand` gives, done by the engine's thread between two steps: nobody else touches the cache then.

        Waits for it. Raises what it raises, and UnloadingError when this worker is closing.
        """
        answer: Future[Result] = Future()
        with self._wake:
            self._check_open()
            self._errands.append((errand, answer))
            self._wake.notify()
        return answer.result()

    def _check_open(self) -> None:
        if self._failed:
            raise EngineError(STOPPED)
        if self._closing:
            raise UnloadingError("the model is being unloaded; try again in a moment")

    def _room_for(self, person: str) -> int:
        """How long the line may be for one more of this person. The last quarter of it is kept for people who have
        nothing in it: otherwise one who sends a hundred requests at once would keep out everybody else."""
        if not person:
            return self._max_waiting
        waits = any(other.person == person for other in (*self._inbox, *self._engine.scheduler.waiting))
        return self._max_waiting - self._max_waiting // 4 if waits else self._max_waiting

    @property
    def idle(self) -> bool:
        """Nothing runs and nothing waits."""
        return not self._inbox and self._engine.idle

    def _unwanted(self) -> bool:
        return self.idle and not self._errands and not self._closing

    def close(self, drain: bool, reason: str | None = None) -> bool:
        """End the thread and wait for it; with `drain` the running replies are finished first. False where another
        call has done so, whose caller has to clean up.

        `reason`: what those are told that are not finished. Calling again without `drain` ends a drain early.
        """
        with self._wake:
            self._drain = drain and (self._drain or not self._closing)
            self._closing = True
            self._reason = reason or self._reason
            self._wake.notify()
        self._thread.join()
        with self._wake:
            first, self._closed = not self._closed, True
        return first

    def _work(self) -> None:
        """The thread. Should anything go wrong that `Engine.step` does not answer for, nobody waits for ever."""
        try:
            self._loop()
        except Exception as error:
            log.exception("the engine's thread has ended")
            with self._wake:
                self._failed = self._closing = True
                scheduler = self._engine.scheduler
                left = [*scheduler.running, *scheduler.waiting, *self._inbox]
                errands = [answer for _, answer in self._errands]
            for answer in errands:
                answer.set_exception(EngineError(STOPPED))
            for request in left:
                if request.leader is None and request.phase != "done":
                    _tell(request, EngineError(f"{STOPPED} ({type(error).__name__})"))

    def _loop(self) -> None:
        self._prepare()
        more = True  # of what is done meanwhile
        while True:
            with self._wake:
                while (unwanted := self._unwanted()) and not more:
                    self._wake.wait()
                arrived = list(self._inbox)
                self._inbox.clear()
                errands = list(self._errands)
                self._errands.clear()
                closing, drain = self._closing, self._drain
            if unwanted:
                more = self._at_leisure()
                continue
            for errand, answer in errands:
                _run(errand, answer)
            for request in arrived:
                self._engine.submit(request)
            if closing and (self._engine.idle or not drain):
                self._engine.fail_all(NotReadyError(self._reason))
                return
            self._engine.step()

    def _at_leisure(self) -> bool:
        try:
            return self._meanwhile()
        except Exception:  # nobody has asked for it
            log.exception("what was done meanwhile failed")
            return False


def _tell(request: Request, error: Exception) -> None:
    try:
        request.listener.on_finish("error", error)
    except Exception:
        log.exception("a listener failed")


def _run(errand: Callable[[], Any], answer: Future[Any]) -> None:
    try:
        answer.set_result(errand())
    except Exception as error:  # whose errand it is hears of it; the engine goes on
        answer.set_exception(error)
