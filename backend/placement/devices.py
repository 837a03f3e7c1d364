"""Which device a preset's key `device` means on this machine, and how much memory that one has.

Devices are asked through `Probe`, so that tests can put machines in front of it that are not there.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Protocol

import psutil
import torch

from backend.errors import PresetError


class Probe(Protocol):
    """What torch says about this machine."""

    def built_with_cuda(self) -> bool: ...

    def cuda_devices(self) -> int: ...

    def has_mps(self) -> bool: ...

    def cuda_memory(self, index: int) -> tuple[int, int, int]:
        """Bytes free, bytes in all, and bytes that torch keeps for itself although nothing is in them."""
        ...


class Torch:
    """The machine as it is."""

    def built_with_cuda(self) -> bool:
        return torch.version.cuda is not None or torch.version.hip is not None

    def cuda_devices(self) -> int:
        return torch.cuda.device_count() if torch.cuda.is_available() else 0

    def has_mps(self) -> bool:
        return torch.backends.mps.is_available()

    def cuda_memory(self, index: int) -> tuple[int, int, int]:
        free, total = torch.cuda.mem_get_info(index)
        return free, total, torch.cuda.memory_reserved(index) - torch.cuda.memory_allocated(index)


MACHINE = Torch()


@dataclass(frozen=True)
class Memory:
    """Bytes of a device. `free`: what this process could still fill, its own empty blocks included."""

    free: int
    total: int


def choose(wanted: str, machine: Probe = MACHINE) -> torch.device:
    """auto: cuda, then mps, then cpu. Otherwise the device that is named: cuda | cuda:N | mps | cpu.

    A CUDA device always has its number. Raises PresetError where it is not there.
    """
    if wanted == "auto":
        if machine.cuda_devices():
            return torch.device("cuda", 0)
        return torch.device("mps" if machine.has_mps() else "cpu")
    named = re.fullmatch(r"cuda(?::(\d{1,4}))?", wanted)
    if named:
        return _cuda(wanted, int(named[1] or 0), machine)
    if wanted == "mps" and not machine.has_mps():
        raise PresetError("device is mps, and torch finds no Apple GPU on this machine; expected auto or cpu")
    if wanted not in ("mps", "cpu"):
        raise PresetError(f"device is {wanted}; expected auto, cuda, cuda:N, mps or cpu")
    return torch.device(wanted)


def memory(device: torch.device, machine: Probe = MACHINE) -> Memory:
    """What a device has. One that shares the host's memory, mps too, counts as the host."""
    if device.type != "cuda":
        host = psutil.virtual_memory()
        return Memory(host.available, host.total)
    free, total, empty = machine.cuda_memory(device.index or 0)
    return Memory(free + empty, total)


def _cuda(wanted: str, index: int, machine: Probe) -> torch.device:
    count = machine.cuda_devices()
    if index < count:
        return torch.device("cuda", index)
    if not machine.built_with_cuda():
        raise PresetError(f"device is {wanted}, and this torch ({torch.__version__}) was built without CUDA")
    if not count:
        raise PresetError(
            f"device is {wanted}, and torch finds no CUDA device on this machine; is its driver installed?"
        )
    devices = f"{count} CUDA device{'s' if count > 1 else ''}"
    last = "cuda:0" if count == 1 else f"cuda:0 to cuda:{count - 1}"
    raise PresetError(f"device is {wanted}, and this machine has {devices}; expected {last}")
