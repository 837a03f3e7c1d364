"""Whether a preset fits: beside what is loaded, in its place, or not at all; on machines with given numbers."""

from __future__ import annotations

import dataclasses

import pytest

from backend.errors import OutOfMemoryError
from backend.placement.machine import RAM_MARGIN, Gpu, Machine
from backend.placement.plan import Plan
from backend.room import Held, fits, ran_out, shortage, too_large

GB = 10**9
PLAN = Plan("big", "m", "bf16", "cpu", 2048, "bf16", 66, 1 * GB, 4 * GB, (), extra_ram_bytes=5 * GB)
ON_GPU = dataclasses.replace(PLAN, device="cuda:0", vram_bytes=6 * GB, extra_ram_bytes=1 * GB)


def machine(ram: int, vram: int | None = None) -> Machine:
    gpus = () if vram is None else (Gpu("cuda:0", total=24 * GB, free=vram),)
    return Machine(ram_total=64 * GB, ram_free=ram, process_bytes=3 * GB, gpus=gpus)


@pytest.mark.parametrize(
    ("free", "judged"), [(5 * GB + RAM_MARGIN, "now"), (5 * GB + RAM_MARGIN - 1, "after-unload"), (0, "after-unload")]
)
def test_on_a_cpu(free: int, judged: str) -> None:
    assert fits(PLAN, machine(free)) == judged


@pytest.mark.parametrize(
    ("ram", "vram", "judged"),
    [(8 * GB, 6 * GB, "now"), (8 * GB, 6 * GB - 1, "after-unload"), (GB, 6 * GB, "after-unload")],
)
def test_on_a_gpu_both_memories_count(ram: int, vram: int, judged: str) -> None:
    assert fits(ON_GPU, machine(ram, vram)) == judged


def test_what_the_planner_finds_too_large_is_so() -> None:
    assert fits(dataclasses.replace(PLAN, fits="no", reason="needs 5.0 GB"), machine(64 * GB)) == "no"


def test_a_machine_of_which_nothing_is_known_has_room() -> None:
    assert fits(PLAN, Machine()) == "now"


def test_what_is_loaded_would_be_given_back() -> None:
    room = Held("cuda:0", ram=2 * GB, vram=8 * GB).given_back(machine(1 * GB, 2 * GB))
    assert (room.ram_free, room.gpus[0].free, room.process_bytes) == (3 * GB, 10 * GB, 1 * GB)
    other = Held("cuda:1", vram=8 * GB).given_back(machine(1 * GB, 2 * GB))
    assert other.gpus[0].free == 2 * GB
    both = Held.together([Held("cpu", ram=GB), Held("cuda:0", ram=GB, vram=4 * GB)])
    assert both == Held("cuda:0", ram=2 * GB, vram=4 * GB)
    assert Held.together([]) == Held()


def test_the_memory_that_is_short_is_named() -> None:
    assert shortage(PLAN, machine(2 * GB)) == (5 * GB, 2 * GB)
    assert shortage(ON_GPU, machine(64 * GB, 2 * GB)) == (6 * GB, 2 * GB)
    assert shortage(ON_GPU, machine(64 * GB, 7 * GB)) is None


def test_refusals_have_numbers_and_a_way_out() -> None:
    error = too_large(PLAN, machine(2 * GB), lambda *_: "small")
    assert error.message == "preset big needs 5.0 GB of memory, 2.0 GB are free; preset 'small' fits"
    assert error.extra == {"needed_bytes": 5 * GB, "free_bytes": 2 * GB}
    planned = dataclasses.replace(PLAN, fits="no", reason="needs 5.0 GB of memory, ram is 4.0 GB")
    assert too_large(planned, machine(9 * GB), lambda *_: None).message == f"preset big {planned.reason}"


def test_memory_that_ran_out_is_told_with_the_numbers_of_whoever_knew_them() -> None:
    plain = ran_out(
        OutOfMemoryError("memory ran out while preset big was loaded"), PLAN, machine(3 * GB), lambda *_: "x"
    )
    assert plain.message == (
        "memory ran out while preset big was loaded: it needs 5.0 GB, 3.0 GB are free; preset 'x' fits"
    )
    known = OutOfMemoryError("loading big needs 4 GB, 1 GB is free", needed_bytes=4, free_bytes=1)
    told = ran_out(known, PLAN, machine(3 * GB), lambda *_: None)
    assert (told.message, told.extra) == (known.message, {"needed_bytes": 4, "free_bytes": 1})
