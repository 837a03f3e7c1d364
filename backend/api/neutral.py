"""Request fields that other servers honour and this one cannot (yet), each with the values that ask for nothing.

Another value is refused by name: a client that asks for tools must not get an answer without them.
A field that becomes a knob in `backend.params` is accepted from then on, without a change here.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from backend.api import dialects
from backend.api.failures import UnsupportedError
from backend.params import KNOBS

Neutral = Mapping[str, tuple[Any, ...]]

_OPENAI: dict[str, tuple[Any, ...]] = {"store": (False,)}
_EXTENSIONS: dict[str, tuple[Any, ...]] = {
    "use_beam_search": (False,),
    "truncate_prompt_tokens": (),
}
CHAT: Neutral = MappingProxyType(
    _OPENAI
    | _EXTENSIONS
    | {
        "tools": ([],),
        "tool_choice": ("", {}, "none", "auto"),
        "functions": ([],),
        "function_call": ("", {}, "none", "auto"),
        "modalities": ([], ["text"]),
        "audio": ({},),
        "prediction": ({},),
        "web_search_options": (),
        "reasoning_effort": ("none",),
        "verbosity": ("medium",),
        "add_generation_prompt": (True,),
        "continue_final_message": (False,),
        "chat_template": ("",),
        "chat_template_kwargs": ({},),
    }
)
COMPLETION: Neutral = MappingProxyType(
    _OPENAI
    | _EXTENSIONS
    | {
        "suffix": ("",),
    }
)
_KNOB_NAMES = frozenset(knob.name for knob in KNOBS) | dialects.known()


def refuse_unsupported(body: Mapping[str, Any], fields: Neutral) -> None:
    """Raise UnsupportedError for the first field that asks for something we do not do. null asks for nothing."""
    for name, value in body.items():
        if value is None or name not in fields or name in _KNOB_NAMES:
            continue
        if not any(_same(value, neutral) for neutral in fields[name]):
            raise UnsupportedError(f"this server does not support that value of '{name}' yet; leave it out", param=name)


def _same(value: Any, neutral: Any) -> bool:
    """Equality in which `true` is not 1 and `false` is not 0."""
    if isinstance(value, bool) or isinstance(neutral, bool):
        return value is neutral
    return bool(value == neutral)
