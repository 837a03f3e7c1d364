"""Request fields that other servers honour and this one cannot (yet), each with the values that ask for nothing.

Another value is refused by name: a client that measures with `logit_bias` or `n` must not get an answer without them.
A field that becomes a knob in `backend.params` is accepted from then on, without a change here.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from backend.api.failures import UnsupportedError
from backend.params import KNOBS

Neutral = Mapping[str, tuple[Any, ...]]

_OPENAI: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "store": (False,),
}
_EXTENSIONS: dict[str, tuple[Any, ...]] = {
    "typical_p": (0, 1),
    "typical": (0, 1),
    "tfs": (0, 1),
    "tfs_z": (0, 1),
    "top_a": (0,),
    "top_n_sigma": (0, -1),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "xtc_probability": (0,),
    "dry_multiplier": (0,),
    "smoothing_factor": (0,),
    "dynatemp_range": (0,),
    "mirostat": (0,),
    "mirostat_mode": (0,),
    "repeat_penalty": (1,),
    "no_repeat_ngram_size": (0,),
    "guidance_scale": (1,),
    "negative_prompt": ("",),
    "min_tokens": (0,),
    "ignore_eos": (False,),
    "ban_eos_token": (False,),
    "stop_token_ids": ([],),
    "bad_words": ([],),
    "use_beam_search": (False,),
    "grammar": ("",),
    "grammar_string": ("",),
    "json_schema": ({},),
    "guided_json": ({},),
    "guided_regex": ("",),
    "guided_choice": ([],),
    "guided_grammar": ("",),
    "structured_outputs": ({},),
    "prompt_logprobs": (),
}
CHAT: Neutral = MappingProxyType(
    _OPENAI
    | _EXTENSIONS
    | {
        "tools": ([],),
        "tool_choice": ("", {}, "none", "auto"),
        "functions": ([],),
        "function_call": ("", {}, "none", "auto"),
        "response_format": ({}, {"type": "text"}),
        "logprobs": (False,),
        "top_logprobs": (0,),
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
        "best_of": (1,),
        "logprobs": (False,),  # not 0: there it asks for the chosen token's own log probability
        "echo": (False,),
        "suffix": ("",),
        "response_format": ({}, {"type": "text"}),
    }
)
_KNOB_NAMES = frozenset(knob.name for knob in KNOBS)


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
