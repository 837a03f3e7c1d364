"""Switching models: beside each other or one after the other, always whole, in order, and called off at any point."""

from __future__ import annotations

import gc
import time
import weakref
from pathlib import Path

import pytest
import torch

import backend.runtime
import backend.switch
from backend.errors import BusyError, CheckpointError, LoadCancelled, NotReadyError, OutOfMemoryError
from backend.generation import Generation
from backend.params import GenerationParams
from backend.service import Service
from backend.settings import Settings
from backend.text.messages import Message
from tests.real import read
from tests.switching import Gate, Loading, three_models, wait_until

LONG = GenerationParams(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, max_tokens=0, seed=3)
SHORT = GenerationParams(temperature=0, max_tokens=5)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return three_models(tmp_path)


@pytest.fixture
def service(settings: Settings):
    service = Service(settings)
    yield service
    service.close()


@pytest.fixture
def gate(monkeypatch) -> Gate:
    gate = Gate()
    monkeypatch.setattr(backend.runtime, "load_model", gate.load_model)
    return gate


@pytest.fixture
def short_of_memory(monkeypatch) -> None:
    """Two models never fit beside each other."""
    monkeypatch.setattr(backend.switch, "fits", lambda *_: "after-unload")


def answer(service: Service) -> list[int]:
    return read(service.complete("abc", SHORT))[1]


def answers(service: Service) -> dict[str, list[int]]:
    """What each model says to the same words; the last one stays loaded."""
    said = {}
    for name in ("three", "two", "one"):
        service.load(name)
        said[name] = answer(service)
    assert len({tuple(ids) for ids in said.values()}) == 3
    return said


def weights_of(service: Service) -> weakref.ref[torch.Tensor]:
    return weakref.ref(service.runtime().runner.model.layers[0].attention_norm)


# one in the place of the other ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("short_of_memory")
def test_requests_wait_in_the_gap_and_are_answered_by_the_new_model(service, gate):
    said = answers(service)
    old = weights_of(service)
    gate.shut("two")
    load = Loading(service, "two")
    assert gate.arrived["two"].wait(10)
    gc.collect()
    assert old() is None  # its memory is back before the new one takes any
    status = service.status()
    assert (status.state, status.preset, status.loading_preset) == ("loading", None, "two")
    waiting = [service.complete("abc", SHORT), service.chat([Message("user", "hello")], SHORT)]
    assert [generation.stats.people_ahead for generation in waiting] == [0, 1]
    assert [(generation.stats.phase, generation.prompt_ids) for generation in waiting] == [("queued", ())] * 2
    assert service.status().waiting == 2
    gate.open["two"].set()
    assert load.ended() is None
    assert read(waiting[0])[1] == said["two"]
    assert waiting[0].model == "two"
    assert read(waiting[1])[2].finish_reason in ("length", "stop")
    assert waiting[1].prompt_ids
    assert service.status().waiting == 0


@pytest.mark.usefixtures("short_of_memory")
def test_running_replies_are_finished_first(service):
    service.load("two")
    service.load("one")
    whole = read(service.complete("abc", LONG))[1]
    runtime = service.runtime()
    run = runtime.runner.run
    runtime.runner.run = lambda work: (time.sleep(0.02), run(work))[1]  # still running when the load begins
    del runtime
    running = service.complete("abc", LONG)
    load = Loading(service, "two")
    assert read(running)[1] == whole
    assert load.ended() is None
    assert service.status().preset == "two"
    assert any("to finish" in step.stage for step in load.steps)


@pytest.mark.usefixtures("short_of_memory")
def test_a_reply_that_takes_too_long_is_stopped_and_told(settings):
    service = Service(Settings(**{**settings.__dict__, "drain_seconds": 0.2}))
    service.load("one")
    runtime = service.runtime()
    run = runtime.runner.run
    runtime.runner.run = lambda work: (time.sleep(0.05), run(work))[1]
    del runtime
    running = service.complete("abc", LONG)
    service.load("two")
    text, ids, last = read(running)
    assert last.finish_reason == "error"
    assert "another preset is being loaded" in last.error.message
    assert 0 < len(ids) < 200
    assert answer(service)
    service.close()


@pytest.mark.usefixtures("short_of_memory")
def test_a_failure_after_unloading_brings_the_old_model_back(service, gate):
    said = answers(service)
    gate.shut("two")
    gate.failures["two"] = [CheckpointError("two.gguf: byte 7 is wrong")]
    load = Loading(service, "two")
    assert gate.arrived["two"].wait(10)
    waiting = service.complete("abc", SHORT)
    gate.open["two"].set()
    failure = load.ended()
    assert isinstance(failure, CheckpointError)
    assert failure.message == "two.gguf: byte 7 is wrong"
    assert read(waiting)[1] == said["one"]
    status = service.status()
    assert (status.state, status.preset, status.error) == ("ready", "one", failure.message)
    assert gate.loads[-2:] == ["two", "one"]
    assert load.steps[-1].stage == "Loading one again"


@pytest.mark.usefixtures("short_of_memory")
def test_when_even_that_fails_everybody_reads_both_reasons(service, gate):
    said = answers(service)
    gate.shut("two")
    gate.failures = {"two": [CheckpointError("two is damaged")], "one": [CheckpointError("one is gone")]}
    load = Loading(service, "two")
    assert gate.arrived["two"].wait(10)
    waiting = service.complete("abc", SHORT)
    gate.open["two"].set()
    failure = load.ended()
    assert "two is damaged" in str(failure)
    assert "one is gone" in str(failure)
    last = read(waiting)[2]
    assert (last.finish_reason, type(last.error)) == ("error", NotReadyError)
    assert "two is damaged" in last.error.message
    assert service.status().state == "failed"
    with pytest.raises(NotReadyError):
        service.complete("abc", SHORT)
    service.load("one")
    assert answer(service) == said["one"]


def test_what_never_fits_is_refused_before_anything_is_touched(service, monkeypatch):
    service.load("one")
    runtime = service.runtime()
    monkeypatch.setattr(backend.switch, "fits", lambda *_: "no")
    monkeypatch.setattr(service._switch, "_suggest", lambda *_: "three")
    with pytest.raises(OutOfMemoryError, match=r"two needs .* of memory, .* are free; preset 'three' fits") as caught:
        service.load("two")
    assert {"needed_bytes", "free_bytes"} <= set(caught.value.extra)
    assert service.runtime() is runtime
    assert answer(service)


# memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried"),
        torch.OutOfMemoryError("CUDA out of memory."),
    ],
    ids=["MemoryError", "CPU", "CUDA"],
)
def test_memory_that_runs_out_beside_the_old_model_is_tried_again_in_its_place(service, gate, error):
    said = answers(service)
    gate.failures["two"] = [error]
    service.load("two")
    assert answer(service) == said["two"]
    assert gate.loads[-2:] == ["two", "two"]


@pytest.mark.usefixtures("short_of_memory")
def test_memory_that_runs_out_for_good_is_said_in_numbers(service, gate):
    service.load("one")
    gate.failures["two"] = [MemoryError()]
    with pytest.raises(
        OutOfMemoryError, match=r"memory ran out while .*two.*needs .* free; preset '\w+' fits"
    ) as caught:
        service.load("two")
    assert caught.value.extra["free_bytes"] > 0
    assert service.status().preset == "one"
    assert answer(service)


def test_nothing_of_a_failed_load_is_kept(service, gate, monkeypatch):
    """An exception holds the frames it went through, and these hold half a model."""
    kept: list[weakref.ref[torch.Tensor]] = []

    def failing(*_):
        half = torch.zeros(1000)
        kept.append(weakref.ref(half))
        raise CheckpointError("half of it was read")

    monkeypatch.setattr(backend.runtime, "load_model", failing)
    with pytest.raises(CheckpointError) as caught:
        service.load("one")
    assert caught.value.message == "half of it was read"
    assert kept[0]() is None


# calling off ------------------------------------------------------------------------------------------------------


def test_cancel_while_loading_beside(service, gate):
    service.load("one")
    runtime = service.runtime()
    gate.shut("two")
    load = Loading(service, "two")
    assert gate.arrived["two"].wait(10)
    assert service.cancel_load()
    assert isinstance(load.ended(), LoadCancelled)
    assert service.runtime() is runtime
    assert service.status().error is None
    assert not service.cancel_load()


@pytest.mark.usefixtures("short_of_memory")
def test_cancel_while_loading_in_the_place_of_the_old_model(service, gate):
    said = answers(service)
    gate.shut("two")
    load = Loading(service, "two")
    assert gate.arrived["two"].wait(10)
    waiting = service.complete("abc", SHORT)
    assert service.cancel_load("two")
    assert isinstance(load.ended(), LoadCancelled)
    assert read(waiting)[1] == said["one"]
    assert service.status().preset == "one"


@pytest.mark.usefixtures("short_of_memory")
def test_cancel_while_replies_are_finished_unloads_nothing(service):
    service.load("one")
    runtime = service.runtime()
    run = runtime.runner.run
    runtime.runner.run = lambda work: (time.sleep(0.02), run(work))[1]
    running = service.complete("abc", LONG)
    load = Loading(service, "two")
    wait_until(lambda: any("to finish" in step.stage for step in load.steps))
    waiting = service.complete("xyz", SHORT)
    service.cancel_load()
    assert isinstance(load.ended(), LoadCancelled)
    assert service.runtime() is runtime
    assert read(waiting)[2].finish_reason in ("length", "stop")
    running.stop()
    read(running)


@pytest.mark.usefixtures("short_of_memory")
def test_a_waiting_request_can_be_stopped_and_the_line_is_bounded(service, gate):
    service.load("one")
    gate.shut("two")
    load = Loading(service, "two")
    assert gate.arrived["two"].wait(10)
    waiting = [service.complete("abc", SHORT) for _ in range(3)]
    with pytest.raises(BusyError, match="3 requests are waiting"):
        service.complete("abc", SHORT)
    waiting[0].stop()
    last = read(waiting[0])[2]
    assert (last.finish_reason, last.stats.completion_tokens) == ("cancelled", 0)
    assert [generation.stats.people_ahead for generation in waiting[1:]] == [0, 1]
    gate.open["two"].set()
    assert load.ended() is None
    assert all(read(generation)[2].finish_reason in ("length", "stop") for generation in waiting[1:])


@pytest.mark.usefixtures("short_of_memory")
def test_a_request_that_does_not_fit_the_new_model_ends_with_the_reason(service, gate):
    service.load("one")
    gate.shut("two")
    load = Loading(service, "two")
    assert gate.arrived["two"].wait(10)
    waiting = service.complete([5] * 256, SHORT)
    gate.open["two"].set()
    assert load.ended() is None
    last = read(waiting)[2]
    assert (last.finish_reason, last.error.code) == ("error", "context_length_exceeded")


@pytest.mark.usefixtures("short_of_memory")
def test_closing_in_the_gap_ends_everything(settings, gate):
    service = Service(settings)
    service.load("one")
    gate.shut("two")
    load = Loading(service, "two")
    assert gate.arrived["two"].wait(10)
    waiting = service.complete("abc", SHORT)
    service.close()
    assert read(waiting)[2].finish_reason == "error"
    assert load.ended() is not None
    assert service.status().state == "stopped"
    with pytest.raises(NotReadyError):
        service.load("one")


# order ------------------------------------------------------------------------------------------------------------


def test_loads_are_carried_out_in_order_and_the_second_person_is_told(service, gate):
    service.load("one")
    gate.shut("two")
    first = Loading(service, "two")
    assert gate.arrived["two"].wait(10)
    second = Loading(service, "three")
    wait_until(lambda: second.steps)
    assert second.steps[0].stage == "'two' is being loaded by someone; yours ('three') is next"
    third = Loading(service, "one")
    wait_until(lambda: third.steps)
    assert third.steps[0].stage == "'two' is being loaded by someone; yours ('one') comes after 1 more"
    status = service.status()
    assert (status.loading_preset, status.next_presets) == ("two", ("three", "one"))
    assert answer(service)  # by what is loaded
    with pytest.raises(BusyError, match="'two' is being loaded"):
        service.load("three", wait=False)
    gate.open["two"].set()
    assert [load.ended() for load in (first, second, third)] == [None] * 3
    assert gate.loads == ["one", "two", "three", "one"]
    assert service.status().preset == "one"
    assert service.status().next_presets == ()


def test_a_load_that_waits_can_be_cancelled(service, gate):
    service.load("one")
    gate.shut("two")
    first = Loading(service, "two")
    assert gate.arrived["two"].wait(10)
    second = Loading(service, "three")
    wait_until(lambda: second.steps)
    assert service.cancel_load("three")
    assert isinstance(second.ended(), LoadCancelled)
    gate.open["two"].set()
    assert first.ended() is None
    assert gate.loads == ["one", "two"]


def test_what_answers_already_is_not_loaded_again(service, gate, settings):
    service.load("one")
    runtime = service.runtime()
    service.load("one")
    assert service.runtime() is runtime
    path = settings.presets_dir / "one.yaml"
    path.write_text(path.read_text() + "weights: f32\n")  # the same name, but another preset
    service.load("one")
    assert service.runtime() is not runtime
    assert gate.loads == ["one", "one"]


def test_status_tells_what_is_left(service):
    service.load("one")
    status = service.status()
    assert (status.device, status.cache_tokens, status.cache_free_tokens) == ("cpu", 576, 576)
    assert status.kv_used_bytes == 0 < status.kv_bytes
    assert status.free_bytes > 1 << 20
    assert status.predicted_bytes >= status.weight_bytes
    runtime = service.runtime()
    run = runtime.runner.run
    runtime.runner.run = lambda work: (time.sleep(0.02), run(work))[1]
    running: Generation = service.complete([5] * 40, LONG)
    wait_until(lambda: running.stats.completion_tokens > 0)
    status = service.status()
    assert status.cache_free_tokens <= 576 - 64
    assert 0 < status.kv_used_bytes < status.kv_bytes
    running.stop()
    read(running)
