"""Whether a preset fits into the memory that is there, beside what is loaded or in its place."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from backend.errors import OutOfMemoryError
from backend.events import Fits
from backend.placement.machine import RAM_MARGIN, Machine
from backend.placement.plan import Plan
from backend.units import show_bytes

Suggest = Callable[[Plan, Machine], str | None]  # a preset that fits in the place of this one


@dataclass(frozen=True)
class Held:
    """Bytes that a loaded model would give back."""

    device: str = "cpu"
    ram: int = 0
    vram: int = 0

    @classmethod
    def together(cls, held: Sequence[Held]) -> Held:
        """All of them. The device is that of the last one: where models are on two, the other counts as occupied."""
        if not held:
            return cls()
        device = held[-1].device
        return cls(device, sum(each.ram for each in held), sum(each.vram for each in held if each.device == device))

    def given_back(self, machine: Machine) -> Machine:
        """The machine as it would be without that model."""
        gpus = tuple(
            dataclasses.replace(gpu, free=gpu.free + self.vram) if gpu.name == self.device else gpu
            for gpu in machine.gpus
        )
        process = max(0, machine.process_bytes - self.ram)
        return dataclasses.replace(machine, ram_free=machine.ram_free + self.ram, process_bytes=process, gpus=gpus)


def shortage(plan: Plan, machine: Machine) -> tuple[int, int] | None:
    """(needed, free) bytes of the memory that does not suffice on this machine; None when all does."""
    gpu = machine.gpu(plan.device) if plan.vram_bytes else None
    if gpu is not None and plan.vram_bytes > gpu.free:
        return plan.vram_bytes, gpu.free
    short = machine.ram_total and plan.extra_ram_bytes + RAM_MARGIN > machine.ram_free
    return (plan.extra_ram_bytes, machine.ram_free) if short else None


def fits(plan: Plan, machine: Machine) -> Fits:
    """Beside what is loaded, only in its place, or not at all. `plan` was made for the machine without it."""
    if plan.fits == "no":
        return "no"
    return "after-unload" if shortage(plan, machine) else "now"


def too_large(plan: Plan, room: Machine, suggest: Suggest) -> OutOfMemoryError:
    """Why a preset is not loaded at all: what it needs, what would be free without the loaded model, what would fit."""
    needed, free = shortage(plan, room) or (plan.vram_bytes or plan.extra_ram_bytes, room.ram_free)
    why = plan.reason or f"needs {show_bytes(needed)} of memory, {show_bytes(free)} are free"
    message = f"preset {plan.preset} {why}{_instead(plan, room, suggest)}"
    return OutOfMemoryError(message, needed_bytes=needed, free_bytes=free)


def ran_out(error: OutOfMemoryError, plan: Plan, room: Machine, suggest: Suggest) -> OutOfMemoryError:
    """The error of a load that met the end of memory, with the numbers and what would fit."""
    instead = _instead(plan, room, suggest)
    if error.extra:  # the loader knew the numbers itself
        return OutOfMemoryError(error.message + instead, **error.extra)  # type: ignore[arg-type]
    needed, free = plan.vram_bytes or plan.extra_ram_bytes, room.ram_free
    numbers = f": it needs {show_bytes(needed)}, {show_bytes(free)} are free"
    return OutOfMemoryError(error.message + numbers + instead, needed_bytes=needed, free_bytes=free)


def _instead(plan: Plan, room: Machine, suggest: Suggest) -> str:
    other = suggest(plan, room)
    return f"; preset '{other}' fits" if other else ""
