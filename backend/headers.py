"""What is known of a preset's model before it is loaded: its numbers and tensors, from headers alone.

Of a model that is not here yet, a published shape by its name, so that one can plan before downloading.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

from backend.checkpoint.base import TensorInfo
from backend.checkpoint.open import config_alone, open_checkpoint
from backend.checkpoint.override import with_overrides
from backend.errors import CheckpointError, PresetError
from backend.model.config import ModelConfig, tensor_shapes
from backend.model.shapes import SHAPES, Shape, is_shape, parse_shape
from backend.models import ModelFolder
from backend.placement.sizes import Tensors
from backend.presets import Preset
from backend.weights.blocks import BF16, BY_NAME, BlockFormat

NOT_HERE = "its model is not here yet"
_STARTER = "shape:smollm2-135m:q4_1"
_FORMAT = re.compile(r"(?:^|[^A-Za-z0-9])(I?Q[2-8]_(?:K|[01]|NL|XS)|BF16|F16|F32)(?![A-Za-z0-9])", re.IGNORECASE)


@dataclass(frozen=True)
class Headers:
    """`note`: one sentence where this is not what a file says; empty where it is."""

    config: ModelConfig
    tensors: Tensors
    note: str = ""


def read_headers(preset: Preset, models: ModelFolder, base: Path) -> Headers:
    """Of the preset's model: its files, its configuration alone, or the shape that its name tells.

    Raises UserError where the files are damaged, or nothing tells what the model is.
    """
    path = _here(preset.model, models, base)
    if path is None:
        return _by_name(preset.model)
    config = None if is_shape(preset.model) else config_alone(path)
    if config is not None:
        return Headers(config, _all_in(config, BF16), f"its weights are not here yet, only {path.name}")
    checkpoint = with_overrides(open_checkpoint(path), dict(preset.overrides))
    return Headers(checkpoint.config, checkpoint.tensors)


def published_shape(model: str) -> Shape | None:
    """The shape of a model that is called after a published one (Llama-2-7b-chat-hf, ...:Q4_K_M); None for others.

    The longest name counts. Only an absent model is ever judged by what it is called.
    """
    if model == "starter":
        return parse_shape(_STARTER)
    place, _, part = model.removeprefix("hub:").partition(":")
    name = place.rstrip("/").rpartition("/")[2].lower().removeprefix("meta-").replace("_", "-")
    found = max((shape for shape in SHAPES if _begins(name, shape)), key=len, default=None)
    if found is None:
        return None
    tag = _FORMAT.search(part) or _FORMAT.search(place)
    return Shape(SHAPES[found], BY_NAME.get(tag[1].upper(), BF16) if tag else BF16)


def _begins(name: str, shape: str) -> bool:
    return name.startswith(shape) and not name[len(shape) : len(shape) + 1].isalnum()


def _here(model: str, models: ModelFolder, base: Path) -> Path | None:
    if is_shape(model):
        return Path(model)
    try:
        return models.local(model, base)
    except PresetError:  # a path that leads nowhere
        return None
    except OSError as error:
        raise CheckpointError(f"{model}: {error.strerror or error}") from None


def _by_name(model: str) -> Headers:
    shape = published_shape(model)
    if shape is None:
        raise PresetError(f"model '{model}' is not here, and its name is that of no published shape: nothing is known")
    return Headers(shape.config, _all_in(shape.config, shape.format), NOT_HERE)


def _all_in(config: ModelConfig, fmt: BlockFormat) -> dict[str, TensorInfo]:
    """Every tensor of a model in one format, where its rows are whole blocks; vectors are plain."""
    tensors = {}
    for name, shape in tensor_shapes(config).items():
        kind = fmt if len(shape) > 1 and shape[-1] % fmt.elements == 0 else BF16
        tensors[name] = TensorInfo(name, shape, kind, math.prod(shape[:-1]) * kind.row_bytes(shape[-1]))
    return tensors
