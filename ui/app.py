"""The page put together: header, tabs, and its place on our own web application."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI

from backend.settings import Settings
from ui import chat_tab, completion_tab, parameters_tab, pieces, presets_tab, wording
from ui.door import PRIVATE, Context, Service
from ui.people import hash_of, owner_of, session_of
from ui.sessions import Registry
from ui.theme import theme, variables

STATIC = Path(__file__).resolve().parent / "static"
STYLES = ("base.css", "chat.css", "sheets.css")
SESSIONS = 300  # Gradio's own per-page state is dropped beyond this
BRAND = '<div class="brand"><i aria-hidden="true"></i><span>Suri</span></div>'
QUEUE_NAPS = {
    # seconds between looks of Gradio's queue when nothing is going on; its own 1 ms costs 5 % of a core at rest
    "sleep_when_free": 0.02,
    "progress_update_sleep_when_free": 0.1,
    # its per-event statistics go through pandas every time unless told otherwise
    "ANAYLTICS_CACHE_FREQUENCY": 1000,
}


def build(service: Service, registry: Registry | None = None) -> gr.Blocks:
    """Make the page. One registry belongs to one page; a test may hand in its own to look into it."""
    context = Context(service, Registry() if registry is None else registry)
    with gr.Blocks(title="Suri", analytics_enabled=False, fill_width=True, fill_height=True) as demo:
        with gr.Row(elem_id="header"):
            gr.HTML(BRAND, elem_id="brand")
            chip = gr.HTML(elem_id="chip")
            new_chat = gr.Button("New chat", elem_id="new-chat")
            gr.HTML(_tools(), elem_id="tools")
        tab_id = gr.Textbox(visible=False, elem_id="tab-id")
        timer = gr.Timer(1.5, active=False)
        with gr.Tabs(elem_id="tabs"):
            with gr.Tab("Chat", id="chat", elem_id="tab-chat"):
                chat = chat_tab.build()
            with gr.Tab("Completion", id="completion", elem_id="tab-completion"):
                completion = completion_tab.build()
            with gr.Tab("Parameters", id="parameters", elem_id="tab-parameters"):
                parameters = parameters_tab.build()
            with gr.Tab("Presets", id="presets", elem_id="tab-presets") as presets_page:
                presets = presets_tab.build()

        knobs = list(parameters.knobs)
        chat_tab.wire(chat, context, knobs, new_chat)
        completion_tab.wire(completion, context, knobs)
        parameters_tab.wire(parameters, context)

        about = [chip, chat.welcome, timer]
        model = [*about, chat.meter, chat.cut, *knobs, parameters.marks, parameters.sets]
        page = _Page(context, chat, parameters)
        presets_tab.wire(presets, context, chip, model, page.other_model)
        private: dict[str, Any] = dict(PRIVATE)
        demo.load(
            page.opened,
            [tab_id],
            [*chat.all_outputs, chat.system, completion.text, completion.meter, *knobs, parameters.marks,
             parameters.sets, *about],
            js=(STATIC / "tab.js").read_text(encoding="utf-8"), **private,
        )  # fmt: skip
        timer.tick(page.about, None, about, **private)
        shown = [presets.table, presets.holding, presets.plot]
        presets_page.select(page.presets, None, [*shown, *about], **private)
        demo.unload(page.closed)
    demo.queue(api_open=False, max_size=200, default_concurrency_limit=None)
    calm(demo)
    return demo


def mount(app: FastAPI, service: Service, settings: Settings, registry: Registry | None = None) -> FastAPI:
    """Put the page at the root of `app`. Whatever else `app` serves must be added before."""
    demo = build(service, registry)
    demo.state_session_capacity = SESSIONS
    return gr.mount_gradio_app(
        app, demo, path="/", auth=list(settings.logins) or None, show_error=False, run_history=False, footer_links=[],
        enable_monitoring=False, ssr_mode=False, mcp_server=False, pwa=False, max_file_size="1mb", theme=theme(),
        head=_head(),
    )  # fmt: skip


def calm(demo: gr.Blocks) -> None:
    """Let an idle page cost next to nothing. Private names of Gradio's, so each only where it exists."""
    for name, value in QUEUE_NAPS.items():
        if hasattr(demo._queue, name):
            setattr(demo._queue, name, value)


def _head() -> str:
    """Our styles and script. Not through `css=`: that adds every rule twice, once with its selector cut at commas."""
    styles = variables() + "".join((STATIC / name).read_text(encoding="utf-8") for name in STYLES)
    script = (STATIC / "page.js").read_text(encoding="utf-8")
    return f"<style>{styles}</style><script>{script}</script>"


def _tools() -> str:
    return (
        '<button type="button" class="icon" data-tool="theme" aria-label="Light or dark" title="Light or dark">'
        '◐</button><button type="button" class="icon" data-tool="keys" aria-label="Keyboard shortcuts" '
        'title="Keyboard shortcuts">?</button>'
    )


class _Page:
    """Handlers that concern the page as a whole."""

    def __init__(self, context: Context, chat: chat_tab.ChatTab, parameters: parameters_tab.ParametersTab) -> None:
        self._context, self._chat, self._parameters = context, chat, parameters

    async def opened(self, request: gr.Request, tab: str) -> list[Any]:
        """A page has loaded: everything its tab had comes back."""
        session = self._context.registry.open(hash_of(request), tab or hash_of(request), owner_of(request))
        workspace = session.workspace
        draft, workspace.draft = workspace.draft, ""
        chat = await chat_tab.whole(self._context, session, box=draft or None)
        completion = await completion_tab.restore(self._context, session)
        parameters = await asyncio.to_thread(parameters_tab.restore, self._parameters, self._context, session)
        return [*chat, workspace.conversation.system, *completion, *parameters, *await self.about()]

    async def about(self) -> list[Any]:
        """What answers now. While something is being loaded the page looks again by itself, otherwise it does not."""
        status = await asyncio.to_thread(self._context.service.status)
        busy = status.loading is not None or status.state == "loading"
        welcome = f"<h1>What shall we talk about?</h1><p>{pieces.escape(wording.answers(status))}</p>"
        return [pieces.chip(status), welcome, gr.Timer(active=busy)]

    async def presets(self) -> list[Any]:
        """The table, fresh each time it is looked at: another person may have changed the model."""
        return [*await presets_tab.current(self._context), *await self.about()]

    async def other_model(self, request: gr.Request) -> list[Any]:
        """After a load: other defaults, another context."""
        session = session_of(self._context.registry, request)
        parameters = await asyncio.to_thread(parameters_tab.restore, self._parameters, self._context, session)
        chat = await chat_tab.whole(self._context, session)
        return [*await self.about(), chat[5], chat[7], *parameters]

    async def closed(self, request: gr.Request) -> None:
        """The browser is gone: its replies end, the tab's texts stay for a reload."""
        self._context.registry.close(hash_of(request))
