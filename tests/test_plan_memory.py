"""The peak of memory that the plan predicts is the one that is measured, within 5 percent, the cache full.

Each preset runs in a process of its own: the shipped ones that run on a CPU, on the starter; and a model of a billion
weights, as it is in a file, quantised while it is loaded, and plain.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from backend.presets import PresetFolder
from backend.settings import PROJECT, Settings

BILLION = [
    ("shape:tinyllama-1.1b:q4_0", "original"),
    ("shape:tinyllama-1.1b:q8_0:layers=6", "int8"),  # quantising all 22 takes too long for a test
    ("shape:tinyllama-1.1b:bf16", "bf16"),
]
needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")


def shipped() -> list[str]:
    """The presets of the starter that need no GPU; of those that take the same memory, the first."""
    folder = PresetFolder(Settings().presets_dir)
    chosen: dict[tuple[object, ...], str] = {}
    for name in folder.names():
        preset = folder.read(name)
        if preset.model == "starter" and preset.device in ("auto", "cpu"):
            keys = (preset.weights, preset.kv_cache, preset.context, preset.kv_tokens, preset.placement, preset.ram)
            chosen.setdefault(keys, name)
    return list(chosen.values())


def measured(*arguments: object) -> dict[str, int]:
    line = [sys.executable, "-m", "tests.plan_memory_child", *map(str, arguments)]
    done = subprocess.run(line, cwd=PROJECT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def check(told: dict[str, int]) -> None:
    assert told["weights"] == told["loaded"]
    assert told["predicted"] == pytest.approx(told["measured"], rel=0.05), told


def test_all_kinds_of_weights_are_shipped():
    assert len(shipped()) >= 5


@needs_proc
@pytest.mark.parametrize("preset", shipped())
def test_shipped_presets(starter_path: Path, preset: str):
    check(measured(preset))


@needs_proc
@pytest.mark.parametrize(("model", "weights"), BILLION)
def test_a_billion_weights(model: str, weights: str):
    check(measured("billion", model, 2048, weights))
