"""python -m backend plan: what would go where, what it takes and how fast it would be, before anything is loaded."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from backend.calibration import this_machine
from backend.commands.choice import with_model
from backend.errors import ParameterError, UserError
from backend.headers import read_headers
from backend.models import ModelFolder
from backend.placement.machine import Gpu, Machine
from backend.placement.plan import Plan, nearest_that_fits, plan, with_draft, without
from backend.presets import DraftPreset, Preset, PresetFolder
from backend.settings import PROJECT, Settings
from backend.units import parse_bytes, show_bytes

HELP = "say what presets need, what goes where and how fast it would be; from headers alone"
# Presets that are ways to run any model: with --model, these are compared.
MODES = ("auto", "cpu-bf16", "cpu-int8", "cpu-int4", "gpu-fp16", "gpu-int8", "gpu-int4")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", nargs="+", metavar="P", help="presets (default: all; with --model, the modes)")
    parser.add_argument("--model", metavar="PATH", help="a model in place of the presets'; params.json alone will do")
    parser.add_argument("--vram", metavar="SIZE", help="plan for a GPU with so much memory, e.g. 8GiB")
    parser.add_argument("--ram", metavar="SIZE", help="a budget for weights and cache in memory, e.g. 16GiB")
    parser.add_argument("--context", type=int, metavar="N", help="tokens of one chat")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")


def run(arguments: argparse.Namespace) -> int:
    settings = Settings()
    folder, models = PresetFolder(settings.presets_dir), ModelFolder(settings.models_dir)
    names = arguments.preset or (MODES if arguments.model else folder.names())
    changes = _changes(arguments)
    presets = [folder.read(name) for name in names]
    if arguments.model:
        presets = [dataclasses.replace(with_model(preset, arguments.model), name=preset.name) for preset in presets]
    machine = _machine(this_machine(), changes.get("vram"))
    rows = [_row(dataclasses.replace(preset, **changes), folder, models, machine) for preset in presets]
    if arguments.json:
        print(json.dumps({"presets": [_facts(row, rows) for row in rows]}, indent=2, ensure_ascii=False))
        return 0
    _print(rows)
    return 0


@dataclasses.dataclass(frozen=True)
class Row:
    """One preset: its plan, or why there is none."""

    preset: Preset
    plan: Plan | None = None
    note: str = ""


def _row(preset: Preset, folder: PresetFolder, models: ModelFolder, machine: Machine) -> Row:
    try:
        headers, draft = read_headers(preset, models, PROJECT), preset.speculation
        if not isinstance(draft, DraftPreset):
            return Row(preset, plan(preset, headers.config, headers.tensors, machine), headers.note)
        beside = _row(folder.read(draft.name), folder, models, machine)
        if beside.plan is None:
            return Row(preset, note=beside.note)
        own = plan(preset, headers.config, headers.tensors, without(machine, beside.plan))
        return Row(preset, with_draft(own, beside.plan), headers.note)
    except UserError as error:
        return Row(preset, note=error.message)


def _changes(arguments: argparse.Namespace) -> dict[str, Any]:
    """Keys of the presets that the command line replaces."""
    changes: dict[str, Any] = {}
    for key in ("vram", "ram"):
        if getattr(arguments, key) is not None:
            try:
                changes[key] = parse_bytes(getattr(arguments, key))
            except ValueError as error:
                raise ParameterError(f"--{key} is '{getattr(arguments, key)}'; {error}", param=key) from None
    if arguments.context is not None:
        if not 64 <= arguments.context <= 1 << 24:
            raise ParameterError(f"--context is {arguments.context}, expected tokens from 64 to {1 << 24}")
        changes["context"] = arguments.context
    return changes


def _machine(machine: Machine, vram: int | None) -> Machine:
    """This machine; where --vram asks for a GPU it does not have, one of that size whose speeds are not known."""
    if vram is None or machine.gpus:
        return machine
    return dataclasses.replace(machine, gpus=(Gpu("cuda:0", "a GPU that is not here", vram, vram),))


# what is shown --------------------------------------------------------------------------------------------------------


def _facts(row: Row, rows: Sequence[Row]) -> dict[str, Any]:
    facts: dict[str, Any] = {"preset": row.preset.name, "model": row.preset.model}
    if row.plan is None:
        return facts | {"error": row.note}
    found = row.plan
    near = _nearest(row, rows)
    return facts | {
        "weights": found.weights,
        "device": found.device,
        "vram_bytes": found.vram_bytes,
        "ram_bytes": found.ram_bytes,
        "weight_bytes": found.weight_bytes,
        "kv_bytes": found.kv_bytes,
        "ring_bytes": found.ring_bytes,
        "context": found.context,
        "max_context": found.max_context,
        "predicted_tokens_per_second": found.tokens_per_second,
        "bound_by": found.bound_by,
        "fits": found.fits,
        "reason": found.reason or None,
        "nearest": near,
        "note": row.note or None,
        "parts": [{"names": list(part.names), "bytes": part.bytes, "place": part.place} for part in found.parts],
    }


def _nearest(row: Row, rows: Sequence[Row]) -> str | None:
    if row.plan is None or row.plan.fits != "no":
        return None
    near = nearest_that_fits(row.plan, [other.plan for other in rows if other.plan is not None])
    return near.preset if near else None


def _print(rows: Sequence[Row]) -> None:
    width = max([16, *(len(row.preset.name) for row in rows)])
    print(
        f"{'preset':{width}} {'device':7} {'weights':>9} {'VRAM':>9} {'RAM':>9} {'context':>15} {'tokens/s':>9}  limit"
    )
    for row in rows:
        found = row.plan
        if found is None:
            print(f"{row.preset.name:{width}} {row.note}")
            continue
        rate = found.tokens_per_second
        speed = "-" if rate is None else f"{rate:.1f}" if rate >= 1 else f"{rate:.2g}"
        vram = show_bytes(found.vram_bytes) if found.vram_bytes else "-"
        context = f"{found.context:,}" + (f" of {found.max_context:,}" if found.max_context != found.context else "")
        print(
            f"{row.preset.name:{width}} {found.device:7} {show_bytes(found.weight_bytes):>9} {vram:>9} "
            f"{show_bytes(found.ram_bytes):>9} {context:>15} {speed:>9}  {found.bound_by}"
        )
        for line in _details(row, rows, alone=len(rows) == 1):
            print(f"{'':{width}} {line}")


def _details(row: Row, rows: Sequence[Row], alone: bool) -> list[str]:
    """What a person should know besides: what does not fit, what is not resident."""
    found = row.plan
    assert found is not None
    lines = [row.note] if row.note else []
    if found.fits == "no":
        near = _nearest(row, rows)
        lines.append(f"does not fit: {found.reason}" + (f"; '{near}' fits" if near else ""))
    moved = {place: found.placed(place) for place in ("resident", "streamed", "cpu")}
    if alone or moved["streamed"] or moved["cpu"]:
        words = {"resident": "resident", "streamed": "streamed", "cpu": "computed on the CPU"}
        lines.append(", ".join(f"{show_bytes(size)} {words[place]}" for place, size in moved.items() if size))
    return lines
