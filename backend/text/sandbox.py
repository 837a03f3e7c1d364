"""The sandbox that chat templates run in: Jinja's own, which guards Python from them, and limits, which guard the
machine: Jinja bounds neither time nor memory.

Every loop turn, call, filter and test looks at the clock; every text and list that a template makes is measured before
it is kept (lists by what they would be when written out, so that a list of itself twice, sixty times over, is refused).
Only filters and methods whose results can be bounded are there.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.filters import FILTERS
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, Macro, TemplateReference
from jinja2.utils import Namespace

from backend.text import filters
from backend.text.filters import LimitError

CPU_SECONDS = 1.0  # of this thread, for one rendering; templates of real models take milliseconds
MAX_ITEMS = 100_000  # values in one list, counting those inside of them
_MAX_BITS = 1024  # of a number

_PADDING = ("center", "ljust", "rjust", "zfill")
_TEXT_METHODS = frozenset(
    "capitalize casefold center count endswith find index isalnum isalpha isascii isdecimal isdigit islower isnumeric "
    "isspace istitle isupper join ljust lower lstrip partition removeprefix removesuffix replace rfind rindex rjust "
    "rpartition rsplit rstrip split splitlines startswith strip swapcase title upper zfill".split()
)
# Of Jinja's own: their results are no longer than what they are given. Those that can be are in filters.py.
_FILTERS = (
    "abs capitalize count d default dictsort e escape first float groupby int items last length list lower map max min "
    "reject rejectattr reverse safe select selectattr sort string title trim unique upper wordcount"
).split()
_OWN_FILTERS: dict[str, Callable[..., Any]] = {
    "format": filters.percent,
    "indent": filters.indent,
    "join": filters.join,
    "replace": filters.replace,
    "round": filters.rounded,
    "sum": filters.total,
    "tojson": filters.to_json,
}


class _GenerationTag(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}: transformers marks with it what to train on. Here: what is inside."""

    tags = {"generation"}  # noqa: RUF012  (Jinja's own way to name them)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


class _Generator(CodeGenerator):
    """Jinja's compiler with a look at the clock in every loop turn and a measure around what is put together."""

    def visit_For(self, node: nodes.For, frame: Frame) -> None:
        look = nodes.ExprStmt(nodes.Call(nodes.EnvironmentAttribute("tick"), [], [], None, None))
        node.body.insert(0, look.set_lineno(node.lineno))
        super().visit_For(node, frame)

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        self._measured(super().visit_List, node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        if node.ctx == "load":
            self._measured(super().visit_Tuple, node, frame)
        else:
            super().visit_Tuple(node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        self._measured(super().visit_Dict, node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.concat((")
        for part in node.nodes:
            self.write("str(")
            self.visit(part, frame)
            self.write("), ")
        self.write("))")

    def _measured(self, visit: Callable[[Any, Frame], None], node: nodes.Expr, frame: Frame) -> None:
        self.write("environment.admit(")
        visit(node, frame)
        self.write(")")


class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """A Jinja environment for templates from strangers. Call `begin` before each rendering, on the same thread."""

    code_generator_class = _Generator
    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self, names: dict[str, Any]) -> None:
        extensions = [jinja2.ext.loopcontrols, _GenerationTag]
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        self._limits = threading.local()
        self.begin(1 << 20, MAX_ITEMS)
        self.globals.clear()
        self.globals.update(names, range=jinja2.sandbox.safe_range, namespace=_Namespace, dict=_dict)
        known: dict[str, Any] = {name: FILTERS[name] for name in _FILTERS} | _OWN_FILTERS
        tests: dict[str, Any] = dict(self.tests)
        self.filters = {name: self._guarded(function) for name, function in known.items()}
        self.tests = {name: self._guarded(function) for name, function in tests.items()}

    def begin(self, max_text: int, max_items: int) -> None:
        """Start the clock for one rendering, in which no text may be longer than `max_text` characters."""
        self._limits.until = time.thread_time() + CPU_SECONDS
        self._limits.max_text, self._limits.max_items = max_text, max_items

    # limits -----------------------------------------------------------------------------------------------------------

    def tick(self) -> None:
        if time.thread_time() > self._limits.until:
            raise LimitError(f"it computes for more than {CPU_SECONDS:g} seconds")

    def admit(self, value: Any) -> Any:
        """Return the value when it is small enough, written out in full."""
        items = letters = 0
        pending = [value]
        while pending:
            part = pending.pop()
            items += 1
            if isinstance(part, str):
                letters += len(part)
            elif isinstance(part, dict):
                pending += [*part.keys(), *part.values()]
            elif isinstance(part, list | tuple | set | frozenset):
                pending += part
            self.check(letters, items)
        return value

    def check(self, letters: int, items: int = 0) -> None:
        if letters > self._limits.max_text:
            raise LimitError(f"it makes a text of more than {self._limits.max_text} characters")
        if items > self._limits.max_items:
            raise LimitError(f"it makes a list of more than {self._limits.max_items} values")

    def concat(self, pieces: Iterable[str]) -> str:  # type: ignore[override]
        texts = list(pieces)
        self.check(sum(map(len, texts)))
        return "".join(texts)

    def _settled(self, value: Any) -> Any:
        """The value, admitted; what would come one by one as a list."""
        if not isinstance(value, Iterator):
            return self.admit(value)
        kept: list[Any] = []
        letters = 0
        for item in value:
            self.tick()
            kept.append(item)
            letters += len(item) if isinstance(item, str) else 0
            self.check(letters, len(kept))
        return self.admit(kept)

    def _guarded(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)  # keeps Jinja's marks of what the function wants passed
        def guarded(*args: Any, **kwargs: Any) -> Any:
            self.tick()
            settled = [self._settled(value) for value in args]
            return self._settled(function(*settled, **{key: self._settled(value) for key, value in kwargs.items()}))

        return guarded

    # what the sandbox asks --------------------------------------------------------------------------------------------

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        self.tick()
        self.admit((args, kwargs))
        owner, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
        if isinstance(owner, str) and name in ("join", "replace") and args:
            return filters.join(self, args[0], owner) if name == "join" else filters.replace(self, owner, *args)
        if isinstance(owner, str) and name in _PADDING:
            return self.admit(filters.padded(self, owner, name, args))
        return self.admit(super().call(context, function, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            self.admit((left, right))
            return self.admit(filters.percent_form(self, left, right))
        if operator == "*" and not _is_number(left, right):
            row, times = (right, left) if isinstance(left, int) else (left, right)
            length = len(row) * max(0, times)
            self.check(length if isinstance(row, str) else 0, 0 if isinstance(row, str) else length)
        elif operator == "+" and isinstance(left, str) and isinstance(right, str):
            self.check(len(left) + len(right))
        elif isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            if bits > _MAX_BITS:
                raise LimitError("it computes with numbers that are too large")
        return self.admit(super().call_binop(context, operator, left, right))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if not super().is_safe_attribute(obj, attr, value):
            return False
        if isinstance(obj, str):
            return attr in _TEXT_METHODS
        if isinstance(obj, dict):
            return attr in ("copy", "get", "items", "keys", "values")
        if isinstance(obj, list | tuple):
            return attr in ("index", "count", *getattr(obj, "_fields", ()))  # groupby's pairs have names
        return isinstance(obj, Namespace | LoopContext | Macro | TemplateReference)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """str.format, for plain fields only: Python's reaches attributes and pads to any width."""
        owner = getattr(value, "__self__", None)
        if not isinstance(owner, str) or getattr(value, "__name__", "") != "format":
            return None  # `is_safe_attribute` knows no format_map
        return filters.braces(self, owner)


class _Namespace(Namespace):
    """Opaque: writing one out would write out all that hangs on it."""

    def __repr__(self) -> str:
        return "<namespace>"


def _dict(*values: Any, **named: Any) -> dict[Any, Any]:
    """dict, of which the class stays out of reach."""
    return dict(*values, **named)


def _is_number(*values: Any) -> bool:
    return all(isinstance(value, int | float) for value in values)
