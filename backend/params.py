"""Every generation parameter, declared once.

The Parameters tab, preset `sampling:` sections, the API's request fields and the README table all come from the fields
of `GenerationParams`. To add a parameter: add a field here and a function in `sampling/`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from backend.errors import ParameterError, nearest

Kind = Literal["int", "float", "seed", "strings"]


@dataclass(frozen=True)
class Knob:
    """How one parameter is offered and checked. `low` and `high` bound it everywhere; `neutral` makes it do nothing."""

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


def _knob(
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
) -> Any:
    meta = dict(
        kind=kind, label=label, help=help, group=group, neutral=neutral, low=low, high=high, step=step, front=front
    )
    return dataclasses.field(default=default, metadata=meta)


@dataclass(frozen=True)
class GenerationParams:
    """How to continue a prompt. Construct through `from_mapping` when values come from outside."""

    max_tokens: int = _knob(
        1024, "int", "Reply length", "Most tokens in one reply; 0 means until the context is full.",
        group="Length", neutral=0, low=0, high=131072, step=1, front=True,
    )  # fmt: skip
    temperature: float = _knob(
        0.7, "float", "Temperature", "Higher is more varied; 0 always takes the likeliest token.",
        group="Sampling", neutral=1.0, low=0.0, high=5.0, step=0.05, front=True,
    )  # fmt: skip
    top_p: float = _knob(
        0.95, "float", "Top-p", "Keep the likeliest tokens that together reach this probability; 1 keeps all.",
        group="Sampling", neutral=1.0, low=0.0, high=1.0, step=0.01, front=True,
    )  # fmt: skip
    min_p: float = _knob(
        0.05, "float", "Min-p", "Drop tokens less likely than this share of the likeliest one; 0 keeps all.",
        group="Sampling", neutral=0.0, low=0.0, high=1.0, step=0.01, front=True,
    )  # fmt: skip
    top_k: int = _knob(
        40, "int", "Top-k", "Keep this many of the likeliest tokens; 0 keeps all.",
        group="Sampling", neutral=0, low=0, high=1_000_000, step=1,
    )  # fmt: skip
    repetition_penalty: float = _knob(
        1.0, "float", "Repetition penalty", "Above 1 makes tokens that were already used less likely; 1 does nothing.",
        group="Repetition", neutral=1.0, low=0.1, high=5.0, step=0.01,
    )  # fmt: skip
    stop: tuple[str, ...] = _knob(
        (), "strings", "Stop strings", "The reply ends before any of these texts. One per line.",
        group="Stopping", neutral=(), low=0, high=16,
    )  # fmt: skip
    seed: int | None = _knob(
        None, "seed", "Seed", "The same seed gives the same reply. Leave empty for a new one each time.",
        group="Sampling", neutral=None, low=0, high=2**63 - 1,
    )  # fmt: skip

    def __post_init__(self) -> None:
        for knob in KNOBS:
            object.__setattr__(self, knob.name, _checked(knob, getattr(self, knob.name)))

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], base: GenerationParams | None = None) -> GenerationParams:
        """Build from outside values on top of `base` (or the defaults). Unknown names and bad values raise."""
        names = {knob.name for knob in KNOBS}
        for name in values:
            if name not in names:
                raise ParameterError(f"unknown parameter '{name}'{nearest(str(name), names)}", param=str(name))
        return dataclasses.replace(base or cls(), **dict(values))

    def changed(self) -> dict[str, Any]:
        """The values that differ from the defaults."""
        return {knob.name: getattr(self, knob.name) for knob in KNOBS if getattr(self, knob.name) != knob.default}


def _checked(knob: Knob, value: Any) -> Any:
    """Return `value` in the knob's own type, or raise a sentence naming the parameter, the value and the range."""
    if knob.kind == "seed":
        if value is None or value == "":
            return None
    if knob.kind == "strings":
        return _checked_strings(knob, value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ParameterError(f"{knob.name}: found {value!r}, expected a number", param=knob.name)
    if not knob.low <= value <= knob.high:  # also refuses NaN, which compares with nothing
        raise ParameterError(
            f"{knob.name}: found {value!r}, expected a value from {knob.low:g} to {knob.high:g}", param=knob.name
        )
    if knob.kind == "float":
        return float(value)
    if value != int(value):
        raise ParameterError(f"{knob.name}: found {value!r}, expected a whole number", param=knob.name)
    return int(value)


def _checked_strings(knob: Knob, value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    texts = (value,) if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise ParameterError(f"{knob.name}: found {value!r}, expected texts", param=knob.name)
    kept = tuple(text for text in texts if text)
    if len(kept) > knob.high:
        raise ParameterError(
            f"{knob.name}: found {len(kept)} texts, at most {knob.high:g} are allowed", param=knob.name
        )
    if any(len(text) > 1000 for text in kept):
        raise ParameterError(f"{knob.name}: a stop string is longer than 1000 characters", param=knob.name)
    return kept


def _knobs() -> tuple[Knob, ...]:
    return tuple(
        Knob(name=f.name, default=f.default, **f.metadata)  # type: ignore[arg-type]
        for f in dataclasses.fields(GenerationParams)
    )


KNOBS: tuple[Knob, ...] = _knobs()
