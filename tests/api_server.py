"""Shared by the API's tests: the app behind its guard, in process or on a real port, and a strict reader of events."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.testclient import TestClient

from backend.api.app import create_api
from backend.api.guard import Guard
from backend.settings import Settings
from tests.fakes import FakeService

HERE = "http://127.0.0.1:7860"
TALK = {"messages": [{"role": "user", "content": "hello there"}]}


async def page(request: Request) -> Response:
    """Stands for the page that is mounted at "/": answers every path, reads what is sent."""
    body = await request.body() if request.method != "GET" else b""
    headers = {"access-control-allow-origin": "http://evil.test", "access-control-allow-credentials": "true"}
    if request.url.path == "/boom":
        raise RuntimeError("secret detail")
    if request.url.path == "/missing":
        return PlainTextResponse("page 404", 404)
    return JSONResponse({"page": request.url.path, "bytes": len(body)}, headers=headers)


def guarded(service: FakeService, settings: Settings | None = None, **options: Any) -> Guard:
    settings = settings or Settings()
    app = create_api(service, settings)
    methods = ["GET", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"]
    app.mount("/", Starlette(routes=[Route("/{rest:path}", page, methods=methods)]))
    return Guard(app, settings, **options)


@contextmanager
def client(service: FakeService, settings: Settings | None = None, **options: Any) -> Iterator[TestClient]:
    app = guarded(service, settings, **options)
    with TestClient(app, base_url=HERE, raise_server_exceptions=False) as opened:
        yield opened


@contextmanager
def serving(service: FakeService, settings: Settings | None = None, **options: Any) -> Iterator[int]:
    """A real server on a free port, stopped at the end. Gives the port."""
    with server_of(service, settings, **options) as server:
        yield port_of(server)


def port_of(server: uvicorn.Server) -> int:
    return int(server.servers[0].sockets[0].getsockname()[1])


@contextmanager
def server_of(service: FakeService, settings: Settings | None = None, **options: Any) -> Iterator[uvicorn.Server]:
    config = uvicorn.Config(
        guarded(service, settings, **options), port=0, log_level="error", timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_for(lambda: server.started)
    try:
        yield server
    finally:
        server.should_exit = True
        thread.join(5)


def wait_for(condition: Any, seconds: float = 5.0) -> float:
    """Wait until `condition()` is true and return how long it took."""
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() - begin < seconds, "waited too long"
        time.sleep(0.01)
    return time.monotonic() - begin


def raw_post(port: int, path: str, body: dict[str, Any]) -> socket.socket:
    """Send a request and leave the socket open, nothing read."""
    data = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(data)}\r\n\r\n"
    )
    opened = socket.create_connection(("127.0.0.1", port), timeout=5)
    opened.sendall(head.encode() + data)
    return opened


def read_events(raw: bytes) -> list[Any]:
    """Server-sent events by the letter: `data: X` LF LF or a comment LF LF, nothing else. Comments come as strings."""
    assert raw.endswith(b"\n\n")
    assert b"\r" not in raw
    events: list[Any] = []
    for block in raw[:-2].split(b"\n\n"):
        assert b"\n" not in block, "one line per event"
        if block.startswith(b":"):
            events.append(block.decode())
            continue
        assert block.startswith(b"data: ")
        data = block[len(b"data: ") :].decode()
        events.append(data if data == "[DONE]" else json.loads(data))
    return events


def assert_error(response: Any, status: int | None = None, code: str | None = None) -> dict[str, Any]:
    """The answer is an error in the one shape, with its request id."""
    if status is not None:
        assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    body = response.json()
    assert set(body) == {"error"}
    error = body["error"]
    assert {"message", "type", "param", "code"} <= set(error)
    assert isinstance(error["message"], str)
    assert error["message"]
    assert isinstance(error["type"], str)
    assert error["param"] is None or isinstance(error["param"], str)
    assert error["code"] is None or isinstance(error["code"], str)
    if code is not None:
        assert error["code"] == code
    return dict(error)
