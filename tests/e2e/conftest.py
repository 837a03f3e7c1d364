"""A browser in front of the real page and a service without a model: every test gets a server state of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, Request, expect, sync_playwright
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from backend.api.guard import CSP
from backend.settings import Settings
from tests.browser import HELP, find_browser
from tests.fakes import FakeService
from ui.app import mount
from ui.sessions import Registry

ARGUMENTS = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-background-networking"]
PATIENCE = 30_000  # milliseconds that an expectation may take on a busy machine


class Policy:
    """Adds the headers that the real server adds, so that the page is tested under them."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", CSP.encode())]
            await send(message)

        await self.app(scope, receive, answer if scope["type"] == "http" else send)


@dataclass
class Site:
    """One served page, its service and its registry."""

    url: str
    service: FakeService
    registry: Registry


@dataclass
class Watch:
    """What a browser did that it should not have done."""

    origin: str
    errors: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)
    expected: tuple[str, ...] = ()  # texts of console errors that a test provokes

    def follow(self, page: Page) -> list[tuple[Any, Any]]:
        """Listen to a page; returns what was attached, for pages that outlive a test."""
        followers = [("console", self._console), ("pageerror", self._error), ("request", self._request)]
        for event, follower in followers:
            page.on(event, follower)  # type: ignore[call-overload]
        return followers

    def _error(self, error: object) -> None:
        self.errors.append(f"page error: {error}")

    def _console(self, message: ConsoleMessage) -> None:
        if message.type == "error" and not any(text in message.text for text in self.expected):
            self.errors.append(f"console: {message.text} ({message.location.get('url', '')})")

    def _request(self, request: Request) -> None:
        if not request.url.startswith((self.origin, "data:", "blob:")):
            self.outside.append(request.url)


class Server:
    """uvicorn in a thread. The service and the registry behind it are changed between tests, not the server."""

    def __init__(self) -> None:
        self.front = _Front()
        self.registry = Registry()
        app = FastAPI()
        app.add_middleware(Policy)
        mount(app, self.front, Settings(), self.registry)  # type: ignore[arg-type]
        config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", timeout_graceful_shutdown=1)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        wait_for(lambda: self._server.started, 60)
        self.url = f"http://127.0.0.1:{self._server.servers[0].sockets[0].getsockname()[1]}/"

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join(10)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A browser and a server beside each other need processors that a busy machine may give to others for seconds. A
    test that fails runs once more, and the summary says so."""
    for item in items:
        if "e2e" in item.path.parts:
            item.add_marker(pytest.mark.flaky(reruns=1))


class _Front:
    """The door the page was built with: whatever service the running test has put behind it."""

    def __init__(self) -> None:
        self.service = FakeService()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.service, name)


def wait_for(condition: Callable[[], object], seconds: float = 30.0) -> None:
    """Wait until something outside of the browser is true."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"waited {seconds} s in vain")
        time.sleep(0.02)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("gradio")))
        patch.setenv("GRADIO_HEARTBEAT_INTERVAL", "1")
        running = Server()
        yield running
        running.close()


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        path = find_browser()
        if path is None:
            pytest.fail(HELP)
        launched = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield launched
        launched.close()


@pytest.fixture
def site(server: Server) -> Iterator[Site]:
    """The page with a fresh, quick service behind it; a test may set its `delay`, `reply` and failures."""
    service = FakeService()
    server.front.service = service
    yield Site(server.url, service, server.registry)
    service.close()


@pytest.fixture
def watch(site: Site) -> Iterator[Watch]:
    """Fails the test when a page wrote an error or asked for anything outside of the machine."""
    watching = Watch(site.url)
    yield watching
    assert watching.errors == []
    assert watching.outside == []


@pytest.fixture
def window(browser: Browser, site: Site, watch: Watch) -> Iterator[Callable[..., Page]]:
    """Opens the page as another person would: in a browser context of its own."""
    contexts: list[BrowserContext] = []

    def opened(**options: Any) -> Page:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 820}, **options})
        contexts.append(context)
        page = context.new_page()
        watch.follow(page)
        enter(page, site.url)
        return page

    yield opened
    for context in contexts:
        context.close()


@pytest.fixture(scope="session")
def shared(browser: Browser, server: Server) -> Iterator[Callable[[], Page]]:
    """One page that the chat tests take turns with: loading it is what takes the time. Thrown away when in doubt."""
    kept: list[Page] = []

    def again() -> Page:
        if kept and kept[0].is_closed():
            kept.clear()
        if not kept:
            kept.append(browser.new_context(viewport={"width": 1280, "height": 820}).new_page())
            enter(kept[0], server.url)
        return kept[0]

    yield again
    for page in kept:
        page.context.close()


@pytest.fixture
def page(shared: Callable[[], Page], watch: Watch, request: pytest.FixtureRequest) -> Iterator[Page]:
    """A page with an empty chat."""
    used = shared()
    followers = watch.follow(used)
    failed = request.session.testsfailed
    fresh(used)
    yield used
    for event, follower in followers:
        used.remove_listener(event, follower)
    if request.session.testsfailed != failed or watch.errors:
        used.context.close()


def fresh(page: Page) -> None:
    """Bring a page that has been used back to where a new one starts."""
    page.evaluate("""() => {
        document.querySelector('#tab-chat-button').click();
        const area = document.querySelector('#system textarea');
        area.value = '';
        area.dispatchEvent(new Event('input', {bubbles: true}));
        document.querySelector('#composer-card').classList.remove('with-system');
        document.querySelector('#new-chat').click();
    }""")
    expect(page.locator("#welcome")).to_be_visible()
    page.locator("#box textarea").fill("")
    expect(page.locator("#chat-notice [role=alert]")).to_have_count(0)


def enter(page: Page, url: str) -> None:
    """Load the page and wait until it can be used."""
    page.set_default_timeout(PATIENCE)
    expect.set_options(timeout=PATIENCE)
    page.goto(url)
    settled(page)


def settled(page: Page) -> None:
    """Gradio has mounted, our script runs, and what the server keeps of this tab has arrived."""
    page.wait_for_selector("body[data-ready]", state="attached")
    page.wait_for_selector("#chip .chip")


def say(page: Page, text: str, *, wait: bool = True) -> None:
    """Send a message with the keyboard; wait for the end of the reply unless told otherwise."""
    page.locator("#box textarea").fill(text)
    page.locator("#box textarea").press("Enter")
    if wait:
        expect(page.locator("#messages .message.user").last).to_contain_text(text[:40])
        done(page)


def done(page: Page) -> None:
    """The reply is complete and has moved into the list of turns."""
    expect(page.locator("#send")).to_be_visible()
    expect(page.locator("#live .md > *")).to_have_count(0)


def tab(page: Page, name: str) -> None:
    page.get_by_role("tab", name=name).click()
    expect(page.get_by_role("tab", name=name)).to_have_attribute("aria-selected", "true")
