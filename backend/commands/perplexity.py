"""python -m backend perplexity: what a preset costs in quality, on a text that ships with the app or any other.

With `--reference PRESET` every window is read by both models, in memory beside each other where they fit. Where they do
not, the reference goes first and its probabilities wait in a temporary file.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from backend.calibration import this_machine
from backend.commands.choice import add_choice, chosen, with_model
from backend.commands.recorded import add_data_dir, record
from backend.commands.terminal import ProgressBar
from backend.errors import CheckpointError, ParameterError, UserError
from backend.presets import Preset
from backend.quality import ModelSource, RecordedSource, Score, Source, recorded_bytes, score, windows_of
from backend.quality import record as write_down
from backend.runtime import Prepared, Runtime
from backend.service import Service
from backend.settings import PROJECT, Settings

HELP = "perplexity of a text; with --reference also KL divergence and top-1 agreement"
TEXT = PROJECT / "backend" / "data" / "wonderland.txt"
MAX_TEXT = 1 << 28  # bytes
MARGIN = 1 << 29  # bytes left free when two models are to be in memory beside each other


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_choice(parser)
    parser.add_argument(
        "--text", type=Path, default=TEXT, metavar="FILE", help="UTF-8 text (default: Alice in Wonderland, it ships)"
    )
    parser.add_argument("--context", type=int, default=512, metavar="N", help="tokens of a window (default: 512)")
    parser.add_argument("--windows", type=int, metavar="N", help="only the first N windows (default: the whole text)")
    parser.add_argument("--reference", metavar="PRESET", help="a preset, by name or file, to compare with")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    add_data_dir(parser)


def run(arguments: argparse.Namespace) -> int:
    text = _text(arguments.text)
    service = Service(dataclasses.replace(Settings(), data_dir=arguments.data_dir))
    bar = ProgressBar()
    try:
        document = _measure(arguments, service, text, bar)
    finally:
        bar.close()
        service.close()
    print(json.dumps(document, indent=2) if arguments.json else _sentences(document))
    return 0


def _measure(arguments: argparse.Namespace, service: Service, text: str, bar: ProgressBar) -> dict[str, Any]:
    prepared = service.prepare(_fitted(chosen(service, arguments), arguments.context), bar)
    windows = _windows(prepared, text, arguments)
    other = None
    if arguments.reference is not None:
        preset = service.read_preset(arguments.reference)
        preset = with_model(preset, arguments.model) if arguments.model is not None else preset
        other = service.prepare(_fitted(preset, arguments.context), bar)
        if _windows(other, text, arguments) != windows:
            raise CheckpointError(
                f"{other.checkpoint.path} and {prepared.checkpoint.path} cut the text into different tokens, so their "
                "probabilities cannot be compared"
            )
    with contextlib.ExitStack() as stack:
        reference = stack.enter_context(_reference(other, prepared, windows, service, bar)) if other else None
        runtime = stack.enter_context(_loaded(prepared, service, bar))
        found = score(ModelSource(runtime), windows, reference, bar)
        values = {"perplexity": found.perplexity, "kl": found.kl_mean, "top1_agreement": found.top1_agreement}
        about = {"text": arguments.text.name, "reference": other.preset.name if other else None}
        record(arguments.data_dir, runtime, **{name: v for name, v in (values | about).items() if v is not None})
        return _document(found, runtime, other, arguments, len(windows))


def _document(
    found: Score, runtime: Runtime, other: Prepared | None, arguments: argparse.Namespace, windows: int
) -> dict[str, Any]:
    return {
        **{key: value for key, value in dataclasses.asdict(found).items() if key != "error"},
        "standard_error": found.perplexity * found.error,
        "preset": runtime.preset.name,
        "model": runtime.name,
        "weights": runtime.preset.weights,
        "reference": other.preset.name if other else None,
        "text": arguments.text.name,
        "context": arguments.context,
        "windows": windows,
    }


def _sentences(document: dict[str, Any]) -> str:
    lines = [
        f"{document['preset']}: perplexity {document['perplexity']:.4f} ± {document['standard_error']:.4f} "
        f"({document['tokens']:,} tokens of {document['text']}, {document['windows']} windows of {document['context']})"
    ]
    if document["kl_mean"] is not None:
        lines.append(
            f"against {document['reference']}: mean KL {document['kl_mean']:.6f} nats, "
            f"same first choice {document['top1_agreement']:.2%}"
        )
    return "\n".join(lines)


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_TEXT:
            raise UserError(f"{path}: more than {MAX_TEXT >> 20} MiB; give a shorter text")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({error})") from None


def _fitted(preset: Preset, context: int) -> Preset:
    """The preset with a cache for one window and nothing else to keep."""
    if preset.context is not None and preset.context < context:
        raise ParameterError(f"preset {preset.name} has a context of {preset.context} tokens, a window has {context}")
    return dataclasses.replace(preset, context=context, kv_tokens=max(64, context))


def _windows(prepared: Prepared, text: str, arguments: argparse.Namespace) -> list[list[int]]:
    tokenizer = prepared.prompting.tokenizer
    begins = tokenizer.with_start([])
    ids = tokenizer.encode(text)
    return windows_of(ids, arguments.context, begins[0] if begins else None, arguments.windows)


@contextlib.contextmanager
def _loaded(prepared: Prepared, service: Service, bar: ProgressBar) -> Iterator[Runtime]:
    plan = prepared.planned(this_machine())
    if plan.fits == "no":
        raise UserError(f"preset {prepared.preset.name}: {plan.reason}")
    prepared.plan = plan
    runtime = Runtime(prepared, service.settings.max_waiting, bar)
    try:
        yield runtime
    finally:
        runtime.close(drain=False)


@contextlib.contextmanager
def _reference(
    other: Prepared, prepared: Prepared, windows: Sequence[Sequence[int]], service: Service, bar: ProgressBar
) -> Iterator[Source]:
    """The reference in memory, when there is room for both; else what it said, in a temporary file."""
    if fits_beside(other, prepared):
        with _loaded(other, service, bar) as runtime:
            yield ModelSource(runtime)
        return
    vocabulary = other.checkpoint.config.vocab_size
    needed, free = recorded_bytes(windows, vocabulary), shutil.disk_usage(tempfile.gettempdir()).free
    if needed > free:
        raise UserError(
            f"the two models do not fit into memory together, and what {other.preset.name} says of {len(windows)} "
            f"windows takes {needed / 1e9:.1f} GB of {tempfile.gettempdir()}, which has {free / 1e9:.1f} GB; give "
            f"--windows {max(1, int(len(windows) * free * 0.9 / needed))} or fewer"
        )
    with tempfile.TemporaryFile() as file:
        with _loaded(other, service, bar) as runtime:
            write_down(ModelSource(runtime), windows, file, bar)  # type: ignore[arg-type]
        del runtime
        file.seek(0)
        yield RecordedSource(file, vocabulary)  # type: ignore[arg-type]


def fits_beside(one: Prepared, other: Prepared) -> bool:
    """Whether both models can be in memory at once."""
    machine = this_machine()
    plans = [prepared.planned(machine) for prepared in (one, other)]
    if sum(plan.extra_ram_bytes for plan in plans) + MARGIN > machine.ram_free:
        return False
    gpu = machine.gpu(plans[0].device)
    return gpu is None or plans[0].device != plans[1].device or sum(plan.vram_bytes for plan in plans) < gpu.free
