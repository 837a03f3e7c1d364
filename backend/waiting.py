"""Requests that come while no model is loaded, because one makes room for another: they wait here, in order.

A request is kept as it was asked, in text, and becomes token ids only when the model is there that answers it.
"""

from __future__ import annotations

import itertools
import logging
import threading
from typing import Protocol

from backend.errors import BusyError, EngineError, UserError
from backend.events import PromptScore, Stats
from backend.generation import Generation
from backend.runtime import Runtime

log = logging.getLogger(__name__)


class Ask(Protocol):
    """Starts one request on a model. With `generation` it goes on in that one, which the reader holds already."""

    def __call__(self, runtime: Runtime, generation: Generation | None = None) -> Generation: ...


class WaitingLine:
    """At most `limit` requests. Thread-safe; readers may stop theirs at any time."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._line: list[_Waiting] = []
        self._numbers = itertools.count(1)

    def __len__(self) -> int:
        return len(self._line)

    def add(self, ask: Ask) -> Generation:
        """Put a request at the end. Raises BusyError when too many wait."""
        with self._lock:
            if len(self._line) >= self._limit:
                raise BusyError(f"{len(self._line)} requests are waiting for the model already; try again in a moment")
            waiting = _Waiting(f"w{next(self._numbers)}", ask, self)
            waiting.generation.attach(waiting, waiting.cancel)  # before anybody can serve it
            self._line.append(waiting)
        return waiting.generation

    def serve(self, runtime: Runtime) -> None:
        """Start everybody on this model, in order. What cannot be answered by it ends with its error."""
        while (waiting := self._next()) is not None:
            try:
                waiting.ask(runtime, waiting.generation)
                if waiting.cancelled:  # between leaving the line and arriving at the model
                    waiting.generation.stop()
            except UserError as error:
                waiting.generation.on_finish("error", error)
            except Exception:
                log.exception("a request that waited could not be started")
                message = "this request could not be started; the log has the details"
                waiting.generation.on_finish("error", EngineError(message))

    def fail(self, error: UserError) -> None:
        """End everybody with this error."""
        while (waiting := self._next()) is not None:
            waiting.generation.on_finish("error", error)

    def ahead_of(self, waiting: _Waiting) -> int:
        with self._lock:
            return self._line.index(waiting) if waiting in self._line else 0

    def leave(self, waiting: _Waiting) -> bool:
        """Take one out; False when it has left already."""
        with self._lock:
            present = waiting in self._line
            if present:
                self._line.remove(waiting)
            return present

    def _next(self) -> _Waiting | None:
        with self._lock:
            return self._line.pop(0) if self._line else None


class _Waiting:
    """One request in the line; what its generation knows of it until the engine has it."""

    def __init__(self, id: str, ask: Ask, line: WaitingLine) -> None:
        self.id, self.ask, self._line = id, ask, line
        self.prompt_scores: tuple[PromptScore, ...] = ()
        self.cancelled = False
        self.generation = Generation.waiting()

    def stats(self) -> Stats:
        return Stats(people_ahead=self._line.ahead_of(self))

    def cancel(self) -> None:
        self.cancelled = True
        if self._line.leave(self):
            self.generation.on_finish("cancelled")
