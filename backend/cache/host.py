"""The host tier of a cache: memory for blocks that had to leave the pool, within a limit of bytes.

It is taken in segments as blocks come, so a large limit costs nothing until it is used. Beside a CUDA device it is
pinned: the device then copies by itself, in the order of its work, while the host goes on. Where the system gives no
more memory the tier stays as large as it is.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import numpy as np
import torch

SEGMENT_BYTES = 64 << 20

log = logging.getLogger(__name__)

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32}  # by bytes: numpy has no bfloat16


def copy_block(target: torch.Tensor, source: torch.Tensor) -> None:
    """Of the same shape and type, on any devices. With a CUDA device, begun and done in the order of its stream.

    On the CPU by numpy: torch would wake its threads for every small piece, and when others need the cores it waits for
    them longer than the copy takes.
    """
    if target.is_cpu and source.is_cpu:
        bits = _BITS[target.itemsize]
        np.copyto(target.view(bits).numpy(), source.view(bits).numpy())
    else:
        target.copy_(source, non_blocking=True)


class HostTier:
    """Slots for blocks of several arrays each. `slots`: how many there are by now."""

    def __init__(self, arrays: Sequence[tuple[Sequence[int], torch.dtype]], limit: int, *, pinned: bool) -> None:
        """arrays: shape and type of what a block has in each of the pool's tensors. limit: bytes, never exceeded."""
        self._arrays = [(tuple(shape), dtype, math.prod(shape) * dtype.itemsize) for shape, dtype in arrays]
        self.block_bytes = sum(size for _, _, size in self._arrays)
        self._most = limit // self.block_bytes
        self._in_segment = max(1, min(self._most, SEGMENT_BYTES // self.block_bytes))
        self._pinned = pinned
        self._segments: list[torch.Tensor] = []  # uint8 (slots, bytes of a block)
        self.slots = 0

    def nbytes(self) -> int:
        return sum(segment.nbytes for segment in self._segments)

    def grow(self) -> int:
        """Take one more segment, as far as the limit and memory allow; how many slots there are now."""
        wanted = min(self._in_segment, self._most - self.slots)
        if wanted <= 0:
            return self.slots
        try:
            segment = torch.empty(wanted, self.block_bytes, dtype=torch.uint8, pin_memory=self._pinned)
        except (RuntimeError, MemoryError) as error:  # torch says so when there is no memory to be had or pinned
            log.warning("the host tier of the cache stays at %d bytes: %s", self.nbytes(), error)
            self._most = self.slots
            return self.slots
        self._segments.append(segment)
        self.slots += wanted
        return self.slots

    def block(self, slot: int) -> list[torch.Tensor]:
        """What a slot holds, one view for each array."""
        memory = self._segments[slot // self._in_segment][slot % self._in_segment]
        views, at = [], 0
        for shape, dtype, size in self._arrays:
            views.append(memory[at : at + size].view(dtype).view(shape))
            at += size
        return views
