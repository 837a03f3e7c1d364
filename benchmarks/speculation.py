"""How much faster replies come with speculation, on real tasks: the same model with it and without, in turn. It is one
model in one place of memory: of two, one may well be faster than the other by more than what is measured here.

Greedy, and again with the sampling that the starter comes with, where a reply holds more surprises. The machine may be
shared and its speed drift, so what counts is the ratio of neighbouring runs: for each question its median, for each
kind of task the ratio of the sums of median times; and the same of processor time, which others disturb less. Both
replies must be the same, token by token.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import time
from functools import partial
from typing import Any

from backend.events import Stats
from backend.models import ModelFolder
from backend.params import GenerationParams
from backend.presets import PresetFolder
from backend.runtime import Prepared, Runtime
from backend.settings import PROJECT, Settings
from backend.text.messages import Message
from benchmarks.tasks import TASKS

NAME = "speculation"
REPLY, RUNS, SEED = 256, 5, 7
SIZES, BEFORE = (1, 2, 3, 4, 6, 8, 12, 16), 500  # tokens of a step, and of the context before it
SAMPLINGS: dict[str, dict[str, Any]] = {"greedy": {"temperature": 0.0}, "as shipped": {}}


@dataclasses.dataclass(frozen=True)
class Run:
    """One reply."""

    ids: list[int]
    stats: Stats
    processor_seconds: float  # of all threads


def run() -> dict[str, Any]:
    preset = PresetFolder(Settings().presets_dir).read("starter")
    path = ModelFolder(Settings().models_dir).resolve("starter", PROJECT)
    runtime = Runtime(Prepared(preset, path), 8)
    runtime.runner.be_uniform()  # prompts, which are not measured: how one was cut must not change what is said
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    results: dict[str, Any] = {"reply_tokens_at_most": REPLY, "runs": RUNS, "load_average_before": load}
    try:
        for name, sampling in SAMPLINGS.items():
            print(f"{name}:")
            results[name] = {kind: _task(runtime, kind, questions, sampling) for kind, questions in TASKS.items()}
        results["cost_of_a_step_by_tokens"] = _costs(runtime)
    finally:
        runtime.close(drain=False)
    print("cost of a step by its tokens, beside that of one:", results["cost_of_a_step_by_tokens"])
    return results


def _task(runtime: Runtime, kind: str, questions: tuple[str, ...], sampling: dict[str, Any]) -> dict[str, Any]:
    params = GenerationParams.from_mapping({"max_tokens": REPLY, "seed": SEED} | sampling)
    plain, ratios, processor, last = [], [], [], []
    for question in questions:
        pairs = [_pair(runtime, question, params, number) for number in range(RUNS)]
        if any(before.ids != after.ids for before, after in pairs):
            raise RuntimeError(f"{kind}: with speculation the reply has other tokens")
        plain.append(statistics.median(before.stats.decode_seconds for before, _ in pairs))
        ratios.append(
            statistics.median(before.stats.decode_seconds / after.stats.decode_seconds for before, after in pairs)
        )
        processor.append(
            statistics.median(before.processor_seconds / after.processor_seconds for before, after in pairs)
        )
        last.append(pairs[-1][1].stats)
    tokens = sum(stats.completion_tokens for stats in last)
    accepted, drafted = sum(s.accepted_tokens for s in last), sum(s.drafted_tokens for s in last)
    faster = sum(plain) / sum(seconds / ratio for seconds, ratio in zip(plain, ratios, strict=True))
    less = sum(plain) / sum(seconds / ratio for seconds, ratio in zip(plain, processor, strict=True))
    row = {
        "speedup": round(faster, 3),
        "speedup_of_each": [round(ratio, 3) for ratio in ratios],
        "processor_time_saved": round(less, 3),
        "tokens": tokens,
        "plain_tokens_per_second": round((tokens - len(last)) / sum(plain), 1),
        "passes_per_token": round((tokens - accepted) / tokens, 3),
        "drafted": drafted,
        "accepted": accepted,
        "acceptance": round(accepted / max(1, drafted), 3),
    }
    ratios_of_each = row["speedup_of_each"]
    print(
        f"  {kind:10} {faster:5.2f} x ({less:.2f} x by processor time) of {row['plain_tokens_per_second']} t/s, "
        f"{row['passes_per_token']} passes a token, {accepted} of {drafted} guesses right; each {ratios_of_each}",
        flush=True,
    )
    return row


def _pair(runtime: Runtime, question: str, params: GenerationParams, number: int) -> tuple[Run, Run]:
    """A reply without speculation, and the same with it; every other time in the other order."""
    speculation = runtime.engine.speculation
    try:
        runs = {}
        for kind in (None, speculation) if number % 2 else (speculation, None):
            runtime.worker.ask(partial(setattr, runtime.engine, "speculation", kind))
            runs[kind] = _ask(runtime, question, params, f"key:{number}, {'plain' if kind is None else 'guessing'}")
        return runs[None], runs[speculation]
    finally:
        runtime.worker.ask(partial(setattr, runtime.engine, "speculation", speculation))


def _ask(runtime: Runtime, question: str, params: GenerationParams, person: str) -> Run:
    """One reply; its prompt was read before. Every run is somebody else's, so nothing is learned from the others, and
    none finds more in the cache."""
    messages = [Message("user", question)]
    list(runtime.start_chat(messages, dataclasses.replace(params, max_tokens=1), person=person))
    ids: list[int] = []
    begin = time.process_time()
    for chunk in runtime.start_chat(messages, params, person=person):
        ids += chunk.ids
    if chunk.error is not None:
        raise chunk.error
    return Run(ids, chunk.stats, time.process_time() - begin)


def _costs(runtime: Runtime) -> dict[str, float]:
    """Seconds of steps in turn, beside those of a step of one token: medians. All their tokens give logits."""
    ids = [(7919 * place) % 40_000 + 1000 for place in range(BEFORE + SIZES[-1])]
    lease = runtime.blocks.acquire(ids[:1], b"costs", len(ids))
    assert lease is not None
    for start in range(0, BEFORE, 100):
        runtime.runner.score(ids[start : start + 100], start, lease.blocks, [99])
    seconds: dict[int, list[float]] = {size: [] for size in SIZES}
    for _ in range(30):
        for size, taken in seconds.items():
            begin = time.perf_counter()
            runtime.runner.score(ids[BEFORE : BEFORE + size], BEFORE, lease.blocks, range(size))
            taken.append(time.perf_counter() - begin)
    runtime.blocks.release(lease, ())
    medians = {size: statistics.median(taken) for size, taken in seconds.items()}
    return {str(size): round(value / medians[1], 2) for size, value in medians.items()}
