"""A load that ends early, for want of memory or because somebody asked: nothing of the half-made model stays."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from backend.checkpoint.base import Checkpoint
from backend.checkpoint.open import open_checkpoint
from backend.errors import LoadCancelled, OutOfMemoryError
from backend.events import LoadProgress
from backend.placement import load
from backend.placement.load import load_model
from backend.placement.parts import placed_bytes, ring_bytes
from backend.placement.sizes import vector_bytes, weight_bytes
from tests.forward import Session
from tests.offloading import MODES, FakeLink, parts_of
from tests.tiny import TinyModel, write_tiny

FAILURES = {
    "python": lambda: MemoryError(),
    "torch": lambda: RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 4 bytes"),
    "really": lambda: torch.empty(1 << 60, dtype=torch.uint8),  # more than any machine gives
}
LAST = 13  # products and the table of the model below


class Scarce:
    """Memory for so many of the model's matrices. Knows every tensor that was made."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, room: int, failure: Callable[[], object]) -> None:
        self.made: list[weakref.ref[torch.Tensor]] = []
        self.room, self._failure = room, failure
        for name in ("build", "values"):
            monkeypatch.setattr(load, name, self._limited(getattr(load, name)))

    def _limited(self, make: Callable) -> Callable:
        def limited(*arguments: object) -> object:
            if self.room == 0:
                error = self._failure()
                assert isinstance(error, BaseException)
                raise error
            self.room -= 1
            found = make(*arguments)
            for tensor in [found] if isinstance(found, torch.Tensor) else found.tensors():
                self.made.append(weakref.ref(tensor))
            return found

        return limited

    def alive(self) -> int:
        gc.collect()
        return sum(tensor() is not None for tensor in self.made)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return open_checkpoint(write_tiny(tmp_path / "tiny.gguf", TinyModel(n_layers=3, tied=True)))


def close_maps(checkpoint: Checkpoint) -> None:
    """Raises BufferError where somebody still has a view of the file."""
    for mapped in checkpoint._maps:  # type: ignore[attr-defined]
        mapped.bytes = torch.empty(0)
        mapped._map.close()


@pytest.mark.parametrize("room", [0, 1, 2, 7, LAST - 1])
@pytest.mark.parametrize("kind", FAILURES)
def test_no_memory_for_the_nth_matrix(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, kind: str, room: int
) -> None:
    with monkeypatch.context() as patch:
        scarce = Scarce(patch, room, FAILURES[kind])
        with pytest.raises(
            OutOfMemoryError, match=r"tiny\.gguf: there is not enough memory to load the preset"
        ) as caught:
            load_model(checkpoint, "f32", "the preset")
        error = caught.value
        assert scarce.room == 0
        assert len(scarce.made) == room
        assert scarce.alive() == 0  # though the error is still in our hands
    assert error.extra["needed_bytes"] == weight_bytes("f32", checkpoint.config, checkpoint.tensors)
    assert error.extra["free_bytes"] > 0
    assert " MB of memory, and " in error.message
    # The same checkpoint can be loaded when there is memory again, and let go when there is not.
    assert Session(checkpoint).logits([1, 2, 3]).isfinite().all()
    gc.collect()
    close_maps(checkpoint)


def test_enough_memory_is_no_error(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    scarce = Scarce(monkeypatch, LAST, FAILURES["python"])
    loaded = load_model(checkpoint, "f32", "the preset")
    assert scarce.room == 0
    assert scarce.alive() == LAST
    del loaded
    assert scarce.alive() == 0


@pytest.mark.parametrize("report", [1, 2, 9, 20])
@pytest.mark.parametrize("mode", [None, "offload-ff"])
def test_a_cancelled_load_leaves_nothing(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, mode: str | None, report: int
) -> None:
    reports: list[LoadProgress] = []

    def progress(step: LoadProgress) -> None:
        reports.append(step)
        if len(reports) == report:
            raise LoadCancelled("loading was cancelled")

    scarce = Scarce(monkeypatch, -1, FAILURES["python"])
    link = FakeLink()
    with pytest.raises(LoadCancelled) as caught:
        parts = parts_of(checkpoint, "f32", MODES[mode]) if mode else ()
        load_model(checkpoint, "f32", "the preset", progress, parts, link=link if mode else None)
    assert len(reports) == report
    assert scarce.made
    assert scarce.alive() == 0
    assert caught.traceback[-1].name == "progress"  # where it came from can still be read
    assert not link.pinned
    close_maps(checkpoint)


@pytest.mark.parametrize("buffers", [0, 1, 2])
def test_no_memory_on_the_device_for_the_ring(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, buffers: int
) -> None:
    class Full(FakeLink):
        def empty(self, nbytes: int) -> torch.Tensor:
            if len(self.allocated) == buffers:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return super().empty(nbytes)

    scarce, link = Scarce(monkeypatch, -1, FAILURES["python"]), Full()
    parts = parts_of(checkpoint, "f32", MODES["offload-all"])
    with pytest.raises(OutOfMemoryError, match="not enough memory") as caught:
        load_model(checkpoint, "f32", "the preset", parts=parts, link=link)
    needed = placed_bytes(parts, "resident") + ring_bytes(parts)
    assert caught.value.extra["needed_bytes"] == needed + vector_bytes(checkpoint.config, checkpoint.tensors)
    assert scarce.alive() == 0
    assert not link.pinned
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("weights")]


def test_what_a_streamed_model_needs_is_its_resident_part_and_the_ring(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = parts_of(checkpoint, "f32", MODES["offload-ff"])
    Scarce(monkeypatch, 3, FAILURES["torch"])
    with pytest.raises(OutOfMemoryError) as caught:
        load_model(checkpoint, "f32", "the preset", parts=parts)
    everything = weight_bytes("f32", checkpoint.config, checkpoint.tensors)
    streamed = placed_bytes(parts, "streamed")
    assert caught.value.extra["needed_bytes"] == everything - streamed + ring_bytes(parts)


def test_a_defect_is_not_taken_for_want_of_memory(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    scarce = Scarce(monkeypatch, 4, lambda: RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        load_model(checkpoint, "f32", "the preset")
    assert scarce.alive() == 0
