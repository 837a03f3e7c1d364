"""The one door, on tiny models: switching, failing, stopping, many people at once."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from backend.errors import BusyError, CheckpointError, ContextLengthError, NotReadyError, PresetError, UserError
from backend.events import LoadProgress
from backend.params import GenerationParams
from backend.service import Service
from backend.settings import Settings
from backend.text.messages import Message
from tests.real import read
from tests.tiny import TinyModel, write_tiny

LONG = GenerationParams(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, max_tokens=0, seed=3)
SHORT = GenerationParams(temperature=0, max_tokens=5)


@pytest.fixture
def folder(tmp_path: Path) -> Settings:
    """Two good presets and three bad ones."""
    presets = tmp_path / "presets"
    presets.mkdir()
    for name, seed in (("one", 1), ("two", 2)):
        path = write_tiny(tmp_path / f"{name}.gguf", TinyModel(seed=seed))
        (presets / f"{name}.yaml").write_text(f'title: "Model {name}"\nmodel: {path}\ncontext: 256\n')
    good = (tmp_path / "one.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(good[:-100])
    (presets / "cut.yaml").write_text(f"model: {tmp_path / 'cut.gguf'}\n")
    (presets / "gone.yaml").write_text("model: nowhere.gguf\n")
    (presets / "typo.yaml").write_text("model: starter\nwieghts: bf16\n")
    return Settings(presets_dir=presets, models_dir=tmp_path / "models", data_dir=tmp_path / "data")


@pytest.fixture
def service(folder: Settings):
    service = Service(folder)
    yield service
    service.close()


def wait_until(condition, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "this did not become true in time"
        time.sleep(0.005)


def test_before_anything_is_loaded(service):
    assert service.status().state == "empty"
    with pytest.raises(NotReadyError):
        service.chat([Message("user", "hi")], SHORT)


def test_load_answer_and_report(service):
    steps: list[LoadProgress] = []
    service.load("one", steps.append)
    status = service.status()
    assert (status.state, status.preset, status.title, status.context) == ("ready", "one", "Model one", 256)
    assert [step.done for step in steps] == sorted(step.done for step in steps)
    assert steps[-1].done == steps[-1].total > 0
    text, ids, last = read(service.complete("abc", SHORT))
    assert last.finish_reason in ("length", "stop")
    assert last.stats.completion_tokens == len(ids) <= 5
    rows = {info.name: info for info in service.presets()}
    assert rows["one"].loaded
    assert not rows["two"].loaded
    assert rows["two"].needs.endswith("of memory")
    assert "wieghts" in rows["typo"].error
    assert "did you mean 'weights'" in rows["typo"].error


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("cut", CheckpointError, "incomplete or damaged"),
        ("gone", PresetError, "nowhere.gguf"),
        ("typo", PresetError, "wieghts"),
        ("onne", PresetError, "did you mean 'one'"),
    ],
)
def test_a_failed_load_keeps_what_was_there(service, name, kind, words):
    service.load("one")
    _, before, _ = read(service.complete("abc", SHORT))
    with pytest.raises(kind, match=words):
        service.load(name)
    status = service.status()
    assert (status.state, status.preset, status.loading) == ("ready", "one", None)
    assert words in status.error
    assert read(service.complete("abc", SHORT))[1] == before


def test_a_switch_lets_running_replies_finish(service):
    service.load("one")
    expected = read(service.complete("abc", LONG))[1]
    running = service.complete("abc", LONG)
    service.load("two")
    assert service.status().preset == "two"
    assert read(running)[1] == expected  # written to its end by the model that began it
    wait_until(lambda: not any(thread.name == "drain" for thread in threading.enumerate()))


def test_two_people_load_at_once(service, monkeypatch):
    service.load("one")
    inside, go_on = threading.Event(), threading.Event()
    prepare = service.prepare

    def slow(preset, progress):
        inside.set()
        assert go_on.wait(10)
        return prepare(preset, progress)

    monkeypatch.setattr(service, "prepare", slow)
    first = threading.Thread(target=service.load, args=("two",))
    first.start()
    assert inside.wait(10)
    assert service.status().loading_preset == "two"
    with pytest.raises(BusyError, match="'two' is being loaded"):
        service.load("one", wait=False)
    assert read(service.complete("abc", SHORT))[2].finish_reason  # chat goes on meanwhile
    go_on.set()
    first.join()
    assert service.status().preset == "two"


def test_cancelled_replies_leak_nothing(service):
    service.load("one")
    runtime = service.runtime()
    read(service.complete("warm", SHORT))
    threads = threading.active_count()
    for number in range(50):
        generation = service.complete(f"chat {number} " * 5, LONG)
        if number % 3:
            wait_until(lambda: generation.stats.completion_tokens > number % 7 or generation.finished)
        generation.stop()
    wait_until(lambda: service.status().running == service.status().waiting == 0)
    assert runtime.blocks.in_use == 0
    assert runtime.blocks.free + runtime.blocks.cached == runtime.blocks.n_blocks
    assert threading.active_count() == threads


def test_stop_takes_effect_within_one_step(service):
    service.load("one")
    runtime = service.runtime()
    generation = service.complete("abc", LONG)
    wait_until(lambda: generation.stats.completion_tokens >= 3)
    generation.stop()
    steps = runtime.runner.steps
    _, _, last = read(generation)
    if last.finish_reason == "cancelled":
        assert runtime.runner.steps - steps <= 1
    assert last.finish_reason in ("cancelled", "length", "stop")


def test_replies_interleave(service):
    service.load("one")
    order: list[str] = []
    first, second = (service.complete(text, LONG) for text in ("abc", "xyz"))

    def follow(generation, name):
        for _ in generation:
            order.append(name)

    threads = [threading.Thread(target=follow, args=(g, n)) for g, n in ((first, "a"), (second, "b"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(1 for x, y in zip(order, order[1:]) if x != y) > 4


def test_too_long_a_prompt_is_refused_with_both_counts(service):
    service.load("one")
    with pytest.raises(ContextLengthError) as caught:
        service.complete([5] * 256, SHORT)
    assert caught.value.extra == {"n_prompt_tokens": 256, "n_ctx": 256}
    _, ids, last = read(service.complete([5] * 255, GenerationParams(temperature=0, max_tokens=0)))
    assert len(ids) == 1  # the last place of the context
    assert last.finish_reason in ("length", "stop")


def test_bad_ids_and_empty_prompts(service):
    service.load("one")
    with pytest.raises(UserError, match="token id 999999"):
        service.complete([999999], SHORT)
    assert read(service.complete("", SHORT))[2].finish_reason


def test_seeds(service):
    service.load("one")
    text = [read(service.complete("abc", LONG))[1] for _ in range(2)]
    assert text[0] == text[1]
    other = read(service.complete("abc", GenerationParams.from_mapping({"seed": 4}, LONG)))[1]
    assert other != text[0]


def test_nan_ends_that_reply_only(service):
    service.load("one")
    runtime = service.runtime()
    run = runtime.runner.run
    healthy = service.complete("abc", LONG)
    sick = service.complete("xyz", LONG)

    def poisoned(work):
        logits = run(work).clone()
        rows = [item.request for item in work for _ in range(item.logit_rows)]
        for row, request in enumerate(rows):
            if request.id == sick.id and request.completion_tokens >= 2:
                logits[row, 3] = float("nan")
        return logits

    runtime.runner.run = poisoned
    _, _, last = read(sick)
    assert last.finish_reason == "error"
    assert last.error.code == "numerical_error"
    assert read(healthy)[2].finish_reason in ("length", "stop")
    assert runtime.blocks.in_use == 0


def test_an_engine_failure_reaches_every_reader_and_the_next_request_works(service):
    service.load("one")
    runtime = service.runtime()
    run, calls = runtime.runner.run, []

    def failing(work):
        calls.append(len(work))
        if len(calls) == 5:
            raise RuntimeError("out of something")
        return run(work)

    runtime.runner.run = failing
    replies = [service.complete(text, LONG) for text in ("abc", "xyz")]
    ends = [read(generation)[2] for generation in replies]
    assert any(end.finish_reason == "error" and end.error.code == "engine_error" for end in ends)
    assert read(service.complete("abc", SHORT))[2].finish_reason in ("length", "stop")
    assert runtime.blocks.in_use == 0


def test_closing_ends_what_runs(folder):
    service = Service(folder)
    service.load("one")
    generation = service.complete("abc", LONG)
    service.close()
    assert read(generation)[2].finish_reason in ("error", "length", "stop")
    assert service.status().state == "stopped"
    with pytest.raises(NotReadyError):
        service.complete("abc", SHORT)


def test_too_many_waiting_are_refused(folder):
    service = Service(Settings(**{**folder.__dict__, "max_waiting": 2}))
    service.load("one")
    with pytest.raises(BusyError):
        for _ in range(200):
            service.complete("abc", LONG)
    service.close()
