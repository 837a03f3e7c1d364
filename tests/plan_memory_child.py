"""One preset in a process of its own: what the plan said its peak would be, and what it was. For test_plan_memory.py.

python -m tests.plan_memory_child PRESET [MODEL CONTEXT WEIGHTS]
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import psutil

from backend.params import GenerationParams
from backend.placement.machine import Machine
from backend.presets import Preset
from backend.runtime import Runtime
from backend.service import Service
from backend.settings import Settings
from tests.commandline import resident

PROMPT = 600  # tokens: whole chunks of a prompt, so that the workspace is as large as it gets


def main() -> None:
    service = Service(Settings())
    if len(sys.argv) == 2:
        preset = dataclasses.replace(service.read_preset(sys.argv[1]), device="cpu")
    else:
        name, model, context, weights = sys.argv[1:]
        preset = Preset(name=name, model=model, device="cpu", context=int(context), weights=weights)
    memory = psutil.virtual_memory()
    # Speeds do not matter here, and measuring them would take memory of its own.
    machine = Machine(ram_total=memory.total, ram_free=memory.available, process_bytes=resident("VmRSS"))
    prepared = service.prepare(preset)
    plan = prepared.plan = prepared.planned(machine)
    runtime = Runtime(prepared, 4)
    ids = runtime.prompting.encode_text(Path("backend/data/wonderland.txt").read_text(encoding="utf-8")[:4000])
    runtime.worker._engine.scheduler._pacing = None  # pieces as long as they may be
    for chunk in runtime.start(ids[:PROMPT], GenerationParams(max_tokens=4, temperature=0.0)):
        assert chunk.error is None, chunk.error
    # The cache full, as the plan counts it: every page of it touched.
    for pool in (runtime.runner.pool.keys, runtime.runner.pool.values):
        pool.zero_()
    told = {
        "predicted": plan.ram_bytes,
        "measured": resident("VmHWM"),
        "before": machine.process_bytes,
        "weights": plan.weight_bytes,
        "loaded": runtime.weight_bytes,
        "kv": plan.kv_bytes,
    }
    runtime.close(drain=False)
    print(json.dumps(told))


if __name__ == "__main__":
    main()
