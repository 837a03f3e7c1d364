"""SIGTERM and Ctrl-C: no new requests, running replies to their end, exit code 0; a second one waits no longer."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from backend.errors import NotReadyError
from backend.params import GenerationParams
from backend.service import Service
from backend.settings import PROJECT, Settings
from tests.api_server import wait_for
from tests.real import read
from tests.tiny import TinyModel, write_tiny

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="not run: signals are those of POSIX")

SLOW = GenerationParams(temperature=1.0, max_tokens=30, seed=1, ignore_eos=True, max_tokens_per_second=20.0)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    presets = tmp_path / "presets"
    presets.mkdir()
    path = write_tiny(tmp_path / "one.gguf", TinyModel())
    (presets / "one.yaml").write_text(f"model: {path}\ncontext: 256\n")
    return Settings(presets_dir=presets, models_dir=tmp_path / "models", data_dir=tmp_path / "data", drain_seconds=20)


def test_a_service_finishes_what_was_asked_and_takes_no_more(settings: Settings) -> None:
    service = Service(settings)
    service.load("one")
    running = service.complete("abc", SLOW)
    draining = threading.Thread(target=service.drain)
    draining.start()
    wait_for(lambda: service.status().state == "stopped")
    with pytest.raises(NotReadyError, match="being stopped"):
        service.complete("abc", SLOW)
    wait_for(lambda: service.status().running == 1)  # the engine's thread may not have taken it yet
    assert read(running)[2].finish_reason == "length"
    draining.join(5)
    assert not draining.is_alive()
    service.close()


def test_closing_ends_a_drain(settings: Settings) -> None:
    service = Service(settings)
    service.load("one")
    running = service.complete("abc", SLOW)
    draining = threading.Thread(target=service.drain)
    draining.start()
    wait_for(lambda: service.status().state == "stopped")
    service.close()
    draining.join(2)
    assert not draining.is_alive()
    last = read(running)[2]
    assert (last.finish_reason, last.error.status) == ("error", 503)


def test_a_drain_has_an_end(settings: Settings) -> None:
    service = Service(Settings(**{**settings.__dict__, "drain_seconds": 0.2}))
    service.load("one")
    running = service.complete("abc", SLOW)
    service.drain()
    assert not running.finished
    service.close()
    assert running.finished


@pytest.fixture
def server(settings: Settings) -> Iterator[tuple[subprocess.Popen[str], int]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ["--port", str(port), "--preset", "one", "--api-only", "--drain-seconds", "20"]
    folders = ["--presets-dir", str(settings.presets_dir), "--data-dir", str(settings.data_dir)]
    process = subprocess.Popen(
        [sys.executable, "webui.py", *flags, *folders], cwd=PROJECT, stderr=subprocess.PIPE, text=True
    )
    try:
        wait_for(lambda: _answers(port), 60)
        yield process, port
    finally:
        process.kill()
        process.wait()


def _answers(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
    except httpx.TransportError:
        return False


class Reader(threading.Thread):
    """Streams one slow reply and keeps its events."""

    def __init__(self, port: int, tokens: int) -> None:
        super().__init__(daemon=True)
        self.port, self.tokens, self.events = port, tokens, list[str]()
        self.start()

    def run(self) -> None:
        body = {"prompt": "abc", "stream": True, "max_tokens": self.tokens, "ignore_eos": True, "temperature": 1,
                "seed": 1, "max_tokens_per_second": 20}  # fmt: skip
        with httpx.stream("POST", f"http://127.0.0.1:{self.port}/v1/completions", json=body, timeout=60) as answer:
            for line in answer.iter_lines():
                self.events += [line[6:]] if line.startswith("data: ") else []


def test_a_signal_lets_a_reply_come_to_its_end(server: tuple[subprocess.Popen[str], int]) -> None:
    process, port = server
    reader = Reader(port, 50)
    wait_for(lambda: len(reader.events) > 2, 20)
    process.send_signal(signal.SIGTERM)
    wait_for(lambda: not _answers(port))
    refused = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json={"prompt": "abc"})
    assert refused.status_code == 503
    assert refused.headers["retry-after"]
    assert process.wait(30) == 0
    reader.join(5)
    assert reader.events[-1] == "[DONE]"
    assert [json.loads(event)["choices"][0]["finish_reason"] for event in reader.events[:-1]][-1] == "length"
    assert process.stderr is not None
    assert "up to 20 s for running replies" in process.stderr.read()


def test_a_second_signal_waits_no_longer(server: tuple[subprocess.Popen[str], int]) -> None:
    process, port = server
    reader = Reader(port, 200)  # ten seconds
    wait_for(lambda: len(reader.events) > 2, 20)
    process.send_signal(signal.SIGINT)
    wait_for(lambda: not _answers(port))
    process.send_signal(signal.SIGINT)
    begin = time.monotonic()
    assert process.wait(8) == 0
    assert time.monotonic() - begin < 8
    reader.join(5)
    assert not reader.is_alive()
