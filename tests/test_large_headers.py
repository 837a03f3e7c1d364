"""A 70B model is opened and inspected by its headers alone: little memory, and no page of a weight is touched."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.largefiles import write_gguf, write_hf, write_meta

ROOT = Path(__file__).resolve().parent.parent
MOST_MEMORY = 200 << 20  # bytes more than before
PARAMETERS = 68_976_648_192  # of Llama 2 70B

# The resident size's peak is set back before, so what counts is what this model took. The last number is how many
# bytes of the model's own files are resident in mappings of them.
INSPECT = """
import json, sys, time
from pathlib import Path
from backend.checkpoint.open import open_checkpoint
from backend.commands.inspect import describe

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

found = []
for path in map(Path, sys.argv[1:]):
    Path("/proc/self/clear_refs").write_text("5")
    before, began = status("VmRSS"), time.process_time()
    checkpoint = open_checkpoint(path)
    facts = describe(checkpoint)
    seconds, grown = time.process_time() - began, status("VmHWM") - before
    mapped = resident = inside = 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            inside = any(line.endswith(str(file)) for file in checkpoint.files)
            mapped += inside
        elif inside and line.startswith("Rss:"):
            resident += int(line.split()[1]) * 1024
    found.append({"facts": facts, "seconds": seconds, "grown": grown, "mapped": mapped, "resident": resident})
    del checkpoint, facts
print(json.dumps(found))
"""
LAYOUTS: dict[str, tuple[Callable[[Path], Path], str, int]] = {
    "gguf": (write_gguf, "GGUF v3", 1),
    "meta": (write_meta, "Meta, 8 shards", 8),
    "hf": (write_hf, "Hugging Face safetensors, 15 shards", 15),
}


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="counts pages as Linux tells them")
def test_looking_at_70b_takes_little_memory_and_reads_no_weight(tmp_path: Path) -> None:
    paths = [write(tmp_path / name) for name, (write, _, _) in LAYOUTS.items()]
    command = [sys.executable, "-c", INSPECT, *map(str, paths)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[dict[str, Any]] = json.loads(done.stdout)
    for (name, (_, form, files)), told in zip(LAYOUTS.items(), found, strict=True):
        assert told["facts"]["format"] == form
        assert told["facts"]["parameters"] == PARAMETERS
        assert "32,000 pieces" in told["facts"]["tokenizer"]
        assert told["grown"] < MOST_MEMORY, (name, told["grown"])
        assert told["mapped"] == files, (name, told["mapped"])
        assert told["resident"] <= 1 << 20, (name, told["resident"])  # of a header that was read through a mapping
