"""One CUDA device as a `Link`: copies have a stream of their own, and events order them against computing."""

from __future__ import annotations

import torch

_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every device


class CudaLink:
    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies = torch.cuda.Stream(device)
        self._pinned: set[int] = set()

    def empty(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def pin(self, memory: torch.Tensor) -> bool:
        # Registered where it lies: torch's own pinned memory is rounded up to a power of two, up to twice the weights.
        with torch.cuda.device(self._device):
            if int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), _PORTABLE)) == 0:
                self._pinned.add(memory.data_ptr())
                return True
            # CUDA remembers the refusal and would blame the next kernel for it: let something small take the blame.
            try:
                torch.zeros(1, device=self._device)
            except RuntimeError:
                pass
        return False

    def unpin(self, memory: torch.Tensor) -> None:
        if memory.data_ptr() in self._pinned:
            self._pinned.remove(memory.data_ptr())
            torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())

    def event(self) -> torch.cuda.Event:
        return torch.cuda.Event()

    def copy(self, to: torch.Tensor, source: torch.Tensor, after: torch.cuda.Event, done: torch.cuda.Event) -> None:
        self._copies.wait_event(after)
        with torch.cuda.stream(self._copies):
            to.copy_(source, non_blocking=True)
        done.record(self._copies)

    def record(self, event: torch.cuda.Event) -> None:
        event.record(torch.cuda.current_stream(self._device))

    def wait(self, event: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self._device).wait_event(event)

    def finish(self) -> None:
        torch.cuda.synchronize(self._device)
