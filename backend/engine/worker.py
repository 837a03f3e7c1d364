"""The one thread that drives an engine, and the thread-safe way to it."""

from __future__ import annotations

import collections
import threading

from backend.engine.engine import Engine
from backend.engine.request import Request
from backend.errors import BusyError, NotReadyError, UnloadingError


class Worker:
    """Runs `engine.step()` while there is work and sleeps otherwise."""

    def __init__(self, engine: Engine, max_waiting: int) -> None:
        self._engine, self._max_waiting = engine, max_waiting
        self._inbox: collections.deque[Request] = collections.deque()
        self._wake = threading.Condition()
        self._closing = self._drain = False
        self._reason = "the model was unloaded before this reply was finished"
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    @property
    def running(self) -> int:
        return len(self._engine.scheduler.running)

    @property
    def waiting(self) -> int:
        return len(self._engine.scheduler.waiting) + len(self._inbox)

    def submit(self, request: Request) -> None:
        """Hand over a request. Raises when too many wait, or when this worker is closing."""
        with self._wake:
            if self._closing:
                raise UnloadingError("the model is being unloaded; try again in a moment")
            if self.waiting >= self._max_waiting:
                raise BusyError(f"{self.waiting} requests are waiting already; try again in a moment")
            self._inbox.append(request)
            self._wake.notify()

    @property
    def idle(self) -> bool:
        """Nothing runs and nothing waits."""
        return not self._inbox and self._engine.idle

    def close(self, drain: bool, reason: str | None = None) -> None:
        """End the thread and wait for it; with `drain` the running replies are finished first.

        `reason`: what those are told that are not finished. Calling again without `drain` ends a drain early.
        """
        with self._wake:
            self._closing = True
            self._drain = drain
            self._reason = reason or self._reason
            self._wake.notify()
        self._thread.join()

    def _loop(self) -> None:
        while True:
            with self._wake:
                while not self._inbox and self._engine.idle and not self._closing:
                    self._wake.wait()
                arrived = list(self._inbox)
                self._inbox.clear()
                closing, drain = self._closing, self._drain
            for request in arrived:
                self._engine.submit(request)
            if closing and (self._engine.idle or not drain):
                self._engine.fail_all(NotReadyError(self._reason))
                return
            self._engine.step()
