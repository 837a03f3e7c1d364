"""Presets: YAML files that say how to run a model. Strict: a key, type or value that does not fit is an error.

The file names come from listing the presets folder, never from a request, so no name can point elsewhere.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from backend.errors import ParameterError, PresetError, nearest
from backend.params import GenerationParams
from backend.strictyaml import read_yaml
from backend.units import parse_bytes

# original: as the file holds them. How each is kept: docs/presets.md, backend/placement/linears.py.
WEIGHTS = ("original", "bf16", "f16", "f32", "llm-int8", "int8", "int4", "nf4")
DEVICES = ("auto", "cuda", "mps", "cpu")  # and cuda:N; auto: the first of the others that this machine has
# What is offloaded: everything, or one half of every layer. docs/presets.md tells the seeds' names for them.
PLACEMENTS = ("auto", "gpu", "cpu", "offload-all", "offload-ff", "offload-attention")
# Weights that `placement: {resident: [...]}` can name: those of the layers, and the two large tables.
RESIDENT = ("wq", "wk", "wv", "wo", "w1", "w2", "w3", "output", "tok_embeddings")
KV_CACHES = ("auto", "f32", "bf16", "f16", "int8")
SPECULATION = ("auto", "off")  # guess coming tokens from the chat itself, where that pays; or never
# auto: the model's own, else what its vocabulary or name says. The others are those of backend/text/formats.py.
PROMPT_FORMATS = (
    "auto", "llama-2", "llama-3", "alpaca", "vicuna-v0", "vicuna-v1.1", "koala", "chatml", "mistral", "mistral-v1",
    "mistral-v3", "mistral-tekken", "mistral-v7", "mistral-v7-tekken", "zephyr",
)  # fmt: skip
# Numbers of a model that may be corrected, and their ranges.
OVERRIDES = {"norm_eps": (1e-12, 1e-1), "rope_theta": (1.0, 1e15), "rope_factor": (1e-3, 1e6), "context": (64, 1 << 24)}
_CUDA = re.compile(r"cuda:(0|[1-9][0-9]?)")


@dataclass(frozen=True)
class DraftPreset:
    """Another preset, of a small model with the same vocabulary, that guesses what this one will say."""

    name: str


@dataclass(frozen=True)
class Preset:
    """How to run one model. Defaults are what an absent key means."""

    name: str
    model: str  # a file or folder | hub:org/repo[:file] | `starter`
    title: str = ""
    weights: str = "original"
    device: str = "auto"
    vram: int | None = None  # bytes of the GPU for everything; None: what is free, less a margin
    ram: int | None = None  # bytes of memory for weights and cache; None: what is free, less a margin
    placement: str | tuple[str, ...] = "auto"  # one of PLACEMENTS, or the weights that stay resident: RESIDENT
    context: int | None = None  # tokens of one chat; None: what the model was made for
    kv_cache: str = "auto"  # type of cached keys and values; auto: f32 for f32 weights, else bf16
    kv_tokens: int | None = None  # tokens the cache holds for all chats together; None: twice the context
    cache_ram: int | None = None  # bytes of memory for blocks that had to leave the cache; None: for us to say
    prompt_format: str = "auto"  # one of PROMPT_FORMATS, or FILE.jinja
    speculation: str | DraftPreset = "auto"  # one of SPECULATION, or who guesses; it never changes what is said
    overrides: tuple[tuple[str, float], ...] = ()  # numbers that the model's files leave out, by name: OVERRIDES
    lora: tuple[str, ...] = ()  # adapters on top of the model, each PATH or PATH=STRENGTH
    sampling: GenerationParams = field(default_factory=GenerationParams)


_KEYS = tuple(f.name for f in dataclasses.fields(Preset) if f.name != "name") + ("extends",)
_CHOICES = {"weights": WEIGHTS, "kv_cache": KV_CACHES, "speculation": SPECULATION}


class PresetFolder:
    """All presets of a folder, read when asked so that an edited file counts at once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def names(self) -> list[str]:
        """Names in the order of the folder listing: `auto` and the starter first, then by name."""
        found = [path.stem for path in self.folder.glob("*.yaml")] if self.folder.is_dir() else []
        return sorted(found, key=lambda name: (name != "auto", name != "starter", _by_number(name)))

    def read(self, name: str) -> Preset:
        """Read one preset by its name in this folder."""
        known = self.names()
        if name not in known:
            raise PresetError(f"there is no preset '{name}' in {self.folder}{nearest(name, known)}")
        return self._read_file(self.folder / f"{name}.yaml", ())

    def read_file(self, path: Path) -> Preset:
        """Read a preset from any file, for a path given on the command line."""
        return self._read_file(path, ())

    def _read_file(self, path: Path, seen: tuple[Path, ...]) -> Preset:
        values = self._merged(path, seen)
        if "model" not in values:
            raise PresetError(f"{path}: the key 'model' is missing; it says which model to run")
        draft, known = values.get("speculation"), self.names()
        if isinstance(draft, DraftPreset) and (draft.name not in known or draft.name == path.stem):
            what = "itself" if draft.name == path.stem else f"no preset here{nearest(draft.name, known)}"
            raise PresetError(f"{path}: speculation: draft '{draft.name}' is {what}")
        sampling = GenerationParams.from_mapping(values.pop("sampling", {}))
        return Preset(name=path.stem, sampling=sampling, **values)

    def _merged(self, path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
        """The file's checked values on top of those of the preset it extends."""
        if path in seen:
            raise PresetError(f"{path}: 'extends' leads back to itself")
        values = _checked_values(path, read_yaml(path))
        other = values.pop("extends", None)
        if other is None:
            return values
        if other not in self.names():
            raise PresetError(f"{path}: extends '{other}', which is no preset here{nearest(other, self.names())}")
        base = self._merged(self.folder / f"{other}.yaml", (*seen, path))
        if "sampling" in base and "sampling" in values:
            values["sampling"] = base["sampling"] | values["sampling"]
        return base | values


def _by_number(name: str) -> list[tuple[int, str]]:
    """Sorts 8gb before 10gb."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"([0-9]{1,9})", name)]


def _checked_values(path: Path, values: dict[Any, Any]) -> dict[str, Any]:
    checked: dict[str, Any] = {}
    for key, value in values.items():
        if key not in _KEYS:
            known = ", ".join(_KEYS)
            raise PresetError(f"{path}: unknown key '{key}'{nearest(str(key), _KEYS) or f'; known keys: {known}'}")
        checked[key] = _checked_value(path, key, value)
    return checked


def _checked_value(path: Path, key: str, value: Any) -> Any:
    if key in ("context", "kv_tokens"):
        return _checked_tokens(path, key, value)
    if key == "speculation" and not isinstance(value, str):
        return _checked_speculation(path, value)
    if key == "cache_ram" and value in ("off", 0):  # YAML takes a plain `off` for False, which is 0
        return 0
    if key in ("vram", "ram", "cache_ram"):
        return _checked_budget(path, key, value)
    if key == "placement":
        return _checked_placement(path, value)
    if key == "device":
        return _checked_device(path, value)
    if key == "sampling":
        if not isinstance(value, dict):
            raise PresetError(f"{path}: sampling is {value!r}, expected a list of 'parameter: value'")
        try:
            GenerationParams.from_mapping(value)
        except ParameterError as error:
            raise PresetError(f"{path}: sampling: {error.message}") from None
        return value
    if key == "overrides":
        return _checked_overrides(path, value)
    if key == "lora":
        paths = value if isinstance(value, list) else [value]
        if not paths or not all(isinstance(entry, str) and entry.strip() for entry in paths):
            raise PresetError(f"{path}: lora is {value!r}, expected the path of an adapter or a list of them")
        return tuple(paths)
    if not isinstance(value, str) or not value.strip():
        raise PresetError(f"{path}: {key} is {value!r}, expected a text")
    choices = _CHOICES.get(key)
    if choices and value not in choices:
        raise PresetError(f"{path}: {key} is '{value}', expected one of {_listed(choices)}{nearest(value, choices)}")
    if key == "prompt_format" and value not in PROMPT_FORMATS and not value.endswith(".jinja"):
        raise PresetError(
            f"{path}: prompt_format is '{value}', expected one of {_listed(PROMPT_FORMATS)} or a file ending in .jinja"
            f"{nearest(value.lower(), PROMPT_FORMATS)}"
        )
    if key == "prompt_format" and value.endswith(".jinja") and (path.parent / value).is_file():
        return str(path.parent / value)  # beside the preset
    return value


def _checked_speculation(path: Path, value: Any) -> str | DraftPreset:
    if value is False:  # what YAML takes a plain `off` for
        return "off"
    if isinstance(value, dict) and list(value) == ["draft"] and isinstance(value["draft"], str):
        return DraftPreset(value["draft"])
    raise PresetError(f"{path}: speculation is {value!r}, expected one of {_listed(SPECULATION)} or {{draft: PRESET}}")


def _checked_overrides(path: Path, value: Any) -> tuple[tuple[str, float], ...]:
    if not isinstance(value, dict):
        raise PresetError(f"{path}: overrides is {value!r}, expected a list of 'name: number'")
    for name, number in value.items():
        if name not in OVERRIDES:
            known = nearest(str(name), OVERRIDES) or f"; known names: {_listed(OVERRIDES)}"
            raise PresetError(f"{path}: overrides: unknown name '{name}'{known}")
        low, high = OVERRIDES[name]
        whole = name != "context" or isinstance(number, int)
        if isinstance(number, bool) or not isinstance(number, int | float) or not whole or not low <= number <= high:
            raise PresetError(f"{path}: overrides: {name} is {number!r}, expected a number from {low:g} to {high:g}")
    return tuple(value.items())


def _checked_tokens(path: Path, key: str, value: Any) -> int | None:
    if value == "auto":
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 64 <= value <= 1 << 24:
        raise PresetError(f"{path}: {key} is {value!r}, expected 'auto' or a number of tokens from 64 to {1 << 24}")
    return value


def _checked_budget(path: Path, key: str, value: Any) -> int | None:
    if value == "auto":
        return None
    try:
        return parse_bytes(value if isinstance(value, str | int) else str(value))
    except ValueError as error:
        raise PresetError(f"{path}: {key} is {value!r}; {error}, or auto") from None


def _checked_device(path: Path, value: Any) -> str:
    if isinstance(value, str) and (value in DEVICES or _CUDA.fullmatch(value)):
        return value
    hint = nearest(str(value), DEVICES)
    raise PresetError(f"{path}: device is {value!r}, expected one of {_listed(DEVICES)} or cuda:N{hint}")


def _checked_placement(path: Path, value: Any) -> str | tuple[str, ...]:
    if isinstance(value, str) and value in PLACEMENTS:
        return value
    if isinstance(value, dict) and list(value) == ["resident"] and isinstance(value["resident"], list):
        for name in value["resident"]:
            if name not in RESIDENT:
                known = nearest(str(name), RESIDENT) or f"; known names: {_listed(RESIDENT)}"
                raise PresetError(f"{path}: placement: resident: unknown weight {name!r}{known}")
        return tuple(name for name in RESIDENT if name in value["resident"])
    hint = nearest(value, PLACEMENTS) if isinstance(value, str) else ""
    raise PresetError(
        f"{path}: placement is {value!r}, expected one of {_listed(PLACEMENTS)} or {{resident: [w1, w2, ...]}}{hint}"
    )


def _listed(choices: Iterable[str]) -> str:
    return ", ".join(choices)
