"""The table of presets as HTML: what each takes, what it gives, whether it fits, and what can be done with it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from backend.events import PresetInfo, Status
from ui import wording

COLUMNS = ("Preset", "Memory", "Speed", "Perplexity", "Fits", '<span class="unseen">State</span>')


def table(presets: Sequence[PresetInfo], status: Status) -> str:
    """One row a preset; those whose model is not here come last, under a heading of their own."""
    here = [info for info in presets if not info.note]
    absent = [info for info in presets if info.note]
    quality = any(info.measured and info.measured.perplexity is not None for info in presets)
    columns = [name for name in COLUMNS if quality or name != "Perplexity"]
    head = "".join(f'<th scope="col">{name}</th>' for name in columns)
    groups = _group(here, status, quality)
    if absent:
        groups += f'<tbody><tr class="group"><th colspan="{len(columns)}">Their model is not here yet</th></tr></tbody>'
        groups += _group(absent, status, quality)
    return f'<table class="presets"><thead><tr>{head}</tr></thead>{groups}</table>'


def summary(status: Status) -> str:
    """What is loaded, measured against what was predicted, and what is left."""
    lines = wording.holding(status)
    if not lines:
        return ""
    items = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(words)}</dd></div>" for name, words in lines)
    return f'<dl class="holding">{items}</dl>'


def _group(rows: Iterable[PresetInfo], status: Status, quality: bool) -> str:
    return "<tbody>" + "".join(_row(info, status, quality) for info in rows) + "</tbody>"


def _row(info: PresetInfo, status: Status, quality: bool) -> str:
    details = f'<span class="soft">{escape(info.error or info.name)}</span>'
    title = f'<span class="title">{escape(info.title or info.name)}</span><br>{details}'
    if info.error:  # what is wrong has the room of everything else
        cells = f'<td colspan="{5 if quality else 4}">{title}</td>'
    else:
        cells = f"<td>{title}</td>" + _cell("Memory", wording.needs(info)) + _cell("Speed", wording.speeds(info))
        cells += _cell("Perplexity", wording.quality(info)) if quality else ""
        cells += _cell("Fits", [wording.fitting(info), info.why_not])
    mark = ' class="on"' if info.name == status.preset else ""
    return f"<tr{mark}>{cells}<td class='act'>{_action(info, status)}</td></tr>"


def _cell(label: str, lines: Sequence[str]) -> str:
    """The first line is what counts, the second says more. `label` is shown where the columns have no heads."""
    if not any(lines):
        return f'<td class="fact none" data-label="{label}"></td>'
    first, *rest = (escape(line) for line in lines)
    more = f'<br><span class="soft">{" ".join(rest)}</span>' if any(rest) else ""
    return f'<td class="fact" data-label="{label}"><div><span class="first">{first}</span>{more}</div></td>'


def _action(info: PresetInfo, status: Status) -> str:
    name = escape(info.name, quote=True)
    title = info.title or info.name
    if status.loading is not None and info.name == status.loading_preset:
        return '<span class="pill mid">loading</span>' + _button("cancel", name, "Cancel", f"Cancel loading {title}")
    if info.name in status.next_presets:
        return '<span class="pill mid">waits</span>' + _button("cancel", name, "Cancel", f"Cancel loading {title}")
    if info.name == status.preset:
        return '<span class="pill ok">running</span>'
    if info.error:
        return '<span class="pill no">cannot be read</span>'
    return _button("preset", name, "Load", f"Load {title}")


def _button(kind: str, name: str, words: str, label: str) -> str:
    return (
        f'<button type="button" class="load" data-{kind}="{name}" aria-label="{escape(label, quote=True)}">'
        f"{words}</button>"
    )
