"""What the page costs: the engine's tokens per second alone, and with the reply streaming into a real Chromium.

Everything is on this one machine, the browser too, as it is for most people. Alone: the same messages through
`service.chat`, no page open. Runs are interleaved; what counts is the ratio of the medians.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import uvicorn
from playwright.sync_api import Browser, sync_playwright

from backend.api.app import create_api
from backend.api.guard import Guard
from backend.events import Stats
from backend.generation import Generation
from backend.params import GenerationParams
from backend.service import Service
from backend.settings import Settings
from backend.text.messages import Message
from tests.browser import HELP, find_browser
from ui.app import mount
from ui.sessions import Registry

NAME = "page"
REPLY, RUNS, SETTLE = 160, 5, 4.0  # tokens, counted runs, seconds
QUESTION = "Write a long story about a llama who learns to sing."
HISTORY = ("Tell me something about number {}.", "Number {} is a number that many people like, and with good reason.")


def run() -> dict[str, Any]:
    browser_path = find_browser()
    if browser_path is None:
        raise SystemExit(HELP)
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        bench = _Bench(Path(scratch), stack)
        playwright = stack.enter_context(sync_playwright())
        browser = playwright.chromium.launch(
            executable_path=browser_path,
            args=["--no-sandbox", "--disable-dev-shm-usage", "--disable-background-networking"],
        )
        stack.callback(browser.close)
        results = {}
        for turns in (0, 200):
            results[f"{turns} messages"] = _compare(bench, browser, turns)
        return results


def _compare(bench: _Bench, browser: Browser, turns: int) -> dict[str, Any]:
    alone: list[float] = []
    shown: list[float] = []
    for number in range(RUNS + 1):  # the first round warms up
        speeds = bench.alone(turns), bench.through_page(browser, turns)
        if number:
            alone.append(speeds[0])
            shown.append(speeds[1])
    ratio = statistics.median(shown) / statistics.median(alone)
    print(
        f"{turns:3} messages before: alone {statistics.median(alone):.1f} tokens/s, "
        f"in the page {statistics.median(shown):.1f} tokens/s, ratio {ratio:.3f}"
    )
    return {"alone": alone, "in_page": shown, "ratio_of_medians": ratio, "reply_tokens": REPLY}


class _Bench:
    """A real service behind a real server in this process, and a record of the replies it gives."""

    def __init__(self, scratch: Path, stack: contextlib.ExitStack) -> None:
        self.service = Service(dataclasses.replace(Settings(), data_dir=scratch))
        preset = self.service.read_preset("starter")
        sampling = GenerationParams(max_tokens=REPLY, temperature=0)
        self.service.load_preset(dataclasses.replace(preset, sampling=sampling, speculation="off"))
        stack.callback(self.service.close)
        # Replies of one length: no token ends them early.
        self.service.runtime().tokenizer.end_ids = frozenset()
        self.replies: list[Generation] = []
        self._remember_replies()
        self.registry = Registry()
        settings = self.service.settings
        app = mount(create_api(self.service, settings), self.service, settings, self.registry)
        self.port = stack.enter_context(_serving(Guard(app, settings)))

    def alone(self, turns: int) -> float:
        """Tokens per second of the reply with nobody looking."""
        generation = self.service.chat(_messages(turns) + [Message("user", QUESTION)], self.service.default_params())
        for _ in generation:
            pass
        return _speed(generation.stats)

    def through_page(self, browser: Browser, turns: int) -> float:
        """The same reply asked for and shown in a page that holds the same messages."""
        context = browser.new_context(viewport={"width": 1280, "height": 820})
        page = context.new_page()
        page.goto(f"http://127.0.0.1:{self.port}/")
        box = page.locator("#box textarea")
        loaded = page.locator("#meter").get_by_text("8,192").first  # filled in when the page knows its session
        loaded.wait_for()
        if turns:
            conversation = _last(self.registry.sessions()).workspace.conversation
            for message in _messages(turns):
                if message.role == "user":
                    conversation.add_user(message.content)
                else:
                    conversation.open_reply().text = message.content
            page.reload()
            page.locator("#messages").get_by_text(_messages(turns)[-1].content).first.wait_for()
            loaded.wait_for()
        time.sleep(SETTLE)  # opening a page costs the browser seconds of work; here it is the open page that counts
        before = len(self.replies)
        box.fill(QUESTION)
        box.press("Enter")
        _wait(lambda: len(self.replies) > before and self.replies[-1].finished)
        stats = self.replies[-1].stats
        context.close()
        return _speed(stats)

    def _remember_replies(self) -> None:
        chat = self.service.chat

        def remembered(messages: Sequence[Message], params: GenerationParams, **options: Any) -> Generation:
            generation = chat(messages, params, **options)
            self.replies.append(generation)
            return generation

        self.service.chat = remembered  # type: ignore[assignment, method-assign]


def _messages(turns: int) -> list[Message]:
    roles = ("user", "assistant")
    return [Message(roles[i % 2], HISTORY[i % 2].format(i // 2)) for i in range(turns)]  # type: ignore[arg-type]


def _speed(stats: Stats) -> float:
    if stats.completion_tokens != REPLY or stats.tokens_per_second is None:
        raise RuntimeError(f"the reply has {stats.completion_tokens} tokens, {REPLY} were to be measured")
    return stats.tokens_per_second


def _last(items: Sequence[Any]) -> Any:
    return items[-1]


def _wait(condition: Any, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError("the reply did not end in time")
        time.sleep(0.05)


@contextlib.contextmanager
def _serving(app: Any) -> Iterator[int]:
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    _wait(lambda: server.started)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()
