"""One row of `bench`, measured in this process: load a preset, or one mode of it, and take the medians of several runs.

Nothing else should have run in the process before, because peak memory is the most it has ever had.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Mapping
from typing import Any

import psutil
import torch

from backend.commands.choice import chosen
from backend.commands.recorded import record
from backend.commands.terminal import ProgressBar
from backend.errors import EngineError, ParameterError, UserError
from backend.events import Stats
from backend.params import GenerationParams
from backend.presets import Preset
from backend.runtime import Runtime
from backend.service import Service
from backend.settings import Settings
from backend.units import parse_bytes

SHORT_PROMPT, LONG_PROMPT, REPLY = 50, 320, 96  # tokens
LEAST_REPLY, TRIAL_REPLY = 4, 4
RUN_SECONDS = 6.0  # a reply is cut so short that a run takes about this long
TABLE_CONTEXT = 1024  # tokens: one chat of ordinary length, so that memory is mostly that of the weights
TEXT = "The quick brown fox jumps over the lazy dog while the old llama hums a song. " * 40

# The rows of the table, and what each changes of the preset. The first six are those of the seed's table, for 16-bit
# weights; its Off_FF and Off_ATT say what STAYS on the GPU, our placements say what is offloaded.
MODES: dict[str, Mapping[str, Any]] = {
    "GPU": {"device": "cuda", "placement": "gpu", "weights": "bf16"},
    "CPU": {"device": "cpu", "placement": "cpu", "weights": "bf16"},
    "8bit": {"device": "cuda", "placement": "gpu", "weights": "llm-int8"},
    "Off_ALL": {"device": "auto", "placement": "offload-all", "weights": "bf16"},
    "Off_FF": {"device": "auto", "placement": "offload-attention", "weights": "bf16"},
    "Off_ATT": {"device": "auto", "placement": "offload-ff", "weights": "bf16"},
    "auto": {"device": "auto", "placement": "auto", "weights": "original"},
    "llm-int8": {"device": "auto", "placement": "auto", "weights": "llm-int8"},
    "int8": {"device": "auto", "placement": "auto", "weights": "int8"},
    "int4": {"device": "auto", "placement": "auto", "weights": "int4"},
    "nf4": {"device": "auto", "placement": "auto", "weights": "nf4"},
}


def measure(preset_name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """The row of one preset, or of one mode of it. Errors that a person can act on are a row with `error`."""
    mode = arguments.mode
    try:
        return _measured(preset_name, mode, arguments)
    except UserError as error:
        return {"preset": mode or preset_name, "mode": mode or "", "error": error.message}


def missing_for(mode: str) -> str | None:
    """What this machine lacks for a row of the table; None: nothing."""
    return "no GPU" if MODES[mode]["device"] == "cuda" and not torch.cuda.is_available() else None


def in_mode(preset: Preset, mode: str, vram: str | None = None) -> Preset:
    """The preset, run as a row of the table says. Raises UserError where this machine has no GPU for it."""
    if missing := missing_for(mode):
        raise EngineError(missing)
    context = preset.context or TABLE_CONTEXT
    budget = preset.vram if vram is None else _budget(vram)
    tokens = preset.kv_tokens or context
    return dataclasses.replace(
        preset, name=mode, title=mode, context=context, kv_tokens=tokens, vram=budget, **MODES[mode]
    )


def _budget(vram: str) -> int:
    try:
        return parse_bytes(vram)
    except ValueError as error:
        raise ParameterError(f"--vram is '{vram}'; {error}") from None


def _measured(preset_name: str, mode: str | None, arguments: argparse.Namespace) -> dict[str, Any]:
    service = Service(dataclasses.replace(Settings(), data_dir=arguments.data_dir))
    preset = chosen(service, argparse.Namespace(preset=preset_name, model=arguments.model, lora=[]))
    preset = preset if mode is None else in_mode(preset, mode, arguments.vram)
    # What guessing brings depends on the text, and the same text again is guessed easily: measured is one token a step.
    preset = dataclasses.replace(preset, speculation="off")
    bar = ProgressBar()
    begin = time.monotonic()
    try:
        service.load_preset(preset, bar)
    finally:
        bar.close()
    load_seconds = time.monotonic() - begin
    runtime = service.runtime()
    try:
        result = _row(runtime, load_seconds, arguments.runs, arguments.seconds)
    finally:
        service.close()
    if mode is None:
        record(
            arguments.data_dir,
            runtime,
            tokens_per_second=result["decode_tokens_per_second"],
            prefill_tokens_per_second=result["prefill_tokens_per_second"],
            time_to_first_token_s=result["time_to_first_token_s"],
            peak_ram_bytes=result["peak_ram_bytes"],
            peak_vram_bytes=result["peak_vram_bytes"],
        )
    return result


def _row(runtime: Runtime, load_seconds: float, runs: int, seconds: float) -> dict[str, Any]:
    begin = time.monotonic()
    trial = _one(runtime, SHORT_PROMPT, TRIAL_REPLY).tokens_per_second or float("inf")
    reply = int(min(REPLY, max(LEAST_REPLY, RUN_SECONDS * trial)))
    _one(runtime, LONG_PROMPT, 1)  # warms up what only long prompts use
    decode: list[float] = []
    first: list[float] = []
    prefill: list[float] = []
    while len(decode) < runs and (not decode or time.monotonic() - begin < seconds):
        stats = _one(runtime, SHORT_PROMPT, reply)
        long = _one(runtime, LONG_PROMPT, 1)
        decode.append(stats.tokens_per_second or 0.0)
        first.append(stats.seconds_to_first_token or 0.0)
        prefill.append(LONG_PROMPT / (long.seconds_to_first_token or float("inf")))
    plan = runtime.plan
    peak = peak_memory()  # before the array that the bandwidth is measured with
    peak_vram = torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0
    bandwidth = read_bandwidth(plan.device)
    speed = statistics.median(decode)
    placement = runtime.preset.placement
    where = "" if placement in ("auto", "gpu", "cpu") else f" {placement}"
    return {
        "preset": runtime.preset.name,
        "mode": f"{plan.device} {runtime.preset.weights}{where}",
        "model": runtime.name,
        "decode_tokens_per_second": speed,
        "decode_min_max": [min(decode), max(decode)],
        "prefill_tokens_per_second": statistics.median(prefill),
        "time_to_first_token_s": statistics.median(first),
        "load_seconds": load_seconds,
        "weight_bytes": runtime.weight_bytes,
        "kv_bytes_reserved": runtime.kv_bytes,
        "peak_ram_bytes": peak,
        "peak_vram_bytes": peak_vram,
        "predicted_ram_bytes": plan.ram_bytes,
        "predicted_vram_bytes": plan.vram_bytes,
        "predicted_tokens_per_second": plan.tokens_per_second,
        "streamed_bytes": plan.placed("streamed"),
        "read_bandwidth_bytes_per_second": bandwidth,
        "read_bandwidth_fraction": speed * runtime.bytes_per_token / bandwidth,
        "reply_tokens": reply,
        "runs": len(decode),
    }


def read_bandwidth(device: str = "cpu", size: int = 1 << 28, repeats: int = 7) -> float:
    """Bytes per second of summing a large array with the threads the engine uses: the best of several passes."""
    data = torch.ones(size // 8, dtype=torch.int64, device=device)
    best = float("inf")
    for _ in range(repeats):
        begin = time.perf_counter()
        data.sum().item()  # waits for a GPU
        best = min(best, time.perf_counter() - begin)
    return size / best


def peak_memory() -> int:
    """Most resident bytes this process has had."""
    info = psutil.Process().memory_info()
    if hasattr(info, "peak_wset"):  # Windows
        return int(info.peak_wset)  # type: ignore[attr-defined]
    import resource  # not there on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def _one(runtime: Runtime, prompt_tokens: int, reply_tokens: int) -> Stats:
    """One uncached greedy reply of this length to a prompt of ordinary words."""
    ids = runtime.prompting.encode_text(TEXT)[:prompt_tokens]
    params = GenerationParams(max_tokens=reply_tokens, temperature=0.0, ignore_eos=True)
    for chunk in runtime.start(ids, params, use_cache=False):
        if chunk.error is not None:
            raise chunk.error
    return chunk.stats
