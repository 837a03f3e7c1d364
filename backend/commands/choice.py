"""--preset and --model for commands: which model, run how."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from backend.commands.terminal import ProgressBar
from backend.presets import Preset
from backend.service import Service
from backend.settings import Settings


def add_choice(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", metavar="NAME_OR_FILE", help="a preset (default: starter)")
    parser.add_argument("--model", metavar="PATH", help="a model file to use in place of the preset's")


def chosen(service: Service, preset_name: str | None, model: str | None) -> Preset:
    """The preset asked for, with its model replaced when a path is given."""
    preset = service.read_preset(preset_name or "starter")
    if model is None:
        return preset
    return dataclasses.replace(preset, name=Path(model).stem, title=Path(model).stem, model=str(Path(model).resolve()))


def loaded_service(preset_name: str | None, model: str | None) -> Service:
    """A service with the chosen preset loaded, progress on stderr."""
    service = Service(Settings())
    bar = ProgressBar()
    try:
        service.load_preset(chosen(service, preset_name, model), bar)
    finally:
        bar.close()
    return service
