"""The whole thing as a user has it: `python webui.py` in a process of its own, the starter model, a browser."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect

from backend.settings import PROJECT
from tests.e2e.conftest import Watch, enter, wait_for

SLOW = 60_000  # milliseconds: a real model on a busy machine


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Serves with a preset that answers greedily, and ends the server as a person would."""
    folder: Path = tmp_path_factory.mktemp("presets")
    for path in (PROJECT / "presets").glob("*.yaml"):
        # With a speed limit, so that a reply that is to be stopped is still being written when the browser gets to it.
        sampling = "sampling: {temperature: 0, max_tokens: 300, max_tokens_per_second: 30}\n"
        (folder / path.name).write_text(path.read_text() + sampling)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ["--port", str(port), "--presets-dir", str(folder), "--data-dir", str(folder / "data")]
    process = subprocess.Popen([sys.executable, "webui.py", *flags], cwd=PROJECT)
    try:
        wait_for(lambda: ready(port), 240)
        yield f"http://127.0.0.1:{port}/"
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()


def ready(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture
def real_page(browser: Browser, url: str) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": 1280, "height": 820})
    page = context.new_page()
    watching = Watch(url)
    watching.follow(page)
    enter(page, url)
    yield page
    context.close()
    assert watching.errors == []
    assert watching.outside == []


def ask(page: Page, text: str) -> int:
    """Send; returns how many replies there will be."""
    replies = page.locator("#messages .bot-row").count()
    page.locator("#box textarea").fill(text)
    page.locator("#box textarea").press("Enter")
    return replies + 1


def finished(page: Page, replies: int) -> None:
    expect(page.locator("#messages .bot-row")).to_have_count(replies, timeout=SLOW)
    expect(page.locator("#send")).to_be_visible(timeout=SLOW)


def test_a_real_chat(real_page: Page) -> None:
    finished(real_page, ask(real_page, "What is the capital of France?"))
    expect(real_page.locator("#messages .bot").last).to_contain_text("Paris")
    expect(real_page.locator("#chat-state")).to_contain_text(re.compile(r"s to first"))
    expect(real_page.locator("#meter")).to_contain_text("/ 8,192")
    finished(real_page, ask(real_page, "And of Italy?"))
    expect(real_page.locator("#messages .bot").last).to_contain_text("Rome")


def test_stop_and_another_preset(real_page: Page) -> None:
    replies = ask(real_page, "Write a long story about a llama who learns to sing.")
    expect(real_page.locator("#live")).to_contain_text(re.compile(r"(\w+\W+){8}"), timeout=SLOW)
    real_page.locator("#stop").click()
    finished(real_page, replies)
    kept = real_page.locator("#messages .bot").last.inner_text()
    assert len(kept.split()) >= 8
    time.sleep(0.7)
    assert real_page.locator("#messages .bot").last.inner_text() == kept
    real_page.locator("#tab-presets-button").click()
    row = real_page.locator("tr", has_text="starter-bf16")
    row.get_by_role("button").click()
    expect(row).to_contain_text("running", timeout=SLOW)
    expect(real_page.locator("#chip")).to_contain_text("bf16")
    real_page.locator("#tab-chat-button").click()
    finished(real_page, ask(real_page, "What is the capital of France?"))
    expect(real_page.locator("#messages .bot").last).to_contain_text("Paris")


def test_the_same_engine_for_programs(url: str) -> None:
    body = {"messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0}
    reply = httpx.post(f"{url}v1/chat/completions", json=body, timeout=60).json()
    assert "Paris" in reply["choices"][0]["message"]["content"]
    assert httpx.get(url, headers={"host": "evil.test"}).status_code == 403


def test_the_end_of_a_reply_is_in_sight(real_page: Page) -> None:
    finished(
        real_page,
        ask(real_page, "Write a Python function that reverses a text. Then explain every line of it at length."),
    )
    real_page.wait_for_timeout(400)
    foot, composer = (real_page.locator(part).bounding_box() for part in ("#reply-foot", "#composer"))
    assert foot is not None
    assert composer is not None
    assert foot["y"] + foot["height"] <= composer["y"] + 1
