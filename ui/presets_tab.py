"""The Presets tab: a table to decide from, and loading with a bar in the page. Chat goes on with what is loaded."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr

from backend.events import LoadProgress, PresetInfo, Status
from ui import pieces, wording
from ui.door import PRIVATE, Context
from ui.replies import sentence

LOOK = 0.15  # seconds between looks at the progress of a load
PRESS = """
element.addEventListener('click', (event) => {
    const button = event.target.closest('button[data-preset]');
    if (button) trigger('click', {name: button.dataset.preset});
});
"""


@dataclass(frozen=True)
class PresetsTab:
    """The widgets of the tab."""

    table: gr.HTML
    progress: gr.HTML
    notice: gr.HTML


def build() -> PresetsTab:
    """Lay the widgets out."""
    with gr.Column(elem_id="presets", elem_classes="sheet wide"):
        gr.HTML('<h2>Presets</h2><p class="soft">Ways to run a model here. Chats go on with the one you load.</p>')
        progress = gr.HTML(elem_id="preset-progress")
        notice = gr.HTML(elem_id="preset-notice")
        table = gr.HTML(elem_id="preset-table", js_on_load=PRESS)
    return PresetsTab(table, progress, notice)


def wire(tab: PresetsTab, context: Context, chip: gr.HTML, changed: Sequence[Any], after: Any) -> None:
    """Connect the table. `after` fills `changed`: what else in the page depends on the model that answers."""
    handlers = _Handlers(context)
    loading = tab.table.click(handlers.load, None, [tab.table, tab.progress, tab.notice, chip], **PRIVATE)
    loading.then(after, None, list(changed), **PRIVATE)


def table(presets: Sequence[PresetInfo], status: Status) -> str:
    """The table, one row a preset: what it is, what it needs, and its state or what can be done."""
    rows = "".join(_row(info, status) for info in presets)
    names = ("Preset", "Needs", '<span class="unseen">State</span>')
    head = "".join(f'<th scope="col">{name}</th>' for name in names)
    return f'<table class="presets"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'


def _row(info: PresetInfo, status: Status) -> str:
    busy = status.loading is not None or status.state == "loading"
    details = f'<span class="soft">{escape(info.error or info.name)}</span>'
    wide = ' colspan="2"' if info.error else ""  # what is wrong has the room of what it would need
    title = f'<td{wide}><span class="title">{escape(info.title or info.name)}</span><br>{details}</td>'
    needs = "" if info.error else f'<td class="needs">{escape(info.needs)}</td>'
    if busy and info.name == status.loading_preset:
        action = '<span class="pill mid">loading</span>'
    elif info.loaded:
        action = '<span class="pill ok">running</span>'
    elif info.error:
        action = '<span class="pill no">cannot be read</span>'
    else:
        off = " disabled" if busy else ""
        label = escape(f"Load {info.title or info.name}", quote=True)
        action = (
            f'<button type="button" class="load" data-preset="{escape(info.name, quote=True)}" '
            f'aria-label="{label}"{off}>Load</button>'
        )
    mark = ' class="on"' if info.loaded else ""
    return f"<tr{mark}>{title}{needs}<td class='act'>{action}</td></tr>"


async def current_table(context: Context) -> str:
    """The table as things stand."""
    presets, status = await asyncio.gather(
        asyncio.to_thread(context.service.presets), asyncio.to_thread(context.service.status)
    )
    return table(presets, status)


class _Handlers:
    def __init__(self, context: Context) -> None:
        self._context = context

    async def load(self, event: gr.EventData) -> AsyncIterator[tuple[str, str, str, str]]:
        """Load in a thread and show how far it is. On failure one sentence, and the earlier preset stays."""
        service = self._context.service
        name = str(event._data.get("name", "")) if isinstance(event._data, dict) else ""
        latest: list[LoadProgress] = []
        before = await asyncio.to_thread(service.status)
        rows = await asyncio.to_thread(service.presets)
        if before.loading is not None or before.state == "loading":
            words = f"{wording.loading(before.loading, before.loading_preset)}. Wait for it, then choose again."
            yield table(rows, before), "", pieces.notice(words), pieces.chip(before)
            return
        work = asyncio.ensure_future(asyncio.to_thread(service.load, name, latest.append))
        try:
            while not work.done():
                now = latest[-1] if latest else LoadProgress(f"Loading {name}")
                status = wording.with_loading(before, now, name)
                yield table(rows, status), pieces.progress_bar(now, name), "", pieces.chip(status)
                await asyncio.wait([work], timeout=LOOK)
            error = work.exception()
        finally:
            # the load itself goes on when its page is closed; its outcome is then nobody's to read here
            work.add_done_callback(lambda task: task.cancelled() or task.exception())
        why = sentence(error) if isinstance(error, Exception) else None
        after = await asyncio.to_thread(service.status)
        if why and after.state == "ready":
            why = f"{why} {after.title or after.preset} goes on answering."
        yield await current_table(self._context), "", pieces.notice(why), pieces.chip(after)
