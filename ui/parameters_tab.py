"""The Parameters tab, made from `KNOBS`: a new field in `backend/params.py` appears here by itself."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from typing import Any

import gradio as gr

from backend.errors import ParameterError, UserError
from backend.params import KNOBS, GenerationParams, Knob
from ui import pieces
from ui.door import PRIVATE, Context
from ui.people import session_of
from ui.replies import sentence
from ui.sessions import Session

SLIDER_SPAN = 10_000  # a wider whole number is typed, not dragged
OWN = "My own values"  # shown as the set while the values are none of the sets
BUILT_IN: dict[str, GenerationParams] = {
    "Balanced": GenerationParams(),
    "Precise": GenerationParams(temperature=0.0),
    "Creative": GenerationParams(temperature=1.1, top_p=0.98, min_p=0.03, top_k=0),
}


@dataclass(frozen=True)
class ParametersTab:
    """The widgets of the tab. `knobs` are in the order of `KNOBS`."""

    knobs: tuple[Any, ...]
    marks: gr.HTML
    notice: gr.HTML
    sets: gr.Dropdown
    name: gr.Textbox
    save: gr.Button
    delete: gr.Button
    defaults: gr.Button
    neutral: gr.Button


def widget(knob: Knob) -> Any:
    """The widget for a kind of parameter; the only place that decides by kind."""
    common: dict[str, Any] = {"label": knob.label, "info": knob.help, "elem_id": f"knob-{knob.name}"}
    value = shown(knob, knob.default)
    if knob.kind in ("strings", "biases", "text"):
        return gr.Textbox(value, lines=2, max_lines=8, **common)
    if knob.kind in ("ids", "names"):
        return gr.Textbox(value, lines=1, placeholder="one or more, with commas between", **common)
    if knob.kind == "bool":
        return gr.Checkbox(value, **common)
    if knob.kind == "seed":
        return gr.Textbox(value, lines=1, placeholder="new each time", **common)
    if knob.kind == "int" and knob.high - knob.low > SLIDER_SPAN:
        # without minimum and maximum: our own check says what is wrong in one sentence
        return gr.Number(value, precision=0, step=knob.step, **common)
    return gr.Slider(knob.low, knob.high, value, step=knob.step, buttons=["reset"], **common)


def shown(knob: Knob, value: Any) -> Any:
    """A parameter's value as its widget takes it. In a list of texts a line end is written \\n."""
    if knob.kind == "strings":
        return "\n".join(text.replace("\\", r"\\").replace("\n", r"\n").replace("\t", r"\t") for text in value)
    if knob.kind in ("ids", "names"):
        return ", ".join(str(item) for item in value)
    if knob.kind == "biases":
        return "\n".join(f"{token}: {bias:g}" for token, bias in value)
    if knob.kind == "seed":
        return "" if value is None else str(value)
    return value


def read(knob: Knob, value: Any) -> Any:
    """A widget's value as the parameter takes it; the range is checked by the parameters themselves."""
    if knob.kind == "strings":
        return tuple(_unescaped(line) for line in str(value or "").split("\n") if line)
    if knob.kind in ("ids", "names"):
        return tuple(part for part in re.split(r"[,\s]+", str(value or "")) if part)
    if knob.kind == "biases":
        return tuple(_bias(knob, line) for line in str(value or "").split("\n") if line.strip())
    if knob.kind == "text":
        return str(value or "")
    if knob.kind == "bool":
        return bool(value)
    if knob.kind == "seed":
        text = str(value or "").strip()
        if text and not text.isdecimal():
            raise ParameterError(f"{knob.label}: found '{text}', expected a whole number or nothing", param=knob.name)
        return int(text) if text else None
    if value is None:
        raise ParameterError(f"{knob.label}: found nothing, expected a number", param=knob.name)
    return int(value) if knob.kind == "int" and float(value).is_integer() else value


def _unescaped(text: str) -> str:
    return re.sub(r"\\([nt\\])", lambda found: {"n": "\n", "t": "\t", "\\": "\\"}[found[1]], text)


def _bias(knob: Knob, line: str) -> tuple[str, float]:
    token, colon, bias = line.partition(":")
    try:
        return token.strip(), float(bias)
    except ValueError:
        raise ParameterError(f"{knob.label}: found '{line}', expected e.g. 123: -2", param=knob.name) from None


def read_params(values: Sequence[Any]) -> GenerationParams:
    """The widgets' values as parameters, or a sentence that names the one that does not fit."""
    return GenerationParams.from_mapping({knob.name: read(knob, v) for knob, v in zip(KNOBS, values, strict=True)})


def show_params(params: GenerationParams) -> list[Any]:
    """Values for the widgets."""
    return [shown(knob, getattr(params, knob.name)) for knob in KNOBS]


def marks(params: GenerationParams, base: GenerationParams) -> str:
    """Which parameters differ from the model's own, in words, and a style rule that marks their widgets.

    A rule instead of an update of every widget: one small piece of text per change, however many parameters there are.
    """
    changed = [knob for knob in KNOBS if getattr(params, knob.name) != getattr(base, knob.name)]
    if not changed:
        return '<p class="changes">Everything is at its default.</p>'
    selectors = ", ".join(f"#knob-{knob.name} [data-testid=block-info]::after" for knob in changed)
    frames = ", ".join(f"#knob-{knob.name}" for knob in changed)
    names = ", ".join(escape(knob.label) for knob in changed)
    return (
        f'<style>{selectors} {{content: "changed"}} {frames} {{--mark: var(--suri-accent)}}</style>'
        f'<p class="changes">Changed from the default: {names}.</p>'
    )


def build() -> ParametersTab:
    """Lay out the front knobs, then a fold per group."""
    made: dict[str, Any] = {}
    with gr.Column(elem_id="parameters", elem_classes="sheet"):
        gr.HTML('<h2>Parameters</h2><p class="soft">How the model chooses its words, for your chat and completion.</p>')
        with gr.Row(elem_id="set-row"):
            sets = gr.Dropdown(list(BUILT_IN), value="Balanced", label="Set", elem_id="sets", allow_custom_value=True)
            defaults = gr.Button("Back to defaults", elem_id="defaults")
            neutral = gr.Button("All neutral", elem_id="neutral")
        marked = gr.HTML(marks(GenerationParams(), GenerationParams()), elem_id="marks")
        notice = gr.HTML(elem_id="parameters-notice")
        with gr.Column(elem_id="front-knobs", elem_classes="knobs"):
            for knob in KNOBS:
                if knob.front:
                    made[knob.name] = widget(knob)
        rest = sorted((knob for knob in KNOBS if not knob.front), key=lambda knob: _groups().index(knob.group))
        for group, members in groupby(rest, key=lambda knob: knob.group):
            with gr.Accordion(group, open=False, elem_id=f"fold-{group.lower()}"):
                with gr.Column(elem_classes="knobs"):
                    for knob in members:
                        made[knob.name] = widget(knob)
        with gr.Row(elem_id="save-row"):
            name = gr.Textbox(label="Name", placeholder="Name for a new set", elem_id="set-name", max_length=60)
            save = gr.Button("Save as set", elem_id="save-set")
            delete = gr.Button("Delete set", elem_id="delete-set")
    knobs = tuple(made[knob.name] for knob in KNOBS)
    return ParametersTab(knobs, marked, notice, sets, name, save, delete, defaults, neutral)


def _groups() -> list[str]:
    return list(dict.fromkeys(knob.group for knob in KNOBS))


def wire(tab: ParametersTab, context: Context) -> None:
    """Connect the widgets."""
    handlers = _Handlers(context)
    knobs, said = list(tab.knobs), [tab.marks, tab.notice]
    edits = [event for knob in knobs for event in _edits(knob)]
    gr.on(edits, handlers.changed, knobs, [*said, tab.sets], trigger_mode="always_last", **PRIVATE)
    tab.sets.input(handlers.pick, [tab.sets], [*knobs, *said], **PRIVATE)
    tab.defaults.click(handlers.defaults, None, [*knobs, *said, tab.sets], **PRIVATE)
    tab.neutral.click(handlers.neutral, None, [*knobs, *said, tab.sets], **PRIVATE)
    gr.on(
        [tab.save.click, tab.name.submit],
        handlers.save,
        [tab.name, *knobs],
        [tab.sets, tab.name, tab.notice],
        **PRIVATE,
    )
    tab.delete.click(handlers.delete, [tab.sets], [tab.sets, tab.notice], **PRIVATE)


def _edits(knob: Any) -> list[Any]:
    """The events by which a person changes a widget; not those by which we do.

    Leaving a text counts too: Gradio reports no input for the first change after a fold was opened.
    """
    if isinstance(knob, gr.Checkbox):
        return [knob.input]
    return [knob.input, knob.release if isinstance(knob, gr.Slider) else knob.blur]


def choices(context: Context) -> list[str]:
    """Names of the sets that come with the page, then the saved ones."""
    return [*BUILT_IN, *(name for name in sorted(context.service.sampling_sets()) if name not in BUILT_IN)]


def restore(tab: ParametersTab, context: Context, session: Session) -> list[Any]:
    """Values for knobs, marks and sets after a (re)load."""
    base = context.service.default_params()
    params = session.workspace.params or base
    session.workspace.picked = _name(context, params)
    return [
        *show_params(params),
        marks(params, base),
        gr.update(choices=choices(context), value=session.workspace.picked),
    ]


def _name(context: Context, params: GenerationParams) -> str:
    """The set that these values are."""
    known = {**context.service.sampling_sets(), **_built_in(context)}
    return next((name for name, candidate in known.items() if candidate == params), OWN)


def _built_in(context: Context) -> dict[str, GenerationParams]:
    return {**BUILT_IN, "Balanced": context.service.default_params()}


class _Handlers:
    def __init__(self, context: Context) -> None:
        self._context = context

    # On the event loop and not in threads: what a person does in a row is carried out in a row.

    async def changed(self, request: gr.Request, *values: Any) -> list[Any]:
        """Keep the values for a reload, mark what differs, say what does not fit."""
        try:
            params = read_params(values)
        except UserError as error:
            return [gr.skip(), pieces.notice(sentence(error)), gr.skip()]
        workspace = session_of(self._context.registry, request).workspace
        workspace.params, workspace.picked = params, _name(self._context, params)
        return [marks(params, self._context.service.default_params()), "", workspace.picked]

    async def pick(self, request: gr.Request, name: str | None) -> list[Any]:
        """Put a set's values into the widgets, once.

        Gradio reports a choice twice, the second time as the list loses the focus, and once more whenever somebody
        only looks into it. A second answer could arrive after the person has changed a value, and would undo that.
        """
        workspace = session_of(self._context.registry, request).workspace
        if name == OWN or name == workspace.picked:
            return [gr.skip()] * (len(KNOBS) + 2)
        workspace.picked = name or ""
        params = {**self._context.service.sampling_sets(), **_built_in(self._context)}.get(name or "")
        if params is None:
            words = pieces.notice(f"There is no set '{name}' any more.")
            return [*[gr.skip()] * len(KNOBS), gr.skip(), words]
        return self._put(params, request, workspace.picked)

    async def defaults(self, request: gr.Request) -> list[Any]:
        """The preset's own values."""
        filled = self._put(self._context.service.default_params(), request, "Balanced")
        session_of(self._context.registry, request).workspace.params = None  # follows the next preset, too
        return [*filled, gr.update(value="Balanced")]

    async def neutral(self, request: gr.Request) -> list[Any]:
        """Every parameter at the value where it does nothing."""
        params = GenerationParams.from_mapping({knob.name: knob.neutral for knob in KNOBS})
        name = _name(self._context, params)
        return [*self._put(params, request, name), gr.update(value=name)]

    def save(self, request: gr.Request, name: str, *values: Any) -> list[Any]:
        """Save the values under a name of their own."""
        name = (name or "").strip()[:60]
        if not name or name in BUILT_IN or name == OWN:
            words = f"'{name}' is taken by Suri; choose another name." if name else "Give the set a name first."
            return [gr.skip(), gr.skip(), pieces.notice(words)]
        try:
            self._context.service.save_sampling_set(name, read_params(values))
        except UserError as error:
            return [gr.skip(), gr.skip(), pieces.notice(sentence(error))]
        session_of(self._context.registry, request).workspace.picked = name
        return [gr.update(choices=choices(self._context), value=name), "", ""]

    def delete(self, request: gr.Request, name: str | None) -> list[Any]:
        """Delete a saved set; the values in the widgets stay."""
        if not name or name in BUILT_IN or name == OWN:
            words = (
                f"'{name}' comes with Suri and cannot be deleted."
                if name in BUILT_IN
                else "Pick the set to delete first."
            )
            return [gr.skip(), pieces.notice(words)]
        try:
            self._context.service.delete_sampling_set(name)
        except UserError as error:
            return [gr.skip(), pieces.notice(sentence(error))]
        session_of(self._context.registry, request).workspace.picked = OWN
        return [gr.update(choices=choices(self._context), value=OWN), ""]

    def _put(self, params: GenerationParams, request: gr.Request, name: str) -> list[Any]:
        workspace = session_of(self._context.registry, request).workspace
        workspace.params, workspace.picked = params, name
        return [*show_params(params), marks(params, self._context.service.default_params()), ""]
