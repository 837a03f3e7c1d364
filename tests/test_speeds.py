"""The speeds of a machine, measured in the background: nobody waits, nothing is disturbed, it ends in order."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from backend import calibration
from backend.placement.machine import Machine, Rates
from backend.service import Service
from backend.settings import Settings
from backend.speeds import Speeds
from tests.tiny import TinyModel, write_tiny

KNOWN = Machine(cores=2, rates=Rates(2e10, {"bf16": 1e10}, 1e-4), conversion={"bf16": 1e9}, disk=1e9)


class Measuring:
    """Stands in for the measurements: two pieces with a pause between, the second when the test lets it go."""

    def __init__(self) -> None:
        self.pieces, self.go_on = 0, threading.Event()
        self.broken: Exception | None = None

    def __call__(self, pause: calibration.Pause) -> Machine:
        pause()
        self.pieces = 1
        while not self.go_on.wait(0.001):
            pause()
        if self.broken is not None:
            raise self.broken
        pause()
        self.pieces = 2
        return KNOWN


@pytest.fixture
def measuring(monkeypatch: pytest.MonkeyPatch) -> Iterator[Measuring]:
    measuring, before = Measuring(), set(threading.enumerate())
    monkeypatch.setattr(calibration, "kept", lambda: None)
    monkeypatch.setattr(calibration, "measured", measuring)
    yield measuring
    assert not [thread for thread in threading.enumerate() if thread.name == "measure" and thread not in before]


def wait_until(condition) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "this did not become true in time"
        time.sleep(0.001)


def test_nobody_waits_for_speeds(measuring: Measuring) -> None:
    speeds = Speeds(lambda: False)
    first = speeds.now()
    assert (first.rates, first.ram_total > first.ram_free > 0, first.process_bytes > 0) == (Rates(), True, True)
    wait_until(lambda: measuring.pieces == 1)
    assert speeds.now().rates == Rates()
    measuring.go_on.set()
    wait_until(lambda: speeds.now().rates == KNOWN.rates)
    assert speeds.now().ram_free > 0
    speeds.close()


def test_it_rests_while_somebody_is_answered(measuring: Measuring) -> None:
    busy = True
    speeds = Speeds(lambda: busy)
    speeds.start()
    time.sleep(0.1)
    assert measuring.pieces == 0
    busy = False
    wait_until(lambda: measuring.pieces == 1)
    speeds.close()


@pytest.mark.parametrize("busy", [True, False])
def test_it_ends_when_the_server_closes(measuring: Measuring, busy: bool) -> None:
    speeds = Speeds(lambda: busy)
    speeds.start()
    speeds.close()
    assert measuring.pieces < 2
    speeds.start()  # and does not begin again
    assert speeds.now().rates == Rates()
    speeds.close()


def test_what_an_earlier_start_measured_is_there_at_once(measuring: Measuring, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "kept", lambda: KNOWN)
    speeds = Speeds(lambda: True)
    assert speeds.now().rates == KNOWN.rates
    speeds.close()
    assert measuring.pieces == 0


def test_a_failure_is_in_the_log_and_nothing_else(measuring: Measuring, caplog: pytest.LogCaptureFixture) -> None:
    measuring.broken = RuntimeError("no such thing")
    measuring.go_on.set()
    speeds = Speeds(lambda: False)
    with caplog.at_level(logging.ERROR):
        speeds.start()
        wait_until(lambda: "could not be measured" in caplog.text)
    assert speeds.now().rates == Rates()
    speeds.close()


def test_a_load_waits_only_where_there_is_a_choice(measuring: Measuring, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    speeds = Speeds(lambda: True)
    assert speeds.for_a_load().rates == Rates()
    assert measuring.pieces == 0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    measuring.go_on.set()
    assert speeds.for_a_load().rates == KNOWN.rates  # although the load itself makes it busy
    speeds.close()


def test_presets_get_their_speeds_when_they_are_there(tmp_path: Path) -> None:
    write_tiny(tmp_path / "one.gguf", TinyModel())
    (tmp_path / "one.yaml").write_text("model: one.gguf\ndevice: cpu\n")
    memory = dataclasses.replace(KNOWN, rates=Rates(), ram_total=1 << 34, ram_free=1 << 33)
    machine = memory
    service = Service(Settings(presets_dir=tmp_path, models_dir=tmp_path, data_dir=tmp_path), machine=lambda: machine)
    assert [row.tokens_per_second for row in service.presets()] == [None]
    machine = dataclasses.replace(memory, rates=KNOWN.rates)
    assert (service.presets()[0].tokens_per_second or 0) > 1
    service.close()
