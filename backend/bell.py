"""Wakes the readers of running replies on their event loops: all of a step's at once, and not before there is time.

Python runs one thread at a time. A reader that is woken while the engine's thread still draws for the others takes
turns with it, so everybody waits for everybody; woken when the step's computation begins, which is not Python, it has
that long for itself.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence

Wake = Callable[[], None]


class Bell:
    """Thread-safe."""

    def __init__(self) -> None:
        self._due: deque[tuple[asyncio.AbstractEventLoop, Wake]] = deque()

    def pull(self, loop: asyncio.AbstractEventLoop, wake: Wake) -> None:
        """From the next `ring` on, `loop` is to call `wake`."""
        self._due.append((loop, wake))

    def ring(self) -> None:
        """Wake everybody who is due. Never waits."""
        loops: dict[asyncio.AbstractEventLoop, list[Wake]] = {}
        while self._due:
            try:
                loop, wake = self._due.popleft()
            except IndexError:  # another thread was faster
                break
            loops.setdefault(loop, []).append(wake)
        for loop, wakes in loops.items():
            try:
                loop.call_soon_threadsafe(_call, wakes)
            except RuntimeError:  # the loop was closed: nobody is left to tell
                pass


def _call(wakes: Sequence[Wake]) -> None:
    for wake in wakes:
        wake()
