"""The Presets tab: a table to decide from, and loading with a bar in the page. Chat goes on with what is loaded."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from backend.errors import LoadCancelled
from backend.events import LoadProgress
from ui import pieces
from ui.door import PRIVATE, Context
from ui.plot import plot
from ui.preset_table import summary, table
from ui.replies import sentence

LOOK = 0.15  # seconds between looks at the progress of a load
PRESS = """
element.addEventListener('click', (event) => {
    const button = event.target.closest('button');
    if (button && button.dataset.preset) trigger('click', {name: button.dataset.preset});
    if (button && button.dataset.cancel) trigger('stop', {name: button.dataset.cancel});
});
"""


@dataclass(frozen=True)
class PresetsTab:
    """The widgets of the tab."""

    table: gr.HTML
    progress: gr.HTML
    notice: gr.HTML
    holding: gr.HTML
    plot: gr.HTML


def build() -> PresetsTab:
    """Lay the widgets out."""
    with gr.Column(elem_id="presets", elem_classes="sheet wide"):
        gr.HTML('<h2>Presets</h2><p class="soft">Ways to run a model here. Chats go on with the one you load.</p>')
        holding = gr.HTML(elem_id="preset-holding")
        progress = gr.HTML(elem_id="preset-progress")
        notice = gr.HTML(elem_id="preset-notice")
        rows = gr.HTML(elem_id="preset-table", js_on_load=PRESS)
        plotted = gr.HTML(elem_id="preset-plot")
    return PresetsTab(rows, progress, notice, holding, plotted)


def wire(tab: PresetsTab, context: Context, chip: gr.HTML, changed: Sequence[Any], after: Any) -> None:
    """Connect the table. `after` fills `changed`: what else in the page depends on the model that answers."""
    handlers = _Handlers(context)
    outputs = [tab.table, tab.progress, tab.notice, chip, tab.holding]
    # multiple: a second load may wait for the first
    loading = tab.table.click(handlers.load, None, outputs, trigger_mode="multiple", **PRIVATE)
    loading.then(after, None, list(changed), **PRIVATE)
    tab.table.stop(handlers.cancel, None, [tab.notice], trigger_mode="multiple", **PRIVATE)


async def current(context: Context) -> list[str]:
    """Table, summary and plot as things stand."""
    presets, status = await asyncio.gather(
        asyncio.to_thread(context.service.presets), asyncio.to_thread(context.service.status)
    )
    return [table(presets, status), summary(status), plot(presets)]


class _Handlers:
    def __init__(self, context: Context) -> None:
        self._context = context

    async def load(self, event: gr.EventData) -> AsyncIterator[tuple[str, str, str, str, str]]:
        """Load in a thread and show how far it is. On failure one sentence, and the earlier preset is there again."""
        service, name = self._context.service, _named(event)
        latest: list[LoadProgress] = []
        rows = await asyncio.to_thread(service.presets)
        before = summary(await asyncio.to_thread(service.status))
        work = asyncio.ensure_future(asyncio.to_thread(service.load, name, latest.append))
        try:
            while not work.done():
                now = latest[-1] if latest else LoadProgress(f"Loading {name}")
                status = await asyncio.to_thread(service.status)
                yield table(rows, status), pieces.progress_bar(now, name), "", pieces.chip(status), before
                await asyncio.wait([work], timeout=LOOK)
            error = work.exception()
        finally:
            # the load itself goes on when its page is closed; its outcome is then nobody's to read here
            work.add_done_callback(lambda task: task.cancelled() or task.exception())
        why = sentence(error) if isinstance(error, Exception) else None
        after = await asyncio.to_thread(service.status)
        if why and after.state == "ready":
            why = f"{why} {after.title or after.preset} goes on answering."
        said = pieces.remark(why) if isinstance(error, LoadCancelled) else pieces.notice(why)
        shown, holding, _ = await current(self._context)
        yield shown, "", said, pieces.chip(after), holding

    async def cancel(self, event: gr.EventData) -> str:
        """Call off a load, whoever began it; who did is told."""
        await asyncio.to_thread(self._context.service.cancel_load, _named(event))
        return ""


def _named(event: gr.EventData) -> str:
    return str(event._data.get("name", "")) if isinstance(event._data, dict) else ""
