"""The Completion tab: one text that the model continues, no template. Undo goes back one continuation at a time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import gradio as gr

from backend.errors import UserError
from ui import pieces, wording
from ui.door import PRIVATE, Context
from ui.parameters_tab import read_params
from ui.people import session_of
from ui.replies import follow, sentence
from ui.sessions import Run, Session, settle


@dataclass(frozen=True)
class CompletionTab:
    """The widgets of the tab."""

    text: gr.Textbox
    state: gr.HTML
    notice: gr.HTML
    meter: gr.HTML
    undo: gr.Button
    go: gr.Button
    stop: gr.Button


def build() -> CompletionTab:
    """Lay the widgets out."""
    with gr.Column(elem_id="completion", elem_classes="sheet"):
        gr.HTML('<h2>Completion</h2><p class="soft">The model goes on from where your text ends. No chat format.</p>')
        text = gr.Textbox(
            elem_id="completion-text", label="Text", show_label=False, container=False, lines=14, max_lines=22,
            placeholder="Once upon a time",
        )  # fmt: skip
        state = gr.HTML(pieces.state_line(busy=False), elem_id="completion-state")
        notice = gr.HTML(elem_id="completion-notice")
        with gr.Row(elem_id="completion-row"):
            undo = gr.Button("Undo", elem_id="completion-undo")
            meter = gr.HTML(elem_id="completion-meter")
            go = gr.Button("Continue", elem_id="completion-go", variant="primary")
            stop = gr.Button("Stop", elem_id="completion-stop", variant="primary")
    return CompletionTab(text, state, notice, meter, undo, go, stop)


def wire(tab: CompletionTab, context: Context, knobs: Sequence[Any]) -> None:
    """Connect the widgets."""
    handlers = _Handlers(context)
    begun = tab.go.click(handlers.begin, [tab.text, *knobs], [tab.text, tab.state, tab.notice], **PRIVATE)
    streaming = begun.then(handlers.stream, None, [tab.text, tab.state, tab.meter], **PRIVATE)
    streaming.then(handlers.finish, None, [tab.text, tab.state, tab.notice, tab.meter], **PRIVATE)
    tab.stop.click(handlers.stop, None, None, queue=False, show_progress="hidden", api_visibility="private")
    tab.undo.click(handlers.undo, None, [tab.text, tab.state, tab.notice, tab.meter], **PRIVATE)
    tab.text.blur(handlers.keep, [tab.text], [tab.meter], **PRIVATE)


async def restore(context: Context, session: Session) -> list[Any]:
    """Values for text and meter after a (re)load."""
    return [session.workspace.completion, await _meter(context, session.workspace.completion)]


async def _meter(context: Context, text: str) -> str:
    used, status = await asyncio.gather(
        asyncio.to_thread(context.service.count_text, text), asyncio.to_thread(context.service.status)
    )
    return pieces.meter(used, status.context)


class _Handlers:
    def __init__(self, context: Context) -> None:
        self._context = context

    async def begin(self, request: gr.Request, text: str, *values: Any) -> list[Any]:
        """Lock the text while it is written to, and remember it for Undo."""
        session = session_of(self._context.registry, request)
        try:
            session.begin("completion", Run(read_params(values), typed=text))
        except UserError as error:
            return [gr.skip(), gr.skip(), pieces.notice(sentence(error))]
        session.workspace.earlier.append(text)
        session.workspace.completion = text
        return [gr.update(interactive=False), pieces.state_line(busy=True, words="Starting"), ""]

    async def stream(self, request: gr.Request) -> AsyncIterator[tuple[str, str, str]]:
        """Write on in the same text."""
        session = session_of(self._context.registry, request)
        run = session.fresh("completion")
        if run is None:
            yield gr.skip(), gr.skip(), gr.skip()  # type: ignore[misc]  # nothing was begun
            return
        workspace, service = session.workspace, self._context.service
        meter = ""
        try:
            async with aclosing(
                follow(service, run, lambda: service.complete(run.typed, run.params, person=session.person))
            ) as moments:
                async for moment in moments:
                    if run.done:
                        break
                    workspace.completion += moment.text
                    if run.stats.context:
                        meter = pieces.meter(run.stats.used_tokens, run.stats.context)
                    line = pieces.state_line(busy=True, words=moment.words, numbers=wording.speed(run.stats))
                    yield workspace.completion, line, meter
        finally:
            settle(workspace, run)

    async def finish(self, request: gr.Request) -> list[Any]:
        """Give the text back to the person."""
        session = session_of(self._context.registry, request)
        run = session.take_done("completion")
        if run is None:
            return [gr.skip()] * 4
        workspace = session.workspace
        if workspace.completion == run.typed and workspace.earlier:
            workspace.earlier.pop()  # nothing came: nothing to undo
        line = pieces.state_line(busy=False, numbers=wording.footer(run.stats, run.reason))
        text = gr.update(value=workspace.completion, interactive=True)
        return [text, line, pieces.notice(run.error), await _meter(self._context, workspace.completion)]

    async def stop(self, request: gr.Request) -> None:
        """Takes effect within one engine step; the text stays."""
        run = session_of(self._context.registry, request).runs.get("completion")
        if run is not None:
            run.stop()

    async def undo(self, request: gr.Request) -> list[Any]:
        """Back to the text before the last continuation."""
        session = session_of(self._context.registry, request)
        if session.writing("completion") or not session.workspace.earlier:
            return [gr.skip()] * 4
        session.workspace.completion = session.workspace.earlier.pop()
        line = pieces.state_line(busy=False)
        return [session.workspace.completion, line, "", await _meter(self._context, session.workspace.completion)]

    async def keep(self, request: gr.Request, text: str) -> Any:
        """Keep what is typed for a reload."""
        session = session_of(self._context.registry, request)
        if session.writing("completion"):
            return gr.skip()
        session.workspace.completion = text
        return await _meter(self._context, text)
