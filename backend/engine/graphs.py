"""CUDA graphs of decode steps: what was launched once, some hundred kernels, is launched again as one.

One graph for each size of batch, captured when the size is used for the second time, so nobody waits for what is never
used. Smaller batches are filled up with copies of their first row, which write the same numbers to the same place. A
graph always reads the same input tensor and writes the same logits; all of them share one pool of memory. Whatever goes
wrong in a capture is a line in the log, and steps are launched one kernel after the other from then on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

SIZES = (1, 2, 4, 8, 16)  # sequences

log = logging.getLogger(__name__)

# int32 (sequences, width) on the device -> logits (sequences, vocab) on the device; static shapes, no look at the host
Compute = Callable[[torch.Tensor], torch.Tensor]


class Recorder(Protocol):
    """Captures what a function launches."""

    def record(self, compute: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        """How to launch all of it again, and the tensor that then holds the result."""
        ...


class CudaRecorder:
    def __init__(self) -> None:
        self._pool: Any = None  # the handle of what all graphs allocate from

    def record(self, compute: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        graph = torch.cuda.CUDAGraph()
        # Another thread may be loading the next model meanwhile: what it does is not ours, and no reason to fail.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = compute()
        self._pool = self._pool or graph.pool()
        return graph.replay, result


@dataclass
class _Size:
    """One size of batch: its input on the device, and its graph once there is one."""

    inputs: torch.Tensor
    replay: Callable[[], None] | None = None
    logits: torch.Tensor | None = None
    uses: int = 0


class Graphs:
    """`run(rows)` is `compute(rows)`. Used by one thread at a time, and not while `compute` needs the host."""

    def __init__(self, compute: Compute, width: int, device: torch.device, recorder: Recorder | None) -> None:
        """recorder None: never capture."""
        self._compute, self._width, self._device, self._recorder = compute, width, device, recorder
        self._sizes: dict[int, _Size] = {}
        self.captured = self.replayed = 0

    def run(self, rows: torch.Tensor) -> torch.Tensor:
        """rows int32 (sequences <= 16, columns <= width) on the host; columns beyond keep what they had. Returns logits
        (sequences, vocab) on the device, good until the next call."""
        count, columns = rows.shape
        size = self._size(next(number for number in SIZES if number >= count))
        size.inputs[:count, :columns].copy_(rows, non_blocking=True)
        if count < size.inputs.shape[0]:
            size.inputs[count:] = size.inputs[0]
        size.uses += 1
        if size.uses == 2:  # by the first use everything is compiled and chosen, so the second can be recorded
            self._capture(size)
        if size.replay is None or size.logits is None:
            return self._compute(size.inputs)[:count]
        size.replay()
        self.replayed += 1
        return size.logits[:count]

    def replays(self) -> list[Callable[[], None]]:
        """What launches each captured graph with the inputs it last had: for measuring it by itself."""
        return [size.replay for size in self._sizes.values() if size.replay is not None]

    def _size(self, number: int) -> _Size:
        if number not in self._sizes:
            inputs = torch.zeros(number, self._width, dtype=torch.int32, device=self._device)
            self._sizes[number] = _Size(inputs)
        return self._sizes[number]

    def _capture(self, size: _Size) -> None:
        if self._recorder is None:
            return
        try:
            size.replay, size.logits = self._recorder.record(lambda: self._compute(size.inputs))
            self.captured += 1
        except Exception as error:
            log.warning("CUDA graphs cannot be used here (%s): each kernel is launched by itself", error)
            size.replay = size.logits = self._recorder = None
