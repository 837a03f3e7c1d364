"""python -m backend convert SRC DST: rewrite a model as a GGUF file or a Hugging Face folder, quantised if asked."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from backend.checkpoint.lora import parse_adapter, with_lora
from backend.checkpoint.open import open_checkpoint
from backend.commands.terminal import ProgressBar
from backend.convert.mixes import MIXES
from backend.convert.output import ConvertError, check_target
from backend.convert.to_gguf import AS_STORED, GGUFPlan, plan_gguf, write_gguf
from backend.convert.to_gptq import GPTQPlan, GPTQSettings, plan_gptq, write_gptq
from backend.convert.to_hf import HFPlan, plan_hf, write_hf
from backend.weights.gptq import BITS

HELP = "rewrite a model as a GGUF file or a Hugging Face folder, in another number format if asked"
HF_TYPES = ("f32", "f16", "bf16")
GPTQ_TYPES = ("gptq", "rtn")
_RTN_OPTIONS = ("bits", "group_size", "sym")
_GPTQ_OPTIONS = (*_RTN_OPTIONS, "calibration", "act_order", "samples", "sample_tokens")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="SRC", help="any model file or folder that can be opened")
    parser.add_argument("target", type=Path, metavar="DST", help="a name ending in .gguf, or a folder for Hugging Face")
    parser.add_argument("--to", choices=("gguf", "hf"), help="default: by the name of DST")
    parser.add_argument(
        "--type",
        metavar="TYPE",
        type=str.lower,
        help=f"{', '.join(MIXES)}; hf: {', '.join(HF_TYPES + GPTQ_TYPES)}; default: as SRC",
    )
    parser.add_argument(
        "--lora", metavar="PATH[=STRENGTH]", action="append", default=[], help="an adapter to merge; may be repeated"
    )
    parser.add_argument("--force", action="store_true", help="write over what is there")
    parser.add_argument("--vocab-only", action="store_true", help="write the keys and the vocabulary, no weights")
    parser.add_argument("--dump", action="store_true", help="print what would be written, write nothing")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of hf files (default: %(default)s)")
    group = parser.add_argument_group("types gptq and rtn", "a few bits per weight; rtn rounds to the nearest")
    group.add_argument("--calibration", type=Path, metavar="TEXTFILE", help="gptq: a text like those the model is for")
    group.add_argument("--bits", type=int, choices=BITS, help="default: 4")
    group.add_argument("--group-size", type=int, metavar="N", help="columns per scale, -1: all (default: 128)")
    group.add_argument("--act-order", action="store_true", help="gptq: columns with large inputs first")
    group.add_argument("--sym", action="store_true", help="the zero point in the middle of the range")
    group.add_argument("--samples", type=int, metavar="N", help="gptq: pieces of the text (default: 128)")
    group.add_argument("--sample-tokens", type=int, metavar="N", help="gptq: tokens of each (default: 2048)")


def run(arguments: argparse.Namespace) -> int:
    target: Path = arguments.target
    to = arguments.to or ("gguf" if target.suffix.lower() == ".gguf" else "hf")
    kind = arguments.type
    known = tuple(MIXES) if to == "gguf" else HF_TYPES + GPTQ_TYPES
    if kind is not None and kind not in known:
        raise ConvertError(f"--type {kind}: expected one of {', '.join(known)} for {to}")
    settings = _gptq_settings(arguments)
    source = open_checkpoint(arguments.source)
    for place, strength in map(parse_adapter, arguments.lora):
        source = with_lora(source, Path(place), strength)
    plan: GGUFPlan | HFPlan
    if to == "gguf":
        plan = plan_gguf(source, kind or AS_STORED, arguments.vocab_only)
    elif arguments.vocab_only:
        raise ConvertError("--vocab-only writes a GGUF file; give DST a name ending in .gguf")
    elif settings is not None:
        plan = plan_gptq(source, settings, parse_size(arguments.max_shard_size))
    else:
        plan = plan_hf(source, kind, parse_size(arguments.max_shard_size))
    if arguments.dump:
        _dump(plan)
        return 0
    read = [arguments.source, *source.files, *([arguments.calibration] if arguments.calibration else [])]
    check_target(target, read, arguments.force)
    bar = ProgressBar()
    try:
        if isinstance(plan, GGUFPlan):
            write_gguf(source, plan, target, bar)
        elif isinstance(plan, GPTQPlan):
            write_gptq(source, plan, target, bar)
        else:
            write_hf(source, plan, target, bar)
    finally:
        bar.close()
    print(f"{target}: {plan.nbytes:,} bytes, {len(plan.tensors)} tensors")
    return 0


def _gptq_settings(arguments: argparse.Namespace) -> GPTQSettings | None:
    """What the options of types gptq and rtn say; None for other types, which have none of them."""
    kind = arguments.type
    values = {name: getattr(arguments, name) for name in _GPTQ_OPTIONS}
    given = {name: value for name, value in values.items() if value is not None and value is not False}
    allowed = {"gptq": _GPTQ_OPTIONS, "rtn": _RTN_OPTIONS}.get(kind, ())
    for name in given:
        if name not in allowed:
            fitting = "gptq or rtn" if name in _RTN_OPTIONS else "gptq"
            raise ConvertError(f"--{name.replace('_', '-')} is for --type {fitting}")
    if kind == "gptq" and "calibration" not in given:
        raise ConvertError("--type gptq needs --calibration TEXTFILE, a text to measure by; --type rtn needs none")
    return GPTQSettings(**({"calibration": None} | given)) if kind in GPTQ_TYPES else None


def parse_size(text: str) -> int:
    """Bytes of "5GB", "300MiB", "1000"."""
    number = text.rstrip("BbiIkKmMgG")
    unit = text[len(number) :].lower()
    scale = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}
    try:
        size = int(float(number) * scale[unit])
    except (ValueError, KeyError, OverflowError):
        raise ConvertError(f"'{text}' is no size; write for example 5GB or 300MiB") from None
    if size < 1:
        raise ConvertError(f"'{text}' is no size; it must be at least one byte")
    return size


def _dump(plan: GGUFPlan | HFPlan) -> None:
    for key, value in plan.keys.items():
        shown = f"[{len(value)} values]" if isinstance(value, list) and len(value) > 8 else json.dumps(value)
        print(f"{key} = {shown}")
    for name, tensor in plan.tensors.items():
        print(f"{tensor.name:48} {tensor.format.name:6} {list(tensor.shape)!s:16} {tensor.nbytes:>14,} from {name}")
    print(f"{len(plan.tensors)} tensors, {plan.nbytes:,} bytes")
