"""The ring of buffers by itself, with a mover that moves nothing: what is fetched when, and how much is held."""

from __future__ import annotations

import pytest
import torch

from backend.errors import CheckpointError, NotReadyError
from backend.placement.offload import Streamer
from backend.weights.linear import Linear, PlainLinear


class Counting:
    """A mover of weights of one value each, which says what it was asked for."""

    def __init__(self) -> None:
        self.fetched: list[int] = []
        self.slots: dict[int, int] = {}
        self.most = 0
        self.broken: int | None = None
        self.closed = 0

    def fetch(self, part: int, slot: int) -> None:
        assert slot not in self.slots, "a slot is filled that was not given back"
        self.fetched.append(part)
        self.slots[slot] = part
        self.most = max(self.most, len(self.slots))

    def arrived(self, part: int, slot: int) -> Linear:
        assert self.slots[slot] == part
        if part == self.broken:
            raise CheckpointError("the disk is gone")
        return PlainLinear(torch.tensor([[float(part)]]))

    def used(self, slot: int) -> None:
        del self.slots[slot]

    def close(self) -> None:
        self.closed += 1


def ring(parts: int, slots: int = 3) -> tuple[Streamer, Counting]:
    mover = Counting()
    streamer = Streamer(mover, slots)
    assert [streamer.add(10 + number) for number in range(parts)] == [*range(parts)]
    return streamer, mover


def step(streamer: Streamer, parts: int) -> None:
    for part in range(parts):
        assert streamer.use(part, lambda linear: float(linear(torch.ones(1, 1)))) == part


@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("parts", [4, 5, 8])
def test_every_part_is_fetched_once_a_step_and_ahead_of_its_use(parts: int, slots: int) -> None:
    streamer, mover = ring(parts, slots)
    for number in range(1, 5):
        step(streamer, parts)
        # So many steps, and what the next one begins with: on its way while the last parts of this one were computed.
        assert mover.fetched == [part % parts for part in range(number * parts + slots)]
        assert list(mover.slots.values()) != [] or slots == 0
    assert mover.most == slots
    assert streamer.traffic.fetched == len(mover.fetched)
    assert streamer.traffic.fetched_bytes == sum(10 + part for part in mover.fetched)
    largest = max(sum(10 + (part + ahead) % parts for ahead in range(slots)) for part in range(parts))
    assert streamer.traffic.peak_bytes == largest <= streamer.ring_bytes == slots * (10 + parts - 1)


def test_the_ring_is_full_before_a_part_is_waited_for() -> None:
    streamer, mover = ring(6)
    seen = []
    for part in range(6):
        streamer.use(part, lambda linear: seen.append(sorted(mover.slots.values())))
    assert seen == [sorted((part + ahead) % 6 for ahead in range(3)) for part in range(6)]


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_what_fits_into_the_ring_is_fetched_once_for_good(parts: int) -> None:
    streamer, mover = ring(parts)
    for _ in range(3):
        step(streamer, parts)
    assert mover.fetched == [*range(parts)]
    assert streamer.traffic.held_bytes == streamer.traffic.peak_bytes == sum(10 + part for part in range(parts))


@pytest.mark.parametrize("broken_off", range(5))
def test_a_step_that_is_broken_off_does_not_confuse_the_next(broken_off: int) -> None:
    streamer, mover = ring(5)
    step(streamer, 5)
    for part in range(broken_off):
        streamer.use(part, lambda linear: None)
    with pytest.raises(RuntimeError, match="in the middle"):
        streamer.use(broken_off, fail)
    step(streamer, 5)
    step(streamer, 5)
    assert mover.most <= 3
    assert streamer.traffic.held_bytes == sum(10 + part for part in mover.slots.values())
    assert sorted(mover.slots.values()) == [0, 1, 2]


def fail(linear: Linear) -> None:
    raise RuntimeError("in the middle")


def test_a_part_that_does_not_come_is_an_error_and_is_fetched_again() -> None:
    streamer, mover = ring(5)
    mover.broken = 3
    with pytest.raises(CheckpointError, match="the disk is gone"):
        step(streamer, 5)
    assert not mover.slots
    assert streamer.traffic.held_bytes == 0
    mover.broken = None
    step(streamer, 5)
    assert streamer.traffic.held_bytes == 10 + 11 + 12


def test_a_closed_ring_holds_nothing_and_says_so() -> None:
    streamer, mover = ring(5)
    step(streamer, 5)
    streamer.close()
    streamer.close()
    assert not mover.slots
    assert mover.closed == 1
    assert streamer.traffic.held_bytes == 0
    with pytest.raises(NotReadyError, match="unloaded"):
        step(streamer, 5)
