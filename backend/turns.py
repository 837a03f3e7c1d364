"""Whose turn it is to load: one load at a time, in the order in which they were asked for; and how it is followed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace

from backend.errors import BusyError, LoadCancelled, NotReadyError
from backend.events import LoadProgress

MAX_LOADS = 8  # the one being carried out and those that wait


class Ticket:
    """One load, from asking to its end. `cancelled` may be set by anyone at any time."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.cancelled = False

    def check(self) -> None:
        """Raises LoadCancelled once somebody has cancelled this load."""
        if self.cancelled:
            raise LoadCancelled(f"loading '{self.name}' was cancelled")


class Turns:
    """A line of tickets; the first one loads. Thread-safe."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._line: list[Ticket] = []
        self._closed = False

    @property
    def names(self) -> tuple[str, ...]:
        """The load that is being carried out, and those behind it."""
        return tuple(ticket.name for ticket in list(self._line))

    def join(self, name: str, wait: bool) -> Ticket:
        """A place in the line. Without `wait`, raises BusyError when it is not the first one."""
        with self._changed:
            if self._closed:
                raise NotReadyError("the server is being stopped")
            if self._line and not wait:
                raise BusyError(f"'{self._line[0].name}' is being loaded; try again when it is done")
            if len(self._line) >= MAX_LOADS:
                raise BusyError(f"{len(self._line)} presets are being loaded or wait for it; try again later")
            ticket = Ticket(name)
            self._line.append(ticket)
            return ticket

    def wait(self, ticket: Ticket, tell: Callable[[str], None]) -> None:
        """Until it is this ticket's turn. `tell` gets a sentence at the beginning and whenever the line moves."""
        with self._changed:
            while (place := self._line.index(ticket)) > 0:
                ticket.check()
                tell(_sentence(self._line[0].name, ticket.name, place))
                while not ticket.cancelled and self._line.index(ticket) == place:
                    self._changed.wait()
            ticket.check()

    def leave(self, ticket: Ticket) -> None:
        with self._changed:
            self._line.remove(ticket)
            self._changed.notify_all()

    def cancel(self, name: str | None = None) -> bool:
        """Cancel the load that is being carried out, or every load of the preset `name`. False: there is none."""
        with self._changed:
            meant = [ticket for ticket in self._line if ticket.name == name] if name else self._line[:1]
            for ticket in meant:
                ticket.cancelled = True
            self._changed.notify_all()
            return bool(meant)

    def close(self) -> None:
        """Cancel all, and take no more."""
        with self._changed:
            self._closed = True
            for ticket in self._line:
                ticket.cancelled = True
            self._changed.notify_all()


def _sentence(loading: str, mine: str, place: int) -> str:
    behind = "is next" if place == 1 else f"comes after {place - 1} more"
    return f"'{loading}' is being loaded by someone; yours ('{mine}') {behind}"


class Report:
    """The progress callback of one load: passes each step on, with the time that is left, until it is cancelled."""

    def __init__(
        self,
        ticket: Ticket,
        publish: Callable[[LoadProgress], None],
        progress: Callable[[LoadProgress], None] | None,
        *,
        suffix: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`publish` and then `progress` get every step; `suffix` is put behind what it says."""
        self._ticket, self._publish, self._progress, self._suffix = ticket, publish, progress, suffix
        self._clock = clock
        self._stage, self._since, self._first = "", 0.0, 0

    def __call__(self, step: LoadProgress) -> None:
        """Raises LoadCancelled once somebody has cancelled this load: whoever loads lets it pass."""
        self._ticket.check()
        step = replace(step, stage=step.stage + self._suffix, seconds_left=self._seconds_left(step))
        self._publish(step)
        if self._progress is not None:
            self._progress(step)

    def restoring(self, name: str) -> Report:
        """For loading the preset that answered before: nobody can cancel that, and the stages say what it is."""
        return Report(Ticket(name), self._publish, self._progress, suffix=" again", clock=self._clock)

    def _seconds_left(self, step: LoadProgress) -> float | None:
        """From the pace of this stage so far; None before a second has passed and where the end is unknown."""
        now = self._clock()
        if step.stage != self._stage or step.done < self._first:
            self._stage, self._since, self._first = step.stage, now, step.done
        elapsed, done = now - self._since, step.done - self._first
        if elapsed < 1 or done <= 0 or step.total <= step.done:
            return None
        return elapsed / done * (step.total - step.done)
