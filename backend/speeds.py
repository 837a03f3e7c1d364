"""How fast this machine is, for a server that must not wait for it: measured in the background, once.

Measuring takes seconds in which nothing else should compute. So it happens on a thread of its own, in pieces, and it
rests before each piece while somebody is being answered or a model is loaded. Its priority is not lowered: what it
measures is how fast the engine will be, and threads of the compiled products that it starts are the engine's too.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import torch

from backend import calibration
from backend.placement.machine import Machine

LOOK = 0.05  # seconds between looks at whether somebody is still being answered

log = logging.getLogger(__name__)


class _Ended(Exception):
    """The server closes."""


class Speeds:
    """Thread-safe. `close` ends a measurement after the piece it is at."""

    def __init__(self, busy: Callable[[], bool]) -> None:
        """`busy`: whether there is other work that should not be disturbed, and would disturb."""
        self._busy = busy
        self._found: Machine | None = None
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()  # guards the one above
        self._awaited, self._closed = threading.Event(), threading.Event()

    def start(self) -> None:
        """Measure in the background, unless that is done or on its way."""
        with self._lock:
            if self._thread is None and not self._closed.is_set():
                self._found = calibration.kept()
                self._thread = threading.Thread(target=self._measure, name="measure", daemon=True)
                self._thread.start()

    def now(self) -> Machine:
        """The machine at this moment, at once: without speeds until they are there."""
        self.start()
        return calibration.at_this_moment(self._found or Machine())

    def for_a_load(self) -> Machine:
        """What a load has to know. Speeds matter only where there is a choice between devices; then it waits for them,
        and nothing else is waited for."""
        if not (torch.cuda.is_available() or torch.backends.mps.is_available()):
            return calibration.at_this_moment(self._found or Machine())
        self._awaited.set()
        self.start()
        thread = self._thread
        if thread is not None:
            thread.join()
        if self._found is None and not self._closed.is_set():
            return calibration.this_machine()  # it failed in the background: say how
        return calibration.at_this_moment(self._found or Machine())

    def close(self) -> None:
        """Returns when the thread has ended: within the time of one piece."""
        with self._lock:
            self._closed.set()
        if self._thread is not None:
            self._thread.join()

    def _measure(self) -> None:
        try:
            self._found = self._found or calibration.measured(self._pause)
        except _Ended:
            pass
        except Exception:
            log.exception("the speeds of this machine could not be measured")

    def _pause(self) -> None:
        while self._busy() and not self._awaited.is_set() and not self._closed.wait(LOOK):
            pass
        if self._closed.is_set():
            raise _Ended
