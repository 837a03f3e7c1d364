"""Presets: YAML files that say how to run a model. Strict: a key, type or value that does not fit is an error.

The file names come from listing the presets folder, never from a request, so no name can point elsewhere.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from backend.errors import ParameterError, PresetError, nearest
from backend.params import GenerationParams

WEIGHTS = ("original", "bf16", "f16", "f32")
DEVICES = ("auto", "cpu")
KV_CACHES = ("auto", "f32", "bf16", "f16")
# auto: the model's own, else what its vocabulary or name says. The others are those of backend/text/formats.py.
PROMPT_FORMATS = (
    "auto", "llama-2", "llama-3", "alpaca", "vicuna-v0", "vicuna-v1.1", "koala", "chatml", "mistral", "mistral-v1",
    "mistral-v3", "mistral-tekken", "mistral-v7", "mistral-v7-tekken", "zephyr",
)  # fmt: skip
# Numbers of a model that may be corrected, and their ranges.
OVERRIDES = {"norm_eps": (1e-12, 1e-1), "rope_theta": (1.0, 1e15), "rope_factor": (1e-3, 1e6), "context": (64, 1 << 24)}
MAX_PRESET_BYTES = 1 << 16
MAX_DIGITS = 64  # of a whole number, in any base


@dataclass(frozen=True)
class Preset:
    """How to run one model. Defaults are what an absent key means."""

    name: str
    model: str  # a file or folder | hub:org/repo[:file] | `starter`
    title: str = ""
    weights: str = "original"
    device: str = "auto"
    context: int | None = None  # tokens of one chat; None: what the model was made for
    kv_cache: str = "auto"  # type of cached keys and values; auto: f32 for f32 weights, else bf16
    kv_tokens: int | None = None  # tokens the cache holds for all chats together; None: twice the context
    prompt_format: str = "auto"  # one of PROMPT_FORMATS, or FILE.jinja
    overrides: tuple[tuple[str, float], ...] = ()  # numbers that the model's files leave out, by name: OVERRIDES
    lora: tuple[str, ...] = ()  # adapters on top of the model, each PATH or PATH=STRENGTH
    sampling: GenerationParams = field(default_factory=GenerationParams)


_KEYS = tuple(f.name for f in dataclasses.fields(Preset) if f.name != "name") + ("extends",)
_CHOICES = {"weights": WEIGHTS, "device": DEVICES, "kv_cache": KV_CACHES}


class PresetFolder:
    """All presets of a folder, read when asked so that an edited file counts at once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def names(self) -> list[str]:
        """Names in the order of the folder listing: `auto` and the starter first, then by name."""
        found = sorted(path.stem for path in self.folder.glob("*.yaml")) if self.folder.is_dir() else []
        return sorted(found, key=lambda name: (name != "auto", name != "starter", name))

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
        sampling = GenerationParams.from_mapping(values.pop("sampling", {}))
        return Preset(name=path.stem, sampling=sampling, **values)

    def _merged(self, path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
        """The file's checked values on top of those of the preset it extends."""
        if path in seen:
            raise PresetError(f"{path}: 'extends' leads back to itself")
        values = _checked_values(path, _parse(path))
        other = values.pop("extends", None)
        if other is None:
            return values
        if other not in self.names():
            raise PresetError(f"{path}: extends '{other}', which is no preset here{nearest(other, self.names())}")
        base = self._merged(self.folder / f"{other}.yaml", (*seen, path))
        if "sampling" in base and "sampling" in values:
            values["sampling"] = base["sampling"] | values["sampling"]
        return base | values


def _parse(path: Path) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(MAX_PRESET_BYTES + 1)
    except FileNotFoundError:
        raise PresetError(f"{path}: there is no such preset file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise PresetError(f"{path}: cannot be read ({error})") from None
    if len(text) > MAX_PRESET_BYTES:
        raise PresetError(f"{path}: a preset has at most {MAX_PRESET_BYTES} characters")
    try:
        values = _StrictLoader(text).get_single_data()
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date or number that cannot be one
        raise PresetError(f"{path}: {_one_line(error)}") from None
    except RecursionError:
        raise PresetError(f"{path}: lists within lists within lists; a preset is lines of 'key: value'") from None
    if not isinstance(values, dict):
        raise PresetError(f"{path}: expected lines of the form 'key: value'")
    return values


class _StrictLoader(yaml.SafeLoader):
    """Plain values only: no tags that make objects (SafeLoader), no aliases (small files that unfold to gigabytes), no
    key twice (the second would win silently)."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not allowed in a preset")
        return super().compose_node(parent, index)

    def compose_scalar_node(self, anchor: Any) -> Any:
        node = super().compose_scalar_node(anchor)
        if node.tag == "tag:yaml.org,2002:int" and len(node.value) > MAX_DIGITS:  # too long for Python to write out
            raise yaml.YAMLError(f"a whole number of {len(node.value)} digits")
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable):  # a list is refused below
                if key in seen:
                    raise yaml.YAMLError(f"the key '{key}' appears twice")
                seen.add(key)
        return super().construct_mapping(node, deep)


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


def _listed(choices: Iterable[str]) -> str:
    return ", ".join(choices)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
