"""Memory, threads and tensors really return: ten switches in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from backend.settings import PROJECT
from tests.tiny import TinyModel, write_tiny

SLACK = 20 << 20  # what ten switches may leave behind in all: less than one of these models


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models of about 24 MB."""
    folder = tmp_path_factory.mktemp("switching")
    for name, seed in (("one", 1), ("two", 2)):
        model = TinyModel(seed=seed, n_layers=3, dim=512, n_heads=8, n_kv_heads=4, head_dim=64, ffn_dim=768)
        path = write_tiny(folder / f"{name}.gguf", model)
        (folder / f"{name}.yaml").write_text(f"model: {path}\nweights: f32\n")
    return folder


@pytest.mark.parametrize("way", ["beside", "in-place"])
def test_ten_switches_leave_nothing_behind(folder: Path, way: str) -> None:
    command = [sys.executable, "-m", "tests.switching_child", str(folder), way]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["model"] > 20e6
    assert found["alive"] == [0] * 12
    first, last = min(found["memory"][:4]), max(found["memory"][-4:])
    assert last - first < SLACK, found["memory"]
    assert max(found["threads"]) <= found["threads"][0], found["threads"]
