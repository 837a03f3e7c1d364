"""The Chat tab: finished turns in a Chatbot, the reply in progress in a light Markdown below it, the composer.

One turn is three events in a row: `begin` (put the message in, once), `stream` (only the light parts, about eight
times a second), `finish` (the reply moves into the Chatbot, once). So a long chat costs nothing while a reply is
written.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import gradio as gr

from backend.errors import UserError
from ui import pieces, wording
from ui.conversation import Turn
from ui.door import PRIVATE, Context
from ui.parameters_tab import read_params
from ui.people import session_of
from ui.replies import follow, sentence
from ui.sessions import Run, Session, settle

EXAMPLES = (
    "Explain how rainbows form, in three sentences",
    "Write a Python function that reverses the words of a text",
    "Suggest a quick dinner with rice, eggs and spinach",
)
NUMBERS_EVERY = 0.45  # seconds


@dataclass(frozen=True)
class ChatTab:
    """The widgets of the tab that events read or write."""

    chatbot: gr.Chatbot
    cut: gr.HTML
    live: gr.Markdown
    state: gr.HTML
    versions: gr.HTML
    notice: gr.HTML
    welcome: gr.HTML
    examples: tuple[gr.Button, ...]
    older: gr.Button
    newer: gr.Button
    again: gr.Button
    box: gr.Textbox
    system: gr.Textbox
    meter: gr.HTML
    send: gr.Button
    stop: gr.Button

    @property
    def all_outputs(self) -> list[Any]:
        """What `whole` fills: everything of the tab that depends on the conversation."""
        return [self.chatbot, self.live, self.state, self.versions, self.notice, self.meter, self.box, self.cut]


def build() -> ChatTab:
    """Lay the widgets out. Which of Send and Stop is seen, and the welcome, follow the state line through CSS."""
    with gr.Column(elem_id="chat"):
        with gr.Column(elem_id="thread"):
            with gr.Column(elem_id="welcome"):
                welcome = gr.HTML(elem_id="welcome-words")
                with gr.Row(elem_id="examples"):
                    examples = tuple(gr.Button(text, elem_classes="example") for text in EXAMPLES)
            cut = gr.HTML(elem_id="cut")
            chatbot = gr.Chatbot(
                elem_id="messages", label="Chat", show_label=False, container=False, height=None, autoscroll=False,
                editable="user", buttons=["copy"], latex_delimiters=pieces.MATH, sanitize_html=True,
                group_consecutive_messages=False, layout="bubble", feedback_options=None, allow_tags=False,
            )  # fmt: skip
            live = gr.Markdown(
                elem_id="live", latex_delimiters=pieces.MATH, sanitize_html=True, line_breaks=True, container=False
            )
            with gr.Row(elem_id="reply-foot"):
                older = gr.Button("‹", elem_id="older", elem_classes="quiet")
                versions = gr.HTML(elem_id="versions")
                newer = gr.Button("›", elem_id="newer", elem_classes="quiet")
                again = gr.Button("Regenerate", elem_id="regenerate", elem_classes="quiet")
                state = gr.HTML(pieces.state_line(busy=False, empty=True), elem_id="chat-state")
        with gr.Column(elem_id="composer"):
            notice = gr.HTML(elem_id="chat-notice")
            with gr.Column(elem_id="composer-card"):
                system = gr.Textbox(
                    elem_id="system", label="System prompt", lines=2, max_lines=6, container=True,
                    placeholder="How the model should behave, for the whole chat",
                )  # fmt: skip
                box = gr.Textbox(
                    elem_id="box", label="Message", show_label=False, container=False, lines=1, max_lines=10,
                    placeholder="Message…", autofocus=True,
                )  # fmt: skip
                with gr.Row(elem_id="composer-row"):
                    gr.Button("+ System prompt", elem_id="system-toggle", elem_classes="quiet")
                    meter = gr.HTML(elem_id="meter")
                    send = gr.Button("Send", elem_id="send", variant="primary")
                    stop = gr.Button("Stop", elem_id="stop", variant="primary")
    return ChatTab(
        chatbot, cut, live, state, versions, notice, welcome, examples, older, newer, again, box, system, meter, send,
        stop,
    )  # fmt: skip


def wire(tab: ChatTab, context: Context, knobs: Sequence[Any], new_chat: gr.Button) -> None:
    """Connect the widgets. `knobs` are the Parameters tab's widgets in the order of `KNOBS`."""
    talk = _Talk(context)
    started = [tab.chatbot, tab.live, tab.state, tab.versions, tab.notice, tab.box, tab.cut]
    streamed = [tab.live, tab.state, tab.meter, tab.cut]
    ended = tab.all_outputs

    def run(event: Any) -> None:
        event.then(talk.stream, None, streamed, **PRIVATE).then(talk.finish, [tab.box], ended, **PRIVATE)

    settings = [tab.system, *knobs]
    run(gr.on([tab.send.click, tab.box.submit], talk.begin_send, [tab.box, *settings], started, **PRIVATE))
    for example in tab.examples:
        run(example.click(talk.begin_send, [example, *settings], started, **PRIVATE))
    run(tab.again.click(talk.begin_again, settings, started, **PRIVATE))
    run(tab.chatbot.edit(talk.begin_edit, settings, started, **PRIVATE))
    tab.stop.click(talk.stop, None, None, queue=False, show_progress="hidden", api_visibility="private")
    tab.older.click(talk.older, None, ended, **PRIVATE)
    tab.newer.click(talk.newer, None, ended, **PRIVATE)
    tab.system.blur(talk.keep_system, [tab.system], [tab.meter], **PRIVATE)
    new_chat.click(talk.new_chat, None, ended, **PRIVATE)


async def whole(context: Context, session: Session, notice: str | None = None, box: Any = None) -> list[Any]:
    """Values for `all_outputs`: the conversation as it stands, nothing being written."""
    conversation = session.workspace.conversation
    used, about = await asyncio.gather(
        asyncio.to_thread(context.service.count_chat, conversation.messages_read()),
        asyncio.to_thread(context.service.status),
    )
    last = conversation.last()
    line = pieces.state_line(busy=False, empty=last is None, numbers=last.footer if last else "")
    meter = pieces.meter(used if last else 0, about.context)
    cut = pieces.cut(conversation.left_out(), about.context)
    turns = view(conversation.path())
    return [turns, "", line, _versions(session), pieces.notice(notice), meter, box or gr.skip(), cut]


def view(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """Turns as the Chatbot takes them. As parts, because a bare string would lose its indentation."""
    return [{"role": turn.role, "content": [{"type": "text", "text": turn.text}]} for turn in turns]


def _versions(session: Session) -> str:
    last = session.workspace.conversation.last()
    place, count = session.workspace.conversation.versions(last) if last else (1, 1)
    return f'<span class="versions" data-count="{count}">{place} / {count}</span>'


class _Talk:
    """The handlers. Holds only the context; what belongs to a person is in their session."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def begin_send(self, request: gr.Request, text: str, system: str, *values: Any) -> list[Any]:
        """Put a message in and clear the box."""
        if not text.strip():
            return [gr.skip()] * 7
        return self._begin(request, system, values, text, None)

    async def begin_again(self, request: gr.Request, system: str, *values: Any) -> list[Any]:
        """Ask for another version of the last reply."""
        return self._begin(request, system, values, None, None)

    async def begin_edit(self, request: gr.Request, edit: gr.EditData, system: str, *values: Any) -> list[Any]:
        """Say something else in place of an earlier message of mine."""
        index = edit.index[0] if isinstance(edit.index, (list, tuple)) else edit.index
        return self._begin(request, system, values, str(edit.value), int(index))

    def _begin(
        self, request: gr.Request, system: str, values: Sequence[Any], text: str | None, place: int | None
    ) -> list[Any]:
        session = session_of(self._context.registry, request)
        conversation = session.workspace.conversation
        try:
            run = Run(read_params(values), typed=text or "")
            session.begin("chat", run)
            conversation.system = system
            if text is not None:
                run.added = conversation.add_user(text) if place is None else conversation.edit_user(place, text)
            run.reply = conversation.open_reply()
        except (UserError, ValueError) as error:
            busy = session.writing("chat")
            words = sentence(error) if isinstance(error, UserError) else f"{error}."
            last = conversation.last()
            line = pieces.state_line(busy=False, empty=last is None, numbers=last.footer if last else "")
            state = gr.skip() if busy else line
            shown = gr.skip() if busy and place is None else view(_finished(session))
            return [shown, gr.skip(), state, gr.skip(), pieces.notice(words), gr.skip(), gr.skip()]
        box = "" if text is not None and place is None else gr.skip()
        line = pieces.state_line(busy=True, words="Starting")
        # A shorter chat may fit again; where it does not, the reply says so as soon as it is asked for.
        cut = gr.skip() if place is None else ""
        return [view(_finished(session)), "", line, _versions(session), "", box, cut]

    async def stream(self, request: gr.Request) -> AsyncIterator[tuple[str, str, str, str]]:
        """Write the reply into the light parts. What is shown is kept in the conversation as it comes."""
        session = session_of(self._context.registry, request)
        run = session.fresh("chat")
        if run is None or run.reply is None:
            yield (gr.skip(),) * 4  # type: ignore[misc]  # nothing was begun
            return
        workspace, reply, service = session.workspace, run.reply, self._context.service
        messages = workspace.conversation.messages()[:-1]
        line = meter = ""
        numbers_at = 0.0
        try:
            async with aclosing(
                follow(service, run, lambda: service.chat(messages, run.params, trim=True, person=session.person))
            ) as moments:
                async for moment in moments:
                    if run.done:  # another event has ended this run: nothing of it may be added any more
                        break
                    reply.text += moment.text
                    # Numbers that change eight times a second cannot be read, and each change is work for the browser.
                    if time.monotonic() - numbers_at > NUMBERS_EVERY:
                        numbers_at = time.monotonic()
                        meter = pieces.meter(run.stats.used_tokens, run.stats.context) if run.stats.context else meter
                        line = pieces.state_line(busy=True, words=moment.words, numbers=wording.speed(run.stats))
                    reply.left_out = run.left_out
                    cut = pieces.cut(run.left_out, run.stats.context) if run.stats.context else gr.skip()
                    yield reply.text, line, meter, cut
        finally:
            settle(workspace, run)
        if session.runs.get("chat") is not run:
            ended = await whole(self._context, session)
            yield "", ended[2], ended[5], ended[7]

    async def finish(self, request: gr.Request, box: str) -> list[Any]:
        """Move the reply into the Chatbot and empty the light part, in one response; say what went wrong."""
        session = session_of(self._context.registry, request)
        run = session.take_done("chat")
        if run is None:
            return [gr.skip()] * 8
        draft, session.workspace.draft = session.workspace.draft, ""
        notice = run.error
        if not notice and run.reply is not None and not run.reply.text and run.reason != "cancelled":
            notice = "The model ended its reply without a word. Try other words or another temperature."
        back = "\n".join(part for part in (draft, box) if part) if draft else None
        return await whole(self._context, session, notice, back)

    async def stop(self, request: gr.Request) -> None:
        """Takes effect within one engine step; the text stays."""
        run = session_of(self._context.registry, request).runs.get("chat")
        if run is not None:
            run.stop()

    async def new_chat(self, request: gr.Request) -> list[Any]:
        """Begin again; the system prompt stays, as it is set by hand and still to be seen."""
        session = session_of(self._context.registry, request)
        session.drop("chat")
        session.workspace.clear_chat()
        return await whole(self._context, session)

    async def older(self, request: gr.Request) -> list[Any]:
        """Show the version before."""
        return await self._step(request, -1)

    async def newer(self, request: gr.Request) -> list[Any]:
        """Show the version after."""
        return await self._step(request, 1)

    async def _step(self, request: gr.Request, by: int) -> list[Any]:
        session = session_of(self._context.registry, request)
        last = session.workspace.conversation.last()
        if last is None or session.writing("chat"):
            return [gr.skip()] * 8
        session.workspace.conversation.step(last, by)
        return await whole(self._context, session)

    async def keep_system(self, request: gr.Request, system: str) -> str:
        """The system prompt counts against the context from the moment it is written."""
        session = session_of(self._context.registry, request)
        session.workspace.conversation.system = system
        return (await whole(self._context, session))[5]


def _finished(session: Session) -> list[Turn]:
    """The shown turns without a reply that is still being written."""
    run = session.runs.get("chat")
    open_reply = run.reply if run is not None and not run.done else None
    return [turn for turn in session.workspace.conversation.path() if turn is not open_reply]
