"""Our engine beside llama.cpp on the same files with the same threads, in turn, one round after the other.

Peer: llama-cpp-python, compiled for this machine by pip in an environment of its own. Its low-level calls are timed,
and the choice of the likeliest token in numpy. Ours is the whole engine: scheduling, sampling, text. Both read each
prompt into an empty cache, and we do not guess ahead (speculation off).

Files: the starter, and a few layers of LLaMA 7B's shape with an output of 32,000 words. "of bandwidth": bytes of
weights that a token reads, by its time, as a part of what the machine reads when it only adds up a large array.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from backend.calibration import bandwidth
from backend.kernels.cpu.products import jobs, tiles_library
from backend.models import ModelFolder
from backend.params import GenerationParams
from backend.presets import PresetFolder
from backend.runtime import Prepared, Runtime, compute_threads
from backend.settings import PROJECT, Settings
from benchmarks.loading import write_model
from benchmarks.peers import LLAMA_CPP_PYTHON, python_with

NAME = "llamacpp"
CONTEXT, ROUNDS, LAYERS, VOCABULARY = 2304, 5, 8, 32000


@dataclasses.dataclass(frozen=True)
class Task:
    """What is measured: the speed of `prompt` tokens being read, of the reply after it, or the time to its first."""

    name: str
    kind: str  # prefill, decode, first
    prompt: int
    reply: int
    target: float  # of our speed to the peer's


STARTER = (
    Task("decode, short context", "decode", 16, 96, 1.8),
    Task("prefill of 320 tokens", "prefill", 320, 1, 3.0),
    Task("decode at 2,000 tokens", "decode", 2000, 48, 1.5),
    Task("first token of a 50-token prompt", "first", 50, 1, 1 / 0.6),
)
LARGE = {
    "Q4_0": (Task("decode", "decode", 8, 16, 1.2), Task("prefill of 320 tokens", "prefill", 320, 1, 2.0)),
    "Q8_0": (Task("decode", "decode", 8, 16, 1.2), Task("prefill of 320 tokens", "prefill", 320, 1, 2.0)),
    "Q4_K": (Task("decode", "decode", 8, 16, 1.15),),
    "Q6_K": (Task("decode", "decode", 8, 16, 1.15),),
}


def run() -> dict[str, Any] | None:
    try:
        python = python_with(LLAMA_CPP_PYTHON)
    except RuntimeError as error:
        print(f"not run: {error}")
        return None
    threads = compute_threads()
    torch.set_num_threads(threads)
    rows: list[dict[str, Any]] = []
    print(f"{'':44} {'ours':>8} {'llama.cpp':>10} {'ratio':>6} {'wanted':>7} {'of bandwidth: ours, its':>24}")
    with Peer(python) as peer:
        path = ModelFolder(Settings().models_dir).resolve("starter", PROJECT)
        rows += _compare("starter", path, STARTER, peer, threads)
        for name, tasks in LARGE.items():
            with tempfile.TemporaryDirectory() as folder:
                path = write_model(Path(folder) / f"{name}.gguf", name, LAYERS, VOCABULARY)
                rows += _compare(f"{LAYERS} layers of 7B, {name}", path, tasks, peer, threads)
        system = peer.system
    return {
        "peer": LLAMA_CPP_PYTHON, "peer_system": system,
        "peer_repacks": peer.repack, "threads": threads, "rounds": ROUNDS,
        "load_average": os.getloadavg(), "rows": rows,
    }  # fmt: skip


def _compare(label: str, path: Path, tasks: tuple[Task, ...], peer: Peer, threads: int) -> list[dict[str, Any]]:
    preset = PresetFolder(Settings().presets_dir).read("starter")
    # As long as the longest task needs, and within what both models were made for.
    context = max(task.prompt + task.reply for task in tasks) + 32
    preset = dataclasses.replace(preset, name=label, context=context, kv_tokens=context, speculation="off")
    runtime = Runtime(Prepared(preset, path), 1)
    peer.load(path, threads)
    ids = [token % (runtime.tokenizer.vocab_size - 300) + 200 for token in range(7, 7 * 2100, 7)]
    found: dict[Task, list[tuple[float, float]]] = {task: [] for task in tasks}
    reading: list[float] = []
    for number in range(ROUNDS + 1):  # the first round warms up
        reading.append(bandwidth())
        for task in tasks:
            speeds = (
                _speed(task, *_ours(runtime, ids[: task.prompt], task.reply)),
                _speed(task, **peer.ask(prompt=ids[: task.prompt], reply=task.reply)),
            )
            if number:
                found[task].append(speeds)
    read, weights = statistics.median(reading), runtime.bytes_per_token
    rows = [_row(label, task, found[task], read, weights) for task in tasks]
    counts = _counts(runtime, ids[:8])
    print(f"{label:18} a token: {', '.join(f'{count:.0f} {name}' for name, count in counts.items())}", flush=True)
    runtime.close(drain=False)
    return [row | {"a_token": counts} for row in rows]


def _counts(runtime: Runtime, ids: list[int], tokens: int = 20) -> dict[str, float]:
    """What one token of a reply takes: calls of compiled code, jobs in them, and barriers between threads."""

    def counted(reply: int) -> tuple[int, ...]:
        compiled = tiles_library()
        assert compiled is not None
        before = (runtime.runner.steps, *jobs(compiled))
        _ours(runtime, ids, reply)
        return tuple(now - then for now, then in zip((runtime.runner.steps, *jobs(compiled)), before, strict=True))

    each = [(many - one) / tokens for many, one in zip(counted(tokens + 1), counted(1), strict=True)]
    return dict(zip(("compiled calls", "jobs", "barriers"), each, strict=True))


def _row(label: str, task: Task, found: list[tuple[float, float]], read: float, weights: int) -> dict[str, Any]:
    ours, theirs = (statistics.median(column) for column in zip(*found, strict=True))
    row: dict[str, Any] = {
        "model": label, "task": task.name, "unit": "1/s" if task.kind == "first" else "tokens/s", "ours": ours,
        "llama.cpp": theirs, "ratio": statistics.median(a / b for a, b in found), "wanted": task.target,
        "min_max": [[min(column), max(column)] for column in zip(*found, strict=True)],
    }  # fmt: skip
    part = ""
    if task.kind == "decode":
        row |= {"bandwidth": read, "of_bandwidth": [weights * ours / read, weights * theirs / read]}
        part = f"{row['of_bandwidth'][0]:15.0%} {row['of_bandwidth'][1]:8.0%}"
    print(
        f"{label:18} {task.name:32}{ours:9.1f} {theirs:10.1f} {row['ratio']:6.2f} {task.target:7.2f} {part}", flush=True
    )
    return row


def _speed(task: Task, first: float, total: float) -> float:
    if task.kind == "decode":
        return (task.reply - 1) / (total - first)
    return task.prompt / first if task.kind == "prefill" else 1 / first


def _ours(runtime: Runtime, ids: list[int], reply: int) -> tuple[float, float]:
    params = GenerationParams(max_tokens=reply, temperature=0.0, ignore_eos=True)
    begun = time.perf_counter()
    *_, chunk = runtime.start(ids, params, use_cache=False)
    total, first = time.perf_counter() - begun, chunk.stats.seconds_to_first_token
    if chunk.error is not None or first is None or chunk.stats.completion_tokens != reply:
        raise RuntimeError(f"{reply} tokens were to be measured, {chunk.stats.completion_tokens} came: {chunk.error}")
    return first, total


class Peer:
    """llama.cpp in its process."""

    def __init__(self, python: Path) -> None:
        self._python, self.system, self.repack = python, "", True
        self._start()

    def _start(self) -> None:
        child = Path(__file__).with_name("llamacpp_child.py")
        self._process = subprocess.Popen(
            [self._python, child], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def load(self, path: Path, threads: int) -> None:
        """Load, and answer once. Where its code for this processor's matrix units ends the process, without that."""
        try:
            self.ask(model=str(path), threads=threads, context=CONTEXT, repack=self.repack)
            self.ask(prompt=[300, 301, 302], reply=2)
        except RuntimeError:
            if not self.repack:
                raise
            print("llama.cpp ends in its layouts for this processor (an illegal instruction?): measured without them")
            self.repack = False
            self._start()
            self.load(path, threads)

    def ask(self, **what: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("llama.cpp ended")
        answer: dict[str, Any] = json.loads(line)
        self.system = answer.pop("system", self.system)
        return answer

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *about: object) -> None:
        self._process.terminate()
        self._process.wait(10)
