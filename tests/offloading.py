"""What tests of offloading share: parts in every mode, and a device that is not there."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch

from backend.checkpoint.base import Checkpoint
from backend.placement.parts import Part
from backend.placement.sizes import products

ATTENTION, FEED_FORWARD, TABLES = ("wq", "wk", "wv", "wo"), ("w1", "w2", "w3"), ("tok_embeddings", "output")
# What stays, for each mode of the contract and for lists that a user may write.
MODES: dict[str, tuple[str, ...]] = {
    "offload-all": TABLES,
    "offload-ff": (*TABLES, *ATTENTION),
    "offload-attention": (*TABLES, *FEED_FORWARD),
    "only the output streamed": ("tok_embeddings", *ATTENTION, *FEED_FORWARD),
    "nothing but the table": ("tok_embeddings",),
    "products cut in two": ("tok_embeddings", "wk", "w1", "output"),
    "cut around the middle": (*TABLES, "wq", "wv", "w2"),
}


def parts_of(
    checkpoint: Checkpoint, weights: str, stays: Collection[str], elsewhere: str = "streamed"
) -> tuple[Part, ...]:
    """Every part of a model: resident where its kind is in `stays`. Bytes are the planner's."""
    found = []
    for product in products(weights, checkpoint.config, checkpoint.tensors):
        for part in product.split(stays):
            kept = part.weights[0].kind in (*stays, "tok_embeddings")
            found.append(part.part("resident" if kept else elsewhere))  # type: ignore[arg-type]
    return tuple(found)


class FakeEvent:
    """Passes when it is recorded, and runs the copy it stands behind as late as it can: when somebody waits for it."""

    def __init__(self) -> None:
        self.copy: Callable[[], None] | None = None

    def synchronize(self) -> None:
        if self.copy is not None:
            copy, self.copy = self.copy, None
            copy()


class FakeLink:
    """A device whose memory is counted, whose copies come late, and which spoils what nobody may read any more.

    What is computed is computed at once, as on a CPU. `pins`: how many blocks it pins before it refuses.
    """

    def __init__(self, pins: int = 1 << 30) -> None:
        self.pins = pins
        self.allocated: list[int] = []  # bytes of every buffer
        self.copies: list[int] = []  # bytes of every copy
        self.pinned: set[int] = set()
        self.unpinned_sources = 0
        self.in_use: dict[int, FakeEvent] = {}  # address of a buffer -> its last copy, until it is given back
        self.buffers: dict[FakeEvent, int] = {}

    def empty(self, nbytes: int) -> torch.Tensor:
        self.allocated.append(nbytes)
        return torch.full((nbytes,), 0xFF, dtype=torch.uint8)  # NaN in every float type

    def pin(self, memory: torch.Tensor) -> bool:
        assert memory.data_ptr() not in self.pinned
        assert memory.data_ptr() % 4096 == 0, "what shares a page with pinned memory cannot be pinned"
        if len(self.pinned) == self.pins:
            return False
        self.pinned.add(memory.data_ptr())
        return True

    def unpin(self, memory: torch.Tensor) -> None:
        self.pinned.discard(memory.data_ptr())

    def event(self) -> FakeEvent:
        return FakeEvent()

    def copy(self, to: torch.Tensor, source: torch.Tensor, after: Any, done: Any) -> None:
        assert to.data_ptr() not in self.in_use, "the buffer is overwritten while it is computed with"
        self.unpinned_sources += source.data_ptr() not in self.pinned
        self.copies.append(to.numel())
        to.fill_(0xFF)
        self.in_use[to.data_ptr()] = after
        done.copy = lambda: to.copy_(source)

    def record(self, event: Any) -> None:
        self.in_use = {address: after for address, after in self.in_use.items() if after is not event}

    def wait(self, event: Any) -> None:
        event.synchronize()

    def finish(self) -> None:
        pass
