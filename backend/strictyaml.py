"""A YAML file of plain 'key: value' lines, read strictly: one of its forms and nothing of its magic."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from backend.errors import PresetError

MAX_PRESET_BYTES = 1 << 16
MAX_DIGITS = 64  # of a whole number, in any base


def read_yaml(path: Path) -> dict[Any, Any]:
    """The keys and values of a file. Raises PresetError with one sentence that names it."""
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


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
