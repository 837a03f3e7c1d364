"""Weights that are not kept where they are multiplied: brought through a ring of buffers, ahead of their use.

A step uses the streamed parts in the same order every time, and so the ring is always being filled with what comes
next; after the last part of a step that is the first of the next step. Where parts come from and how they travel is
the business of a `Mover`: slowstore.py reads them from the file into memory, hoststore.py copies them from host memory
to a GPU. One thread at a time may multiply.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from backend.errors import NotReadyError
from backend.placement.parts import RING_BUFFERS
from backend.weights.linear import Linear

T = TypeVar("T")


class Mover(Protocol):
    """Brings parts into slots, both known by their numbers. Called by the computing thread only."""

    def fetch(self, part: int, slot: int) -> None:
        """Begin to bring a part into a slot, after what `used` it is through. Does not wait; `arrived` tells errors."""
        ...

    def arrived(self, part: int, slot: int) -> Linear:
        """The part as it lies in the slot: what is computed from now on finds it complete. Raises what went wrong."""
        ...

    def used(self, slot: int) -> None:
        """Nothing that is computed from now on reads what is in the slot, or on its way into it."""
        ...

    def close(self) -> None:
        """Let all memory and threads go."""
        ...


@dataclass
class Traffic:
    """What went through a ring since it was made. Bytes are those of the weights."""

    fetched: int = 0  # parts
    fetched_bytes: int = 0
    held_bytes: int = 0  # in the ring or on the way into it, now
    peak_bytes: int = 0  # most of these at any time
    wait_seconds: float = 0.0  # the computing thread stood still (on a GPU, the GPU waits and this stays near zero)


class Streamer:
    """The ring: which part is in which slot, and what is fetched next."""

    def __init__(self, mover: Mover, slots: int = RING_BUFFERS) -> None:
        self._mover, self._slots = mover, slots
        self._sizes: list[int] = []  # bytes of each part
        self._free: list[int] = []
        self._ring: deque[tuple[int, int]] = deque()  # (part, slot), in the order of use; the first is used next
        self._next = 0  # the part that is fetched next
        self._closed = False
        self.traffic = Traffic()

    def add(self, nbytes: int) -> int:
        """One more part, used behind all that were added before; its number. All are added before one is used."""
        if len(self._free) < self._slots:
            self._free.append(len(self._free))
        self._sizes.append(nbytes)
        return len(self._sizes) - 1

    @property
    def parts(self) -> int:
        return len(self._sizes)

    @property
    def ring_bytes(self) -> int:
        """Most that the ring can hold: so many of the largest part."""
        return min(self._slots, len(self._sizes)) * max(self._sizes, default=0)

    def use(self, part: int, compute: Callable[[Linear], T]) -> T:
        """`compute` with the part. Afterwards its slot is filled with what comes next.

        Parts are expected in turn. When a step was broken off, or began elsewhere, what was fetched in vain is dropped.
        """
        linear = self._bring(part)
        try:
            return compute(linear)
        finally:
            del linear  # the mover's is the last reference: memory is free before the next part is fetched
            self._advance()

    def close(self) -> None:
        """Let all parts go. Using one afterwards is an error, closing again is none."""
        if not self._closed:
            self._closed = True
            self._drop_all()
            self._mover.close()

    def _bring(self, part: int) -> Linear:
        if self._closed:
            raise NotReadyError("the model was unloaded")
        while self._ring and self._ring[0][0] != part:
            self._drop_first()
        if not self._ring:
            self._next = part
        self._fill()
        begun = time.perf_counter()
        try:
            return self._mover.arrived(*self._ring[0])
        except BaseException:
            self._drop_all()  # the next use fetches it again
            raise
        finally:
            self.traffic.wait_seconds += time.perf_counter() - begun

    def _advance(self) -> None:
        if len(self._ring) == len(self._sizes):
            self._ring.rotate(-1)  # all parts are in the ring: nothing is fetched that is there
        else:
            self._drop_first()
            self._fill()

    def _fill(self) -> None:
        """Fetch what comes next into all free slots."""
        while self._free:
            part, slot = self._next, self._free.pop(0)
            self._next = (part + 1) % len(self._sizes)
            self._ring.append((part, slot))
            self._count(part)
            self._mover.fetch(part, slot)

    def _count(self, part: int) -> None:
        traffic = self.traffic
        traffic.fetched += 1
        traffic.fetched_bytes += self._sizes[part]
        traffic.held_bytes += self._sizes[part]
        traffic.peak_bytes = max(traffic.peak_bytes, traffic.held_bytes)

    def _drop_first(self) -> None:
        part, slot = self._ring.popleft()
        self.traffic.held_bytes -= self._sizes[part]
        self._mover.used(slot)
        self._free.append(slot)

    def _drop_all(self) -> None:
        while self._ring:
            self._drop_first()


class StreamedLinear:
    """A weight that comes through the ring when it is multiplied with. It holds no memory of its own."""

    def __init__(self, streamer: Streamer, part: int, out_features: int, in_features: int) -> None:
        self._streamer, self._part = streamer, part
        self.out_features, self.in_features = out_features, in_features

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._streamer.use(self._part, lambda linear: linear(x))

    def nbytes(self) -> int:
        return 0

    def twin(self) -> torch.Tensor:
        return self._streamer.use(self._part, lambda linear: linear.twin())

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return ()

    def with_tensors(self, tensors: Sequence[torch.Tensor]) -> StreamedLinear:
        return self
