"""Errands for the engine's thread: done between two steps, and what goes wrong is the asker's alone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from backend.cache.kv import KVPool
from backend.engine.worker import Worker
from backend.errors import UnloadingError
from backend.params import GenerationParams
from backend.presets import Preset
from backend.runtime import Prepared, Runtime
from tests.real import read


@pytest.fixture
def runtime(tiny_path: Callable[..., Path]) -> Runtime:
    path = tiny_path(weights="Q4_1")
    return Runtime(Prepared(Preset("errands", str(path)), path), max_waiting=8)


def test_errands_are_done_by_the_engines_thread_while_somebody_is_answered(runtime: Runtime) -> None:
    reply = runtime.start_text("abc", GenerationParams(max_tokens=100, temperature=0, ignore_eos=True))
    names = [runtime.worker.ask(lambda: threading.current_thread().name) for _ in range(5)]
    assert names == ["engine"] * 5
    with pytest.raises(ZeroDivisionError):
        runtime.worker.ask(lambda: 1 // 0)
    assert len(read(reply)[1]) == 100
    assert runtime.worker.ask(lambda: 7) == 7, "also while it sleeps"
    runtime.close(drain=False)
    with pytest.raises(UnloadingError):
        runtime.worker.ask(lambda: 7)


def test_what_is_done_meanwhile_waits_for_nobody_and_ends(tiny_path: Callable[..., Path]) -> None:
    path = tiny_path(weights="Q4_1")
    runtime = Runtime(Prepared(Preset("meanwhile", str(path)), path), max_waiting=8)
    runtime.worker.close(drain=False)
    done: list[str] = []
    asked, ended = threading.Event(), threading.Event()

    def meanwhile() -> bool:
        assert runtime.engine.idle
        assert threading.current_thread().name == "engine"
        done.append("some")
        asked.wait(5)
        if len(done) > 4:
            ended.set()
        return len(done) < 5

    runtime.worker = Worker(runtime.engine, 8, meanwhile)
    reply = runtime.start_text("abc", GenerationParams(max_tokens=9, temperature=0, ignore_eos=True))
    asked.set()
    assert len(read(reply)[1]) == 9
    assert ended.wait(5)
    assert runtime.worker.ask(lambda: len(done)) == 5, "after that it is left alone"
    runtime.close(drain=False)


@pytest.mark.parametrize("free", [0, 1 << 40])
def test_the_whole_cache_is_taken_meanwhile_where_there_is_plenty(
    tiny_path: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, free: int
) -> None:
    taken = threading.Event()

    def take_ahead(pool: KVPool, populate: object) -> bool:
        taken.set()
        return False

    monkeypatch.setattr(KVPool, "take_ahead", take_ahead)
    monkeypatch.setattr("backend.runtime.free_bytes", lambda device: free)
    path = tiny_path(weights="Q4_1")
    runtime = Runtime(Prepared(Preset("plenty", str(path)), path), max_waiting=8)
    assert taken.wait(5 if free else 0.2) == bool(free)
    runtime.close(drain=False)
