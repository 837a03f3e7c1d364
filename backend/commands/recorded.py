"""Where `bench` and `perplexity` put down what they found: the Presets tab shows it beside each preset."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch

from backend.errors import UserError
from backend.runtime import Runtime
from backend.settings import VERSION, Settings
from backend.store.measurements import Measurements, Run, fingerprint, this_machine

FILE = "measurements.json"
_SHOWN_ONLY = ("name", "title", "sampling", "prompt_format")  # keys of a preset that change no number


def add_data_dir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data-dir", type=Path, default=Settings().data_dir, metavar="DIR", help="where results are kept for the page"
    )


def run_of(runtime: Runtime) -> Run:
    """What a measurement of this loaded model is of."""
    keys = {key: value for key, value in dataclasses.asdict(runtime.preset).items() if key not in _SHOWN_ONLY}
    version = f"suri {VERSION}, torch {torch.__version__}"
    return Run(runtime.preset.name, fingerprint(keys, runtime.checkpoint.files), this_machine(), version)


def record(data_dir: Path, runtime: Runtime, **values: Any) -> None:
    """Keep numbers. That they cannot be kept is no reason to lose them: it is said, and they are printed anyway."""
    try:
        Measurements(data_dir / FILE).record(run_of(runtime), model=runtime.name, **values)
    except (UserError, OSError) as error:
        print(f"suri: the result is not kept: {error}", file=sys.stderr)
