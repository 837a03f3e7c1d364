"""For tests of switching: three small models, a gate in the way of loading, and a load in a thread of its own."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import torch

from backend.events import LoadProgress
from backend.placement.load import load_model
from backend.service import Service
from backend.settings import Settings
from tests.tiny import TinyModel, write_tiny


def three_models(folder: Path) -> Settings:
    """Presets `one`, `two` and `three`, whose models say different things; at most 3 requests may wait."""
    presets = folder / "presets"
    presets.mkdir()
    for name, seed in (("one", 1), ("two", 2), ("three", 3)):
        path = write_tiny(folder / f"{name}.gguf", TinyModel(seed=seed))
        (presets / f"{name}.yaml").write_text(f"title: {name}\nmodel: {path}\ncontext: 256\n")
    return Settings(presets_dir=presets, models_dir=folder / "models", data_dir=folder / "data", max_waiting=3)


class Gate:
    """Stands in the way of loading: a load of a model waits here until it is let through, or fails as told."""

    def __init__(self) -> None:
        self.arrived: dict[str, threading.Event] = {}
        self.open: dict[str, threading.Event] = {}
        self.failures: dict[str, list[Exception]] = {}
        self.loads: list[str] = []

    def shut(self, label: str) -> None:
        self.arrived[label], self.open[label] = threading.Event(), threading.Event()

    def load_model(self, checkpoint, weights, label, progress, *rest):
        self.loads.append(label)
        if label in self.open:
            self.arrived[label].set()
            while not self.open[label].wait(0.01):
                progress(LoadProgress(f"Loading {label}", 1, 100))
        if self.failures.get(label):
            half = torch.zeros(1000)  # noqa: F841 - what a failed load would keep alive through its frame
            raise self.failures[label].pop(0)
        return load_model(checkpoint, weights, label, progress, *rest)


class Loading(threading.Thread):
    """A load in a thread of its own, as the page and the API do it; `failure` is how it ended."""

    def __init__(self, service: Service, name: str) -> None:
        super().__init__(daemon=True)
        self.service, self.preset, self.failure = service, name, None
        self.steps: list[LoadProgress] = []
        self.start()

    def run(self) -> None:
        try:
            self.service.load(self.preset, self.steps.append)
        except Exception as error:
            self.failure = error

    def ended(self) -> Exception | None:
        self.join(20)
        assert not self.is_alive()
        return self.failure


def wait_until(condition, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "this did not become true in time"
        time.sleep(0.005)
