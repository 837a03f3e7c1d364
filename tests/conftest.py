"""What all tests share: the starter model, fetched when it is missing, and tiny models made on the spot."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub.constants
import huggingface_hub.file_download
import pytest
from gguf import GGUFReader

from backend.models import ModelFolder
from backend.settings import PROJECT, Settings
from tests.hub_server import HubServer
from tests.hubfiles import BIG, FILES
from tests.tiny import TinyModel, write_tiny


@pytest.fixture(scope="session")
def starter_path() -> Path:
    """The starter model's file."""
    return ModelFolder(Settings().models_dir).resolve("starter", PROJECT)


@pytest.fixture(scope="session")
def starter_reader(starter_path: Path) -> GGUFReader:
    """The starter model as the `gguf` package reads it: an independent source, and slow to open."""
    return GGUFReader(starter_path)


@pytest.fixture
def tiny_path(tmp_path: Path) -> Callable[..., Path]:
    """`tiny_path(weights="Q4_1", tied=False)` writes such a model and returns its file."""

    def write(**options: object) -> Path:
        return write_tiny(tmp_path / "tiny.gguf", TinyModel(**options))  # type: ignore[arg-type]

    return write


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub on this machine with two repositories: a folder of safetensors, and two GGUF files."""
    with HubServer({"org/llama": FILES, "org/gguf": {"m.Q8_0.gguf": BIG, "m.Q2_K.gguf": b"small"}}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        # The library waits a second between its attempts, and writes ten megabytes at a time.
        clock = type("Clock", (), {"sleep": staticmethod(lambda _: None)})
        monkeypatch.setattr(huggingface_hub.file_download, "time", clock)
        monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
        yield server


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The browser tests go last: while Playwright is open, an event loop runs in this thread, and others need none."""
    items.sort(key=lambda item: "e2e" in item.path.parts)
