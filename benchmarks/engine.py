"""Our engine beside transformers on the same weights, in the same process, run by run in turn.

Peer: transformers' LlamaForCausalLM with the starter's weights dequantized to bf16 and to f32, greedy `generate`. The
machine may be shared and its speed drift, so what counts is the ratio of medians of interleaved runs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import transformers

from backend.models import ModelFolder
from backend.params import GenerationParams
from backend.presets import PresetFolder
from backend.runtime import Prepared, Runtime, compute_threads
from backend.settings import PROJECT, Settings
from tests.oracle import reference_model

NAME = "engine"
PRESETS = ("starter", "starter-bf16", "starter-f32")
PROMPT, LONG_PROMPT, REPLY, RUNS = 50, 320, 64, 5
TEXT = "The quick brown fox jumps over the lazy dog while the old llama hums a song. " * 40

Measure = Callable[[int, int], tuple[float, float]]  # (prompt, reply tokens) -> seconds to first token, in all


def run() -> dict[str, Any]:
    torch.set_num_threads(compute_threads())
    presets = PresetFolder(Settings().presets_dir)
    path = ModelFolder(Settings().models_dir).resolve("starter", PROJECT)
    plain = {name: replace(presets.read(name), speculation="off") for name in PRESETS}
    runtimes = {name: Runtime(Prepared(preset, path), 8) for name, preset in plain.items()}
    ids = next(iter(runtimes.values())).prompting.encode_text(TEXT)
    measures: dict[str, Measure] = {f"suri {name}": _ours(runtime, ids) for name, runtime in runtimes.items()}
    for label, dtype in (("bf16", torch.bfloat16), ("f32", torch.float32)):
        measures[f"transformers {label}"] = _peer(reference_model(path, dtype), ids)
    rows: dict[str, dict[str, list[float]]] = {
        name: {"decode": [], "prefill": [], "first_token": []} for name in measures
    }
    for number in range(RUNS + 1):  # the first round warms up
        for name, measure in measures.items():
            first, total = measure(PROMPT, REPLY)
            long_first, _ = measure(LONG_PROMPT, 1)
            if number:
                rows[name]["decode"].append((REPLY - 1) / (total - first))
                rows[name]["prefill"].append(LONG_PROMPT / long_first)
                rows[name]["first_token"].append(first)
    for runtime in runtimes.values():
        runtime.close(drain=False)
    return _summary(rows)


def _summary(rows: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    medians = {name: {kind: statistics.median(values) for kind, values in row.items()} for name, row in rows.items()}
    print(
        f"{'':22} {'decode t/s':>12} {'prefill t/s':>12} {'first token s':>14}   (medians of {RUNS} interleaved runs)"
    )
    for name, row in medians.items():
        print(f"{name:22} {row['decode']:12.1f} {row['prefill']:12.0f} {row['first_token']:14.3f}")
    peer = max(row["decode"] for name, row in medians.items() if name.startswith("transformers"))
    ratio = medians["suri starter"]["decode"] / peer
    print(f"decode of the starter preset: {ratio:.2f} x the faster transformers run")
    spread = {name: {kind: [min(v), max(v)] for kind, v in row.items()} for name, row in rows.items()}
    return {
        "transformers": transformers.__version__,
        "runs": RUNS,
        "prompt_tokens": PROMPT,
        "long_prompt_tokens": LONG_PROMPT,
        "reply_tokens": REPLY,
        "medians": medians,
        "min_max": spread,
        "starter_decode_over_best_transformers": ratio,
    }


def _ours(runtime: Runtime, ids: list[int]) -> Measure:
    def measure(prompt: int, reply: int) -> tuple[float, float]:
        params = GenerationParams(max_tokens=reply, temperature=0.0)
        begin = time.perf_counter()
        *_, chunk = runtime.start(ids[:prompt], params, use_cache=False)
        first = chunk.stats.seconds_to_first_token
        if chunk.stats.completion_tokens != reply or first is None:
            raise RuntimeError(f"the reply has {chunk.stats.completion_tokens} tokens, {reply} were to be measured")
        return first, time.perf_counter() - begin

    return measure


def _peer(model: Any, ids: list[int]) -> Measure:
    class Clock(transformers.generation.streamers.BaseStreamer):  # type: ignore[misc, name-defined]
        first: float | None = None
        calls = 0

        def put(self, value: torch.Tensor) -> None:
            self.calls += 1
            if self.calls == 2:  # the first call brings the prompt back
                self.first = time.perf_counter()

        def end(self) -> None: ...

    def measure(prompt: int, reply: int) -> tuple[float, float]:
        clock = Clock()
        tokens = torch.tensor([ids[:prompt]])
        begin = time.perf_counter()
        model.generate(
            tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=reply,
            min_new_tokens=reply, streamer=clock, pad_token_id=2,
        )  # fmt: skip
        total = time.perf_counter() - begin
        assert clock.first is not None
        return clock.first - begin, total

    return measure
