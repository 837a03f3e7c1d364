"""The filters and text methods whose results Jinja does not bound, each with a look at the size before it is made.

They take the sandbox first (its `tick` and `check`, see sandbox.py) and otherwise do what Jinja's and Python's do.
"""

from __future__ import annotations

import json
import math
import re
import string
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import jinja2
from jinja2.filters import make_attrgetter

MAX_WIDTH = 1000  # characters that a text may be padded or indented by
MAX_FORM = 256  # characters of a date format
_MAX_DIGITS = 32  # of a rounded number
_LONGEST_NUMBER = 512  # characters of 1e308 with 99 decimals, and of whole numbers in this sandbox

# %s, %d, %05.2f, %(name)s: widths and precisions of at most two digits, none taken from the arguments.
_PERCENT_FORM = re.compile(r"(?:[^%]|%%|%(?:\(\w{1,40}\))?[-+0 #]?\d{0,2}(?:\.\d{1,2})?[sdiuxXfFgGeEr])*")


class LimitError(jinja2.TemplateRuntimeError):
    """The template asks for more than a prompt can need."""


class Limits(Protocol):
    """What these functions ask of the sandbox."""

    def tick(self) -> None: ...

    def check(self, letters: int, items: int = 0) -> None: ...


@jinja2.pass_environment
def join(sandbox: Any, values: Iterable[Any], d: str = "", attribute: str | None = None) -> str:
    getter = make_attrgetter(sandbox, attribute) if attribute is not None else str
    letters, texts = 0, []
    for value in values:
        sandbox.tick()
        texts.append(str(getter(value)))
        letters += len(texts[-1]) + len(str(d))
        sandbox.check(letters, len(texts))
    return str(d).join(texts)


@jinja2.pass_environment
def replace(sandbox: Any, text: Any, old: Any, new: Any, count: int | None = None) -> str:
    text, old, new, most = str(text), str(old), str(new), -1 if count is None else count
    found = text.count(old) if most < 0 else min(most, text.count(old))
    sandbox.check(len(text) + found * max(0, len(new) - len(old)))
    return text.replace(old, new, most)


@jinja2.pass_environment
def indent(sandbox: Any, text: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    """Lines after the first (with `first`, that too) moved right; empty lines only with `blank`."""
    text = str(text)
    size = len(width) if isinstance(width, str) else width
    if not 0 <= size <= MAX_WIDTH:
        raise LimitError(f"indent({size}): expected 0 to {MAX_WIDTH}")
    margin = width if isinstance(width, str) else " " * width
    # The added newline makes a last, empty line count, as Jinja has it.
    lines = (text + "\n").splitlines()
    sandbox.check(len(text) + len(lines) * size)
    moved = [margin + line if line or blank else line for line in lines[1:]]
    return "\n".join([(margin if first else "") + lines[0], *moved])


def rounded(value: Any, precision: int = 0, method: str = "common") -> Any:
    if not isinstance(precision, int) or abs(precision) > _MAX_DIGITS:
        raise LimitError(f"round({precision}): expected at most {_MAX_DIGITS} digits")
    if not isinstance(value, int | float):
        raise LimitError(f"round: {type(value).__name__} is no number")
    if method == "common":
        return round(value, precision)
    if method not in ("ceil", "floor"):
        raise jinja2.TemplateRuntimeError(f"round: {method!r} is none of common, ceil, floor")
    scale = 10**precision
    return (math.ceil(value * scale) if method == "ceil" else math.floor(value * scale)) / scale


@jinja2.pass_environment
def total(sandbox: Any, values: Iterable[Any], attribute: str | int | None = None, start: int | float = 0) -> Any:
    """The sum of numbers. Lists are refused: adding them one by one copies all that came before."""
    getter = make_attrgetter(sandbox, attribute) if attribute is not None else lambda value: value
    result = start
    for value in values:
        sandbox.tick()
        number = getter(value)
        if not isinstance(number, int | float):
            raise LimitError(f"sum: {type(number).__name__} is no number")
        result += number
    return result


@jinja2.pass_environment
def percent(sandbox: Any, form: Any, *values: Any, **named: Any) -> str:
    """The filter `format`: '%s'|format(x)."""
    return percent_form(sandbox, str(form), named or values)


def percent_form(sandbox: Limits, form: str, values: Any) -> str:
    """Python's `form % values` for forms that cannot pad to any width they like."""
    if not _PERCENT_FORM.fullmatch(form):
        raise LimitError(f"the format {form[:40]!r} is not allowed")
    longest = max((len(str(part)) for part in values), default=0) if isinstance(values, tuple) else len(str(values))
    sandbox.check(len(form) + form.count("%") * max(longest, _LONGEST_NUMBER))
    return form % values


def braces(sandbox: Limits, form: str) -> Callable[..., str]:
    """`form.format` for fields that only name a value ({}, {0}, {name}): attributes, items and widths are refused."""

    def filled(*values: Any, **named: Any) -> str:
        pieces: list[str] = []
        letters, places = 0, iter(range(len(values)))
        for text, field, spec, conversion in string.Formatter().parse(form):
            sandbox.tick()
            pieces.append(text)
            if field is not None:
                pieces.append(_field(form, field, spec, conversion, values, named, places))
            letters += sum(map(len, pieces[-2:]))
            sandbox.check(letters)
        return "".join(pieces)

    return filled


def _field(
    form: str,
    field: str,
    spec: str | None,
    conversion: str | None,
    values: tuple[Any, ...],
    named: dict[str, Any],
    places: Iterator[int],
) -> str:
    if spec or conversion or not re.fullmatch(r"\d{0,4}|[A-Za-z]\w{0,40}", field):
        raise LimitError(f"the format {form[:40]!r} is not allowed")
    if field and not field.isdecimal():
        return str(named[field])
    return str(values[int(field) if field else next(places, len(values))])


def padded(sandbox: Limits, owner: str, name: str, args: tuple[Any, ...]) -> str:
    """`owner.center(width)` and its kin."""
    width = args[0] if args else None
    if not isinstance(width, int) or width > MAX_WIDTH:
        raise LimitError(f"{name}({width!r}): expected a width of at most {MAX_WIDTH}")
    return str(getattr(owner, name)(*args))


@jinja2.pass_environment
def to_json(
    sandbox: Any,
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """JSON for a model, not for a browser: Jinja's own filter would escape < and > here. Arguments as transformers'."""
    if indent is not None and not (isinstance(indent, int) and 0 <= indent <= 16):
        raise LimitError(f"tojson(indent={indent}): expected 0 to 16")
    if separators is not None:
        separators = tuple(str(part) for part in separators)
        if len(separators) != 2 or max(map(len, separators)) > 16:
            raise LimitError("tojson(separators=...): expected two short texts")
    if indent is None:
        return json.dumps(value, ensure_ascii=ensure_ascii, separators=separators, sort_keys=sort_keys)
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    letters, pieces = 0, []
    for piece in encoder.iterencode(value):  # one by one: deep lists make margins many times longer than their values
        sandbox.tick()
        letters += len(piece)
        sandbox.check(letters)
        pieces.append(piece)
    return "".join(pieces)
