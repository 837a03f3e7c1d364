"""Host memory as a store of weights for a device with memory of its own: one block for each part, copied in one piece.

Blocks are pinned, so that the device fetches them by itself while it computes (a CUDA device copies 24-26 GB/s over
PCIe 4 from pinned memory). Where the system refuses to pin so much, a thread copies each block into a small pinned
buffer first. Nothing is allocated in a step.
"""

from __future__ import annotations

import logging
import mmap
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import torch

from backend.weights.linear import Linear

log = logging.getLogger(__name__)
_ALIGNMENT = 256  # of each tensor in a block: what CUDA's own allocator gives, and more than any kernel asks for


class Event(Protocol):
    """A point in what a device was asked to do. One that was never recorded has passed."""

    def synchronize(self) -> None:
        """Let the calling thread wait until it has passed."""
        ...


class Link(Protocol):
    """What one device does: it computes and copies at the same time, and each can wait for the other."""

    def empty(self, nbytes: int) -> torch.Tensor:
        """Memory of the device, uint8."""
        ...

    def pin(self, memory: torch.Tensor) -> bool:
        """Let the device read this host memory by itself; whether it can."""
        ...

    def unpin(self, memory: torch.Tensor) -> None: ...

    def event(self) -> Any: ...

    def copy(self, to: torch.Tensor, source: torch.Tensor, after: Any, done: Any) -> None:
        """Begin to copy host memory into the device's once `after` has passed; record `done` behind it."""
        ...

    def record(self, event: Any) -> None:
        """The event passes when all that was asked to compute so far is computed."""
        ...

    def wait(self, event: Any) -> None:
        """What is asked to compute from now on waits for the event; the calling thread does not."""
        ...

    def finish(self) -> None:
        """Wait for all that was asked."""
        ...


class Block:
    """The tensors of one part in one piece of host memory, and the linear that reads them there."""

    def __init__(self, linear: Linear) -> None:
        """Copies the tensors; the linear that is passed keeps its own until it is let go."""
        tensors = linear.tensors()
        self._places: list[tuple[int, torch.Tensor]] = []  # offset; shape and dtype as a tensor without memory
        end = 0
        for tensor in tensors:
            self._places.append((end, tensor.to("meta")))
            end += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        self.memory = _host_memory(end)
        for view, tensor in zip(self.views(self.memory), tensors):
            view.copy_(tensor)
        self.linear = linear.with_tensors(self.views(self.memory))

    def views(self, memory: torch.Tensor) -> list[torch.Tensor]:
        """The tensors of this part, lying in any memory uint8 (at least so many bytes,)."""
        return [
            memory[offset : offset + like.nbytes].view(like.dtype).view(like.shape) for offset, like in self._places
        ]


class HostMover:
    """Blocks in the order of their use, and the device's ring of slots, each as large as the largest block."""

    def __init__(self, link: Link, slots: int) -> None:
        self._link, self._count = link, slots
        self._blocks: list[Block] = []
        self._slots: list[_Slot] = []
        self._stager: ThreadPoolExecutor | None = None

    def add(self, linear: Linear) -> Linear:
        """Keep the next part. Returns it as it lies here, in memory that the host can read."""
        self._blocks.append(Block(linear))
        return self._blocks[-1].linear

    def allocate(self) -> None:
        """Pin the blocks and make the slots, when all parts are here."""
        size = max(block.memory.numel() for block in self._blocks)
        pinned = self._pin_all()
        for _ in range(min(self._count, len(self._blocks))):
            slot = _Slot(self._link, self._link.empty(size))
            slot.linears = [block.linear.with_tensors(block.views(slot.memory)) for block in self._blocks]
            if not pinned:
                slot.staging = _host_memory(size)
                self._link.pin(slot.staging)  # where not even this can be pinned, copies are slow and still right
            self._slots.append(slot)
        if not pinned:
            log.warning("the system does not let all offloaded weights be pinned; copying them takes longer")
            self._stager = ThreadPoolExecutor(1, thread_name_prefix="weights stager")

    def _pin_all(self) -> bool:
        """All or none: blocks that were pinned before the limit was met would leave nothing for the staging buffers."""
        for number, block in enumerate(self._blocks):
            if not self._link.pin(block.memory):
                for before in self._blocks[:number]:
                    self._link.unpin(before.memory)
                return False
        return True

    def fetch(self, part: int, slot: int) -> None:
        place, memory = self._slots[slot], self._blocks[part].memory
        if self._stager is None:
            self._link.copy(place.memory[: memory.numel()], memory, place.free, place.full)
        else:
            place.staged = self._stager.submit(self._stage, place, memory)

    def arrived(self, part: int, slot: int) -> Linear:
        place = self._slots[slot]
        if place.staged is not None:
            place.staged.result()
        self._link.wait(place.full)
        return place.linears[part]

    def used(self, slot: int) -> None:
        place = self._slots[slot]
        if place.staged is not None:
            if not place.staged.cancel():
                place.staged.exception()  # wait for it: nothing may be copied into the slot behind our back
            place.staged = None
        self._link.record(place.free)

    def close(self) -> None:
        if self._stager is not None:
            self._stager.shutdown(wait=True, cancel_futures=True)
        self._link.finish()
        for memory in [block.memory for block in self._blocks] + [slot.staging for slot in self._slots]:
            if memory is not None:
                self._link.unpin(memory)
        self._blocks, self._slots = [], []

    def _stage(self, place: _Slot, memory: torch.Tensor) -> None:
        assert place.staging is not None
        place.full.synchronize()  # the copy before this one has read the buffer
        staging = place.staging[: memory.numel()]
        staging.copy_(memory)
        self._link.copy(place.memory[: memory.numel()], staging, place.free, place.full)


class _Slot:
    def __init__(self, link: Link, memory: torch.Tensor) -> None:
        self.memory = memory
        self.free, self.full = link.event(), link.event()  # its last use is computed; its part is here
        self.linears: Sequence[Linear] = ()  # every part as it is when it lies here
        self.staging: torch.Tensor | None = None
        self.staged: Future[None] | None = None


def _host_memory(nbytes: int) -> torch.Tensor:
    """uint8 (nbytes,), whole pages of its own: what shares a page with something pinned could not be pinned itself."""
    pages = mmap.mmap(-1, max(nbytes, mmap.PAGESIZE))
    if hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            pages.madvise(mmap.MADV_HUGEPAGE)
        except OSError:  # advice: a system built without huge pages refuses it
            pass
    return torch.frombuffer(pages, dtype=torch.uint8)[:nbytes]
