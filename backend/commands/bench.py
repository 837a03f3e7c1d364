"""python -m backend bench: decode and prefill speed, time to first token and peak memory of presets on this machine.

Every preset runs in a process of its own, so that its peak memory is its own. Speeds are medians of repeated runs.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from typing import Any

import psutil
import torch

from backend.commands.choice import loaded_service
from backend.errors import EngineError
from backend.events import Stats
from backend.params import GenerationParams
from backend.runtime import Runtime, compute_threads

HELP = "measure decode, prefill, time to first token and peak memory"
SHORT_PROMPT, LONG_PROMPT, REPLY = 50, 320, 96  # tokens


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", nargs="+", default=["starter"], metavar="P", help="presets, one after the other")
    parser.add_argument("--model", metavar="PATH", help="a model file to use in place of the presets'")
    parser.add_argument("--runs", type=int, default=5, help="counted runs after one warm-up (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)


def run(arguments: argparse.Namespace) -> int:
    if arguments.in_process:
        print(json.dumps(measure(arguments)))
        return 0
    results = [_in_child(name, arguments.model, arguments.runs) for name in arguments.preset]
    document = {"machine": machine(), "results": results}
    if arguments.json:
        print(json.dumps(document, indent=2))
        return 0
    print(f"{'preset':16} {'decode':>12} {'prefill':>12} {'first token':>12} {'peak memory':>12} {'of bandwidth':>13}")
    for row in results:
        decode, prefill = row["decode_tokens_per_second"], row["prefill_tokens_per_second"]
        print(
            f"{row['preset']:16} {decode:8.1f} t/s {prefill:8.0f} t/s {row['time_to_first_token_s']:10.3f} s "
            f"{row['peak_ram_bytes'] / 1e6:9.0f} MB {row['read_bandwidth_fraction']:12.0%}"
        )
    return 0


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Load and measure one preset, the first that is named, in this process."""
    preset, runs = arguments.preset[0], arguments.runs
    begin = time.monotonic()
    service = loaded_service(argparse.Namespace(preset=preset, model=arguments.model, lora=[]))
    load_seconds = time.monotonic() - begin
    runtime = service.runtime()
    decode: list[float] = []
    first: list[float] = []
    prefill: list[float] = []
    for number in range(runs + 1):  # the first is the warm-up
        stats = _one(runtime, SHORT_PROMPT, REPLY)
        long = _one(runtime, LONG_PROMPT, 1)
        if number:
            decode.append(stats.tokens_per_second or 0.0)
            first.append(stats.seconds_to_first_token or 0.0)
            prefill.append(LONG_PROMPT / (long.seconds_to_first_token or float("inf")))
    bandwidth = read_bandwidth()
    speed = statistics.median(decode)
    result = {
        "preset": runtime.preset.name,
        "mode": f"cpu {runtime.preset.weights}",
        "model": runtime.name,
        "decode_tokens_per_second": speed,
        "decode_min_max": [min(decode), max(decode)],
        "prefill_tokens_per_second": statistics.median(prefill),
        "time_to_first_token_s": statistics.median(first),
        "load_seconds": load_seconds,
        "weight_bytes": runtime.weight_bytes,
        "kv_bytes_reserved": runtime.kv_bytes,
        "peak_ram_bytes": peak_memory(),
        "peak_vram_bytes": 0,
        "read_bandwidth_bytes_per_second": bandwidth,
        "read_bandwidth_fraction": speed * runtime.bytes_per_token / bandwidth,
        "runs": runs,
    }
    service.close()
    return result


def machine() -> dict[str, Any]:
    return {
        "processor": _processor(),
        "threads": compute_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def read_bandwidth(size: int = 1 << 28, repeats: int = 7) -> float:
    """Bytes per second of summing a large array with the threads the engine uses: the best of several passes."""
    data = torch.ones(size // 8, dtype=torch.int64)
    best = float("inf")
    for _ in range(repeats):
        begin = time.perf_counter()
        data.sum()
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
    """One uncached greedy reply to a prompt of ordinary words."""
    text = "The quick brown fox jumps over the lazy dog while the old llama hums a song. " * 40
    ids = runtime.prompting.encode_text(text)[:prompt_tokens]
    params = GenerationParams(max_tokens=reply_tokens, temperature=0.0)
    for chunk in runtime.start(ids, params, use_cache=False):
        if chunk.error is not None:
            raise chunk.error
    return chunk.stats


def _in_child(preset: str, model: str | None, runs: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "backend", "bench", "--in-process", "--preset", preset, "--runs", str(runs)]
    if model:
        command += ["--model", model]
    child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if child.returncode:
        raise EngineError(f"measuring preset {preset} failed; its own message is above")
    return dict(json.loads(child.stdout))


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
