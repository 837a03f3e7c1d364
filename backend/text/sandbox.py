"""The sandbox that chat templates run in: Jinja's own, which guards Python from them, and limits, which guard the
machine: Jinja bounds neither time nor memory.

Every loop turn, call, filter and test looks at the clock; every text and list that a template makes is measured before
it is kept (lists by what they would be when written out, so that a list of itself twice, sixty times over, is refused).
Only filters and methods whose results can be bounded are there.
"""

from __future__ import annotations

import functools
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.filters import FILTERS, make_attrgetter
from jinja2.runtime import Context, LoopContext, Macro, TemplateReference
from jinja2.utils import Namespace

CPU_SECONDS = 1.0  # of this thread, for one rendering; templates of real models take milliseconds
MAX_ITEMS = 100_000  # values in one list, counting those inside of them
_MAX_BITS = 1024  # of a number

_TEXT_METHODS = frozenset(
    "capitalize count endswith find index isalnum isalpha isdigit islower isspace isupper join lower lstrip partition "
    "removeprefix removesuffix replace rfind rpartition rsplit rstrip split splitlines startswith strip title "
    "upper".split()
)
_FILTERS = (
    "abs capitalize count d default dictsort e escape first float int items last length list lower map max min reject "
    "rejectattr reverse safe select selectattr sort string title trim unique upper"
).split()


class LimitError(jinja2.TemplateRuntimeError):
    """The template asks for more than a prompt can need."""


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

    def __init__(self, filters: dict[str, Callable[..., Any]], names: dict[str, Any]) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols])
        self._limits = threading.local()
        self.begin(1 << 20, MAX_ITEMS)
        self.globals.clear()
        self.globals.update(names, range=jinja2.sandbox.safe_range, namespace=_Namespace)
        own = {"join": _join, "replace": _replace} | filters
        known: dict[str, Any] = {name: FILTERS[name] for name in _FILTERS} | own
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
        if isinstance(owner, str) and name in ("join", "replace"):
            return (_join(self, args[0], owner) if name == "join" else _replace(self, owner, *args)) if args else ""
        return self.admit(super().call(context, function, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            if not re.fullmatch(r"(?:[^%]|%[sd%])*", left):
                raise LimitError(f"the format {left[:40]!r} is not allowed")
            self.admit((left, right))
        elif operator == "*" and not _is_number(left, right):
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
            return attr in ("get", "items", "keys", "values")
        if isinstance(obj, list | tuple):
            return attr in ("index", "count")
        return isinstance(obj, Namespace | LoopContext | Macro | TemplateReference)

    def wrap_str_format(self, value: Any) -> None:
        """No str.format: it pads to any width, and `is_safe_attribute` refuses it."""
        return None


class _Namespace(Namespace):
    """Opaque: writing one out would write out all that hangs on it."""

    def __repr__(self) -> str:
        return "<namespace>"


def _is_number(*values: Any) -> bool:
    return all(isinstance(value, int | float) for value in values)


@jinja2.pass_environment
def _join(sandbox: Any, values: Iterable[Any], d: str = "", attribute: str | None = None) -> str:
    getter = make_attrgetter(sandbox, attribute) if attribute is not None else str
    letters, texts = 0, []
    for value in values:
        sandbox.tick()
        texts.append(str(getter(value)))
        letters += len(texts[-1]) + len(str(d))
        sandbox.check(letters, len(texts))
    return str(d).join(texts)


@jinja2.pass_environment
def _replace(sandbox: Any, text: Any, old: Any, new: Any, count: int | None = None) -> str:
    text, old, new, most = str(text), str(old), str(new), -1 if count is None else count
    found = text.count(old) if most < 0 else min(most, text.count(old))
    sandbox.check(len(text) + found * max(0, len(new) - len(old)))
    return text.replace(old, new, most)
