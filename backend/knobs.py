"""What one generation parameter is: its kind, its range, how an outside value becomes one of it.

The parameters themselves are declared in `backend.params`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from backend.errors import ParameterError, nearest

Kind = Literal["int", "float", "seed", "bool", "strings", "text", "ids", "biases", "names"]
NUMBERS = ("int", "float", "seed")  # kinds of one number
LARGEST_TOKEN = 2**31 - 1  # whether the vocabulary has a token is for the loaded model to say
LONGEST_STRING = 1000
MOST_BIASES = 1024


@dataclass(frozen=True)
class Knob:
    """How one parameter is offered and checked. `neutral` makes it do nothing.

    `low` and `high` bound a number and each bias of "biases"; `high` also bounds the count of "strings", "ids" and
    "names" and the letters of a "text". `choices`: what "names" may hold.
    """

    name: str
    kind: Kind
    default: Any
    neutral: Any
    low: float
    high: float
    step: float
    label: str
    help: str
    group: str  # heading in the Parameters tab
    front: bool  # shown without opening a fold
    choices: tuple[str, ...] = ()


def declare(
    default: Any,
    kind: Kind,
    label: str,
    help: str,
    *,
    group: str,
    neutral: Any = None,
    low: float = 0,
    high: float = 0,
    step: float = 1,
    front: bool = False,
    choices: tuple[str, ...] = (),
) -> Any:
    """A dataclass field that is a knob."""
    meta = dict(
        kind=kind, label=label, help=help, group=group, neutral=neutral, low=low, high=high, step=step, front=front,
        choices=choices,
    )  # fmt: skip
    return dataclasses.field(default=default, metadata=meta)


def knobs_of(params: type[Any]) -> tuple[Knob, ...]:
    """The knobs of a dataclass whose fields were made by `declare`, in order."""
    return tuple(Knob(name=f.name, default=f.default, **f.metadata) for f in dataclasses.fields(params))


def checked(knob: Knob, value: Any) -> Any:
    """Return `value` in the knob's own type, or raise a sentence naming the parameter, the value and the range."""
    special = _CHECKS.get(knob.kind)
    if special is not None:
        return special(knob, value)
    if knob.kind == "seed" and (value is None or value == ""):
        return None
    number = _number(knob, value)
    if knob.kind == "float":
        return float(number)
    if number != int(number):
        raise ParameterError(f"{knob.name}: found {value!r}, expected a whole number", param=knob.name)
    return int(number)


def _number(knob: Knob, value: Any) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ParameterError(f"{knob.name}: found {value!r}, expected a number", param=knob.name)
    if not knob.low <= value <= knob.high:  # also refuses NaN, which compares with nothing
        raise ParameterError(
            f"{knob.name}: found {value!r}, expected a value from {knob.low:g} to {knob.high:g}", param=knob.name
        )
    return value


def _flag(knob: Knob, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ParameterError(f"{knob.name}: found {value!r}, expected true or false", param=knob.name)
    return value


def _strings(knob: Knob, value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    texts = (value,) if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise ParameterError(f"{knob.name}: found {value!r}, expected texts", param=knob.name)
    kept = tuple(text for text in texts if text)
    _few(knob, len(kept), "texts")
    if any(len(text) > LONGEST_STRING for text in kept):
        raise ParameterError(f"{knob.name}: a text is longer than {LONGEST_STRING} characters", param=knob.name)
    return kept


def _text(knob: Knob, value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ParameterError(f"{knob.name}: found {value!r}, expected a text", param=knob.name)
    _few(knob, len(value), "letters")
    return value if value.strip() else ""


def _ids(knob: Knob, value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    if not isinstance(value, list | tuple):
        raise ParameterError(f"{knob.name}: found {value!r}, expected token ids", param=knob.name)
    ids = tuple(sorted({_token(knob, item) for item in value}))
    _few(knob, len(ids), "token ids")
    return ids


def _biases(knob: Knob, value: Any) -> tuple[tuple[int, float], ...]:
    """{token: bias}, with the token also as the text that JSON makes of it, or pairs; kept as pairs, sorted."""
    if value is None:
        return ()
    pairs = list(value.items()) if isinstance(value, Mapping) else value
    if not isinstance(pairs, list | tuple) or not all(isinstance(p, list | tuple) and len(p) == 2 for p in pairs):
        raise ParameterError(f"{knob.name}: found {value!r}, expected token ids with a bias for each", param=knob.name)
    biases = {_token(knob, token): float(_number(knob, bias)) for token, bias in pairs}
    if len(biases) > MOST_BIASES:
        raise ParameterError(
            f"{knob.name}: found {len(biases)} biases, at most {MOST_BIASES} are allowed", param=knob.name
        )
    return tuple(sorted(biases.items()))


def _token(knob: Knob, value: Any) -> int:
    if isinstance(value, str) and value.isdecimal() and value.isascii() and len(value) <= 10:
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= LARGEST_TOKEN:
        raise ParameterError(f"{knob.name}: found {value!r}, expected a token id", param=knob.name)
    return value


def _names(knob: Knob, value: Any) -> tuple[str, ...]:
    names = _strings(knob, value)
    for name in names:
        if name not in knob.choices:
            raise ParameterError(f"{knob.name}: there is no '{name}'{nearest(name, knob.choices)}", param=knob.name)
        if names.count(name) > 1:
            raise ParameterError(f"{knob.name}: '{name}' is there twice", param=knob.name)
    return names


def _few(knob: Knob, count: int, what: str) -> None:
    if count > knob.high:
        raise ParameterError(f"{knob.name}: found {count} {what}, at most {knob.high:g} are allowed", param=knob.name)


_CHECKS: Mapping[str, Callable[[Knob, Any], Any]] = {
    "bool": _flag,
    "strings": _strings,
    "text": _text,
    "ids": _ids,
    "biases": _biases,
    "names": _names,
}
