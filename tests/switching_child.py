"""Run by test_switch_memory.py in a process of its own: ten switches, and what is left of each model.

    python -m tests.switching_child FOLDER beside|in-place

Prints one JSON document: memory and threads after every switch, bytes of a model, and how many tensors of earlier
models are still alive.
"""

from __future__ import annotations

import gc
import json
import sys
import threading
import time
import weakref
from pathlib import Path

import psutil
import torch

import backend.switch
from backend.params import GenerationParams
from backend.service import Service
from backend.settings import Settings
from tests.real import read

SWITCHES = 10


def main(folder: Path, way: str) -> None:
    if way == "in-place":
        backend.switch.fits = lambda *_: "after-unload"
    service = Service(Settings(presets_dir=folder, models_dir=folder, data_dir=folder / "data"))
    process = psutil.Process()
    memory, threads, alive, kept = [], [], [], []
    for number in range(SWITCHES + 2):  # the first two only warm up
        service.load(("one", "two")[number % 2])
        reply = service.complete("some words to begin with " * 8, GenerationParams(temperature=0, max_tokens=4))
        read(reply)
        kept.append(reply)  # as a page does that shows it
        while any(thread.name == "drain" for thread in threading.enumerate()):
            time.sleep(0.01)
        alive.append(sum(reference() is not None for reference in kept_tensors(kept)))
        if number >= 2:
            memory.append(process.memory_info().rss)
            threads.append(process.num_threads())
        kept.append(tensors_of(service))
    size = service.status().weight_bytes
    del reply
    service.close()
    print(json.dumps({"memory": memory, "threads": threads, "alive": alive, "model": size}))


def tensors_of(service: Service) -> list[weakref.ref[torch.Tensor]]:
    """Every tensor that is alive now; a switch later none of the model's may be."""
    model = service.runtime().runner.model
    names = [tensor for layer in model.layers for tensor in (layer.attention_norm, layer.ffn_norm)]
    return [weakref.ref(tensor) for tensor in [*names, model.norm, *model.output.tensors()]]


def kept_tensors(kept: list[object]) -> list[weakref.ref[torch.Tensor]]:
    gc.collect()
    return [reference for each in kept if isinstance(each, list) for reference in each]


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
