"""What other servers call our parameters: fields of llama.cpp, text-generation-webui, KoboldCpp and vLLM -> knobs.

A field is only ever another spelling here. Values that mean "off" elsewhere and something else with us are turned into
ours. A knob's own name in the request wins over any other name for it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from backend.errors import ParameterError
from backend.params import KNOBS

Values = dict[str, Any]
_PENALTIES_OFF = {"repetition_penalty": 1.0, "frequency_penalty": 0.0, "presence_penalty": 0.0}
_NEUTRAL = {knob.name: knob.neutral for knob in KNOBS}

# The same value under another name.
_RENAMED: Mapping[str, str] = MappingProxyType(
    {
        "repeat_penalty": "repetition_penalty",
        "rep_pen": "repetition_penalty",
        "repetition_penalty_range": "repetition_range",
        "rep_pen_range": "repetition_range",
        "rep_pen_slope": "repetition_slope",
        "no_repeat_ngram_size": "no_repeat_ngram",
        "dry_allowed_len": "dry_allowed_length",
        "mirostat_mode": "mirostat",
        "ban_eos_token": "ignore_eos",
        "bad_words": "banned_strings",
        "max_tokens_second": "max_tokens_per_second",
        "n_keep": "keep_tokens",
        "cfg_scale": "guidance_scale",
        "cfg_negative_prompt": "negative_prompt",
        "grammar_string": "grammar",
        "guided_grammar": "grammar",
        "guided_regex": "regex",
    }
)
# Cuts under their names, with the values that mean "off" elsewhere, and what that is here.
_OFF: Mapping[str, tuple[str, tuple[float, ...], float]] = MappingProxyType(
    {
        **dict.fromkeys(("typical_p", "typ_p", "typical"), ("typical_p", (0,), 1.0)),
        **dict.fromkeys(("tfs", "tfs_z"), ("tfs", (0,), 1.0)),
        **dict.fromkeys(("top_n_sigma", "top_nsigma", "nsigma"), ("top_n_sigma", (-1,), 0.0)),
    }
)
# Steps of the chain under other names; the empty ones are no step with us.
_STEPS: Mapping[str, str] = MappingProxyType(
    {
        "repetition_penalty": "penalties", "presence_penalty": "penalties", "frequency_penalty": "penalties",
        "typ_p": "typical_p", "typical": "typical_p", "tfs_z": "tfs", "quadratic_sampling": "smoothing",
        "dynamic_temperature": "temperature", "mirostat": "", "infill": "", "encoder_repetition_penalty": "",
    }
)  # fmt: skip
_OVERRULE = ("dynamic_temperature", "samplers")  # fields that say whether the others count
# What switches a step off, for `samplers`: there, a step that is not named is not done.
_SWITCHES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "penalties": tuple(_PENALTIES_OFF), "dry": ("dry_multiplier",), "no_repeat_ngram": ("no_repeat_ngram",),
        "xtc": ("xtc_probability",), "smoothing": ("smoothing_factor",),
        "temperature": ("temperature", "dynatemp_low", "dynatemp_high"),
        **{name: (name,) for name in ("top_n_sigma", "top_k", "tfs", "typical_p", "top_p", "min_p", "top_a",
                                      "epsilon_cutoff", "eta_cutoff")},
    }
)  # fmt: skip


def translated(body: Mapping[str, Any]) -> Values:
    """The knobs that a request sets under other names, or with other servers' values for "off". null sets nothing."""
    found: Values = {}
    for name, value in body.items():
        if value is None:
            continue
        values: Values = {}
        if name in _RENAMED:
            values = {_RENAMED[name]: value}
        elif name in _OFF:
            knob, marks, off = _OFF[name]
            values = {knob: off if _is_number(value) and value in marks else value}
        elif name in _SPECIAL:
            values = _SPECIAL[name](value, body)
        for knob, wanted in values.items():
            if body.get(knob) is None or name == knob or name in _OVERRULE:
                found[knob] = wanted
    return found


def known() -> frozenset[str]:
    """Every field that is read here."""
    return frozenset({*_RENAMED, *_OFF, *_SPECIAL})


def _last_n(value: Any, body: Mapping[str, Any]) -> Values:
    """llama.cpp: 0 switches the penalties off, -1 is the whole context."""
    if value == 0 and _is_number(value):
        return dict(_PENALTIES_OFF)
    return {"repetition_range": 0 if value == -1 else value}


def _dry_last_n(value: Any, body: Mapping[str, Any]) -> Values:
    if value == 0 and _is_number(value):
        return {"dry_multiplier": 0.0}
    return {"dry_range": 0 if value == -1 else value}


def _breakers(value: Any, body: Mapping[str, Any]) -> Values:
    """A list, or (text-generation-webui) a text of JSON strings with commas between."""
    if isinstance(value, str):
        try:
            value = json.loads(value if value.lstrip().startswith("[") else f"[{value}]")
        except ValueError:
            raise ParameterError(
                "dry_sequence_breakers: expected a list of texts", param="dry_sequence_breakers"
            ) from None
    return {"dry_breakers": value}


def _temperature_range(value: Any, body: Mapping[str, Any]) -> Values:
    """llama.cpp: the temperature plus and minus this."""
    base = body.get("temperature", _NEUTRAL["temperature"])
    if not _is_number(value) or value < 0 or not _is_number(base):
        raise ParameterError(f"dynatemp_range: found {value!r}, expected a number from 0", param="dynatemp_range")
    return {"dynatemp_low": max(0.0, base - value), "dynatemp_high": base + value} if value else {}


def _dynamic(value: Any, body: Mapping[str, Any]) -> Values:
    """text-generation-webui sends the two ends in any case, and this says whether they count."""
    if not isinstance(value, bool):
        raise ParameterError("dynamic_temperature: expected true or false", param="dynamic_temperature")
    return {} if value else {"dynatemp_low": 0.0, "dynatemp_high": 0.0}


def _samplers(value: Any, body: Mapping[str, Any]) -> Values:
    """llama.cpp: the order, and what is not named is not done."""
    names = _order(value, "samplers")
    off = [switch for step, switches in _SWITCHES.items() if step not in names for switch in switches]
    return {"sampler_order": names, **{name: _NEUTRAL[name] for name in off}}


def _priority(value: Any, body: Mapping[str, Any]) -> Values:
    return {"sampler_order": _order(value, "sampler_priority")}


def _order(value: Any, field: str) -> tuple[str, ...]:
    names = re.split(r"[,\s]+", value.strip()) if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ParameterError(f"{field}: expected a list of samplers", param=field)
    ours = (_STEPS.get(name, name) for name in names)
    return tuple(dict.fromkeys(name for name in ours if name))


def _response_format(value: Any, body: Mapping[str, Any]) -> Values:
    """OpenAI's: text, json_object, json_schema."""
    field = "response_format"
    if not isinstance(value, dict):
        raise ParameterError(f"{field}: expected an object with type", param=field)
    kind = value.get("type", "text")
    if kind == "text":
        return {}
    if kind == "json_object":
        return {"json_schema": _schema(value.get("schema") or {"type": "object"}, field)}
    if kind != "json_schema":
        raise ParameterError(f"{field}.type: expected text, json_object or json_schema", param=f"{field}.type")
    wrapped = value.get("json_schema")
    schema = wrapped.get("schema") if isinstance(wrapped, dict) else value.get("schema")  # llama.cpp has it flat
    if schema is None:
        raise ParameterError(f"{field}.json_schema: expected an object with schema", param=f"{field}.json_schema")
    return {"json_schema": _schema(schema, field)}


def _json(value: Any, body: Mapping[str, Any]) -> Values:
    return {"json_schema": _schema(value, "json_schema")} if value else {}


def _choice(value: Any, body: Mapping[str, Any]) -> Values:
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise ParameterError("guided_choice: expected a list of texts", param="guided_choice")
    return {"regex": "|".join(_literal(text) for text in value)} if value else {}


def _structured(value: Any, body: Mapping[str, Any]) -> Values:
    """vLLM's newer way of the same."""
    field = "structured_outputs"
    if not isinstance(value, dict):
        raise ParameterError(f"{field}: expected an object", param=field)
    found: Values = {}
    for name, part in value.items():
        if part is None or part is False:
            continue
        if name == "json":
            found |= _json(part, body)
        elif name == "json_object":
            found["json_schema"] = '{"type": "object"}'
        elif name == "choice":
            found |= _choice(part, body)
        elif name in ("regex", "grammar"):
            found[name] = part
        else:
            raise ParameterError(f"{field}.{name}: expected json, regex, choice or grammar", param=field)
    return found


def _bias(value: Any, body: Mapping[str, Any]) -> Values:
    """llama.cpp's pairs, where false bans a token; OpenAI's object is the knob's own form."""
    if not isinstance(value, list):
        return {}
    pairs = [[pair[0], -100.0 if pair[1] is False else pair[1]] if _is_pair(pair) else pair for pair in value]
    return {"logit_bias": pairs}


def _schema(value: Any, field: str) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, dict):
        raise ParameterError(f"{field}: expected a JSON schema, an object", param=field)
    return json.dumps(value)


def _literal(text: str) -> str:
    """A regular expression, in Rust's dialect, that matches this text only."""
    return "".join(f"\\{letter}" if letter in r"\.+*?()|[]{}^$#&-~/" else letter for letter in text)


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_SPECIAL: Mapping[str, Callable[[Any, Mapping[str, Any]], Values]] = MappingProxyType(
    {
        "repeat_last_n": _last_n,
        "penalty_last_n": _last_n,
        "dry_penalty_last_n": _dry_last_n,
        "dry_sequence_breakers": _breakers,
        "dynatemp_range": _temperature_range,
        "dynamic_temperature": _dynamic,
        "samplers": _samplers,
        "sampler_priority": _priority,
        "response_format": _response_format,
        "json_schema": _json,
        "guided_json": _json,
        "guided_choice": _choice,
        "structured_outputs": _structured,
        "logit_bias": _bias,
    }
)
