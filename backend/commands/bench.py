"""python -m backend bench: decode and prefill speed, time to first token and peak memory of presets on this machine.

With `--table` (and when a model or a shape is all that is given) the rows are ways to run that one model: those of the
table this project grew out of (GPU, CPU, 8bit, Off_ALL, Off_FF, Off_ATT), then ours. Every row runs in a process of its
own, so that its peak memory is its own.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from typing import Any

import psutil
import torch

from backend.commands.measuring import MODES, measure, missing_for
from backend.commands.recorded import add_data_dir
from backend.errors import EngineError, ParameterError
from backend.model.shapes import PREFIX, parse_shape
from backend.runtime import compute_threads
from backend.store.measurements import processor

HELP = "measure decode, prefill, time to first token and peak memory"
DEFAULT_PRESET = "starter"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--preset", nargs="+", metavar="P", help=f"presets, one after the other (default: {DEFAULT_PRESET})"
    )
    parser.add_argument("--model", metavar="PATH", help="a model file to use in place of the presets'")
    parser.add_argument(
        "--shape",
        metavar="NAME[:FORMAT]",
        help="random weights of a known shape in place of a model, e.g. llama-2-7b or llama-2-7b:q4_0:layers=8",
    )
    parser.add_argument(
        "--table", action="store_true", help="all ways to run the model; the default with --model or --shape alone"
    )
    parser.add_argument("--modes", nargs="+", choices=MODES, metavar="M", help=f"rows of the table: {', '.join(MODES)}")
    parser.add_argument("--vram", metavar="SIZE", help="budget on the GPU in the table, e.g. 10GiB")
    parser.add_argument("--runs", type=int, default=5, help="counted runs after one warm-up (default: %(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="begin no further run after this time (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--mode", choices=MODES, help=argparse.SUPPRESS)
    add_data_dir(parser)


def run(arguments: argparse.Namespace) -> int:
    if arguments.runs < 1:
        raise ParameterError(f"--runs is {arguments.runs}, expected 1 or more")
    if arguments.shape is not None:
        if arguments.model is not None:
            raise ParameterError("--model and --shape are both a model; give one of them")
        arguments.model = PREFIX + arguments.shape.removeprefix(PREFIX)
        parse_shape(arguments.model)  # a wrong name should not cost a row for each mode
    presets = arguments.preset or [DEFAULT_PRESET]
    if arguments.in_process:
        print(json.dumps(measure(presets[0], arguments)))
        return 0
    if is_table(arguments):
        results = [_in_child(arguments, presets[0], mode) for mode in arguments.modes or MODES]
    else:
        results = [_in_child(arguments, name, None) for name in presets]
    document = {"machine": machine(), "results": results}
    print(json.dumps(document, indent=2) if arguments.json else shown(results))
    failed = [row["error"] for row in results if row.get("error")]
    if len(failed) == len(results) or (failed and not is_table(arguments)):
        raise EngineError(failed[0])
    return 0


def is_table(arguments: argparse.Namespace) -> bool:
    """Whether rows are ways to run one model, not presets."""
    return bool(arguments.table or arguments.modes or (arguments.model is not None and arguments.preset is None))


def machine() -> dict[str, Any]:
    return {
        "processor": processor(),
        "threads": compute_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())],
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def shown(results: list[dict[str, Any]]) -> str:
    """The table for people: one row for each result, or why there is none."""
    heads = f"{'decode':>12} {'prefill':>12} {'first token':>12} {'memory':>10} {'GPU memory':>11} {'bandwidth':>10}"
    lines = [f"{'':16} {heads}"]
    for row in results:
        if row.get("error"):
            lines.append(f"{row['preset']:16} {row['error']}")
            continue
        lines.append(
            f"{row['preset']:16} {row['decode_tokens_per_second']:8.{_digits(row)}f} t/s "
            f"{row['prefill_tokens_per_second']:8.0f} t/s {row['time_to_first_token_s']:10.3f} s "
            f"{row['peak_ram_bytes'] / 1e6:7.0f} MB {row['peak_vram_bytes'] / 1e6:8.0f} MB "
            f"{row['read_bandwidth_fraction']:10.0%}  {row['mode']}"
        )
    return "\n".join(lines)


def _digits(row: dict[str, Any]) -> int:
    return 1 if row["decode_tokens_per_second"] >= 10 else 2


def _in_child(arguments: argparse.Namespace, preset: str, mode: str | None) -> dict[str, Any]:
    """One row. What the person can act on comes back as its `error`."""
    if mode is not None and (missing := missing_for(mode)):
        return {"preset": mode, "mode": mode, "error": missing}
    command = [sys.executable, "-m", "backend", "bench", "--in-process", "--preset", preset]
    for flag in ("model", "vram", "runs", "seconds", "data_dir"):
        if getattr(arguments, flag) is not None:
            command += [f"--{flag.replace('_', '-')}", str(getattr(arguments, flag))]
    if mode is not None:
        command += ["--mode", mode]
    child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if child.returncode:
        died = f"its process ended with {child.returncode}; what it said is above"
        return {"preset": mode or preset, "mode": mode or "", "error": f"measuring {mode or preset} failed: {died}"}
    return dict(json.loads(child.stdout))
