"""--preset and --model for commands: which model, run how."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from backend.checkpoint.lora import parse_adapter
from backend.commands.terminal import ProgressBar
from backend.model.shapes import PREFIX, is_shape
from backend.presets import Preset
from backend.service import Service
from backend.settings import Settings


def add_choice(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", metavar="NAME_OR_FILE", help="a preset (default: starter)")
    parser.add_argument(
        "--model", metavar="PATH", help="a model (file, folder or hub:org/repo[:file]) to use in place of the preset's"
    )
    parser.add_argument(
        "--lora", metavar="PATH[=STRENGTH]", action="append", default=[], help="an adapter on top; may be repeated"
    )


def chosen(service: Service, arguments: argparse.Namespace) -> Preset:
    """The preset asked for, with its model and adapters replaced when they are given."""
    preset = service.read_preset(arguments.preset or "starter")
    if arguments.model is not None:
        preset = with_model(preset, arguments.model)
    if arguments.lora:
        preset = dataclasses.replace(preset, lora=tuple(map(_from_here, arguments.lora)))
    return preset


def _from_here(adapter: str) -> str:
    """A path on the command line counts from the current folder, as that of a model does."""
    place, strength = parse_adapter(adapter)
    return f"{Path(place).resolve()}={strength}" if Path(place).exists() else adapter


def with_model(preset: Preset, model: str) -> Preset:
    """Another model in the preset's place: what was said of the first, its prompt format and adapters, goes with it."""
    if model.startswith("hub:") or model == "starter":
        name, place = model.removeprefix("hub:").rpartition("/")[2].replace(":", " "), model
    elif is_shape(model):
        name, place = model.removeprefix(PREFIX).replace(":", " "), model
    else:
        path = Path(model)
        name, place = (path.name if path.is_dir() else path.stem), str(path.resolve())
    return dataclasses.replace(preset, name=name, title=name, model=place, prompt_format="auto", lora=(), overrides=())


def loaded_service(arguments: argparse.Namespace) -> Service:
    """A service with the chosen preset loaded, progress on stderr."""
    service = Service(Settings())
    bar = ProgressBar()
    try:
        service.load_preset(chosen(service, arguments), bar)
    finally:
        bar.close()
    return service
