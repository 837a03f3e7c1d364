"""The peak of memory that the plan predicts is the one that is measured, within 5 percent, the cache full.

Each runs in a process of its own: the starter as it is in its file and quantised while it is loaded, and a model of a
billion weights.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from backend.settings import PROJECT

needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")


def measured(*arguments: object) -> dict[str, int]:
    line = [sys.executable, "-m", "tests.plan_memory_child", *map(str, arguments)]
    done = subprocess.run(line, cwd=PROJECT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def check(told: dict[str, int]) -> None:
    assert told["weights"] == told["loaded"]
    assert told["predicted"] == pytest.approx(told["measured"], rel=0.05), told


@needs_proc
@pytest.mark.parametrize("preset", ["starter", "cpu-int8", "cpu-int4", "cpu-bf16", "starter-f32"])
def test_shipped_presets(starter_path: Path, preset: str):
    check(measured(preset))


@needs_proc
def test_the_starter_takes_little_more_than_its_file(starter_path: Path):
    """Peak of a process that has read a long prompt: 1.6 times the file, the cache, and what our code and torch take
    that have only multiplied two small matrices."""
    told = measured("starter")
    lines = (
        "import torch, backend.service, tests.commandline",
        "torch.ones(64, 64) @ torch.ones(64, 64)",
        "print(tests.commandline.resident('VmRSS'))",
    )
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], cwd=PROJECT, capture_output=True, check=True)
    torch_itself = int(done.stdout)
    assert told["measured"] <= torch_itself + told["kv"] + 1.6 * starter_path.stat().st_size, (told, torch_itself)


@needs_proc
def test_a_billion_weights():
    check(measured("billion", "shape:tinyllama-1.1b:q4_0", 2048, "original"))
