"""The guard: who may talk to this server, with what and how much of it."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.routing import Route
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from backend.api.app import create_api
from backend.api.guard import CSP, Guard, Limits
from backend.api.paths import is_api_path
from backend.settings import Settings
from tests.api_server import HERE, TALK, assert_error, client, guarded, serving, wait_for
from tests.fakes import FakeService

EVIL = "http://evil.test"
OURS = "127.0.0.1:7860"
CHAT = "/v1/chat/completions"
SMALL = Limits(api_body=1000, page_body=500, upload_body=2000)


@pytest.fixture(scope="module")
def http() -> Iterator[TestClient]:
    with client(FakeService(delay=0), limits=SMALL) as opened:
        yield opened


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("localhost", True), ("localhost:1", True), ("LOCALHOST:7860", True), ("127.0.0.1", True),
        ("127.0.0.1:7860", True), ("[::1]", True), ("[::1]:7860", True), ("[0:0:0:0:0:0:0:1]:7860", True),
        ("evil.test", False), ("evil.test:7860", False), ("localhost.evil.test", False), ("127.0.0.1.evil.test", False),
        ("evil.test@localhost", False), ("localhost:7860@evil.test", False), ("", False), ("localhost:", False),
        ("[::1", False), ("::1", False), ("[::2]", False), ("localhost localhost", False), ("192.168.1.5", False),
        ("localhost:7860:7860", False), ("lo\xe7alhost", False),
    ],
)  # fmt: skip
def test_host(http: TestClient, host: str, allowed: bool) -> None:
    for path in ("/health", "/v1/models", "/", "/gradio_api/queue/data"):
        response = http.get(path, headers={b"host": host.encode("latin-1")})
        assert (response.status_code == 200) == allowed
        if not allowed and is_api_path(path):
            assert_error(response, 403, "host_not_allowed")
        elif not allowed:
            assert response.status_code == 403
            assert response.headers["content-type"].startswith("text/plain")


def test_a_matching_origin_does_not_make_a_foreign_host_ours(http: TestClient) -> None:
    headers = {"host": "evil.test:7860", "origin": "http://evil.test:7860"}
    assert_error(http.post(CHAT, json=TALK, headers=headers), 403, "host_not_allowed")


def test_further_names_and_wildcard_addresses() -> None:
    cases = [
        (Settings(host="192.168.1.5"), (), "192.168.1.5:7860", 200),
        (Settings(host="192.168.1.5"), (), "192.168.1.6:7860", 403),
        (Settings(host="0.0.0.0"), (), "192.168.1.6:7860", 200),
        (Settings(host="::"), (), "[fe80::1]:7860", 200),
        (Settings(host="0.0.0.0"), (), "evil.test", 403),
        (Settings(host="0.0.0.0"), ("Share.Example",), "share.example", 200),
        (Settings(), ("share.example",), "not.share.example", 403),
    ]
    for settings, names, host, status in cases:
        with client(FakeService(), settings, hosts=names) as http:
            assert http.get("/health", headers={"host": host}).status_code == status


@pytest.mark.parametrize(
    ("headers", "allowed"),
    [
        ({}, True),
        ({"origin": HERE}, True),
        ({"origin": HERE, "sec-fetch-site": "same-origin"}, True),
        ({"origin": HERE.upper()}, True),
        ({"sec-fetch-site": "none"}, True),
        ({"host": "localhost", "origin": "http://localhost:80"}, True),
        ({"host": "localhost", "origin": "https://localhost"}, True),
        ({"origin": EVIL}, False),
        ({"origin": "null"}, False),
        ({"origin": ""}, False),
        ({"origin": "http://127.0.0.1:3000"}, False),
        ({"origin": "http://localhost:7860"}, False),
        ({"origin": "file://127.0.0.1:7860"}, False),
        ({"origin": "http://127.0.0.1:7860.evil.test"}, False),
        ({"sec-fetch-site": "cross-site"}, False),
        ({"origin": HERE, "sec-fetch-site": "Cross-Site"}, False),
    ],
)
def test_origin(http: TestClient, headers: dict[str, str], allowed: bool) -> None:
    assert (http.post(CHAT, json=TALK, headers=headers).status_code == 200) == allowed
    for path in ("/gradio_api/queue/join", "/gradio_api/upload", "/login"):
        for method in ("POST", "PUT", "DELETE", "PATCH"):
            assert (http.request(method, path, headers=headers).status_code == 200) == allowed
    if headers.get("host") is None:
        assert http.get("/v1/models", headers=headers).status_code == 200  # links and images may come from anywhere


@pytest.mark.parametrize(
    ("kind", "allowed"),
    [
        ("application/json", True), ("application/json; charset=utf-8", True), ("Application/JSON", True),
        ("text/plain", False), ("application/x-www-form-urlencoded", False), ("multipart/form-data; boundary=x", False),
        ("text/plain; application/json", False), ("application/jsonp", False), (None, False),
    ],
)  # fmt: skip
def test_content_type(http: TestClient, kind: str | None, allowed: bool) -> None:
    headers = {"content-type": kind} if kind else {}
    for path in (CHAT, "/completions", "/v1/presets/load"):
        response = http.post(path, content=b"[]", headers=headers)
        assert_error(response, 400 if allowed else 415)
    assert http.post("/gradio_api/upload", content=b"x", headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("path", "limit"), [(CHAT, 1000), ("/v1/x", 1000), ("/login", 500), ("/gradio_api/upload", 2000)]
)
@pytest.mark.parametrize("chunked", [False, True])
def test_body_limit(http: TestClient, path: str, limit: int, chunked: bool) -> None:
    def sent(size: int) -> Any:
        content = iter([b" " * (size // 2), b" " * (size - size // 2)]) if chunked else b" " * size
        return http.post(path, content=content, headers={"content-type": "application/json"})

    assert sent(limit).status_code != 413
    if path == "/v1/x":
        return  # nobody reads that body, so only its declared length can be refused
    response = sent(limit + 1)
    assert response.status_code == 413
    if is_api_path(path):
        assert_error(response, 413, "request_too_large")
    else:
        assert response.headers["content-type"].startswith("text/plain")


def test_default_limits() -> None:
    limits = Limits()
    assert [limits.body(path) for path in (CHAT, "/", "/gradio_api/upload")] == [4 << 20, 1 << 20, 20 << 20]
    with client(FakeService(delay=0)) as http:
        big = {"messages": [{"role": "user", "content": "x" * (4 << 20)}]}
        assert_error(http.post(CHAT, json=big), 413, "request_too_large")
        bad = http.post(CHAT, content=b"{}", headers={"content-type": "application/json", "content-length": "-5"})
        assert_error(bad, 400)


def test_an_endless_body_is_cut_on_a_real_socket() -> None:
    with serving(FakeService(), limits=SMALL) as port, socket.create_connection(("127.0.0.1", port), 5) as opened:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        opened.sendall(head.encode() + b"Transfer-Encoding: chunked\r\n\r\n")
        chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
        sent = 0
        try:
            while sent < 200 << 20:
                opened.sendall(chunk)
                sent += len(chunk)
        except OSError:
            pass
        assert sent < 100 << 20


def test_headers_limit(http: TestClient) -> None:
    assert_error(http.get("/v1/models", headers={"x-big": "x" * 70_000}), 431)
    assert_error(http.get("/v1/models?" + "x" * 40_000, headers={"x-big": "x" * 30_000}), 431)
    assert http.get("/v1/models?" + "x" * 40_000).status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=http://evil.test/x", "/gradio_api/file=https://evil.test", "/gradio_api/file=HTTP://evil.test",
        "/gradio_api/file=%68ttp://evil.test", "/gradio_api/file=%2568ttp://evil.test",
        "/gradio_api/file%3Dhttp://evil.test", "/gradio_api/file=%20http://x", "/gradio_api/proxy=https://x.hf.space/",
    ],
)  # fmt: skip
def test_gradio_fetches_nothing_for_anyone(http: TestClient, path: str) -> None:
    assert http.get(path).status_code == 403
    assert http.get("/gradio_api/file=/tmp/x.png").status_code == 200


def test_headers_on_every_answer(http: TestClient) -> None:
    page = http.get("/", headers={"origin": EVIL})
    assert page.headers["content-security-policy"] == CSP
    assert "access-control-allow-origin" not in page.headers
    assert "access-control-allow-credentials" not in page.headers
    answers = [
        page,
        http.get("/missing"),
        http.get("/v1/models"),
        http.get("/v1/nope"),
        http.post(CHAT, json={}),
        http.post(CHAT, json=TALK),
        http.get("/boom"),
        http.get("/", headers={"host": "evil.test"}),
    ]
    for answer in answers:
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
    assert len({answer.headers["x-request-id"] for answer in answers}) == len(answers)
    assert "secret" not in answers[6].text


# keys ----------------------------------------------------------------------------------------------------------------

KEYS = Settings(api_keys=("first-key", "second-key"))


def api_routes() -> list[tuple[str, str]]:
    """Every (method, path) that the application has, read from its route table."""
    app: FastAPI = create_api(FakeService(), KEYS)
    found = []
    for route in app.routes:
        path, methods = route.path, getattr(route, "methods", None) or {"GET", "POST", "DELETE"}  # type: ignore[attr-defined]
        found += [(method, path.replace("{name:path}", "x").replace("{rest:path}", "x")) for method in sorted(methods)]
    assert len(found) > 25
    return sorted(set(found))


@pytest.mark.parametrize(("method", "path"), api_routes())
def test_every_route_is_known_to_the_guard_and_needs_a_key(method: str, path: str) -> None:
    assert is_api_path(path)
    with TestClient(guarded(FakeService(delay=0), KEYS), base_url=HERE) as http:
        for wrong in ({}, {"authorization": "Bearer nope"}):
            status = http.request(method, path, headers={"content-type": "application/json", **wrong}).status_code
            assert status == 401 or (path == "/health" and status in (200, 405))
        good = {"content-type": "application/json", "authorization": "Bearer second-key"}
        assert http.request(method, path, headers=good).status_code != 401


@pytest.mark.parametrize(
    ("value", "allowed"),
    [
        ("Bearer first-key", True), ("bearer second-key", True), ("BEARER  first-key ", True),
        ("first-key", False), ("Basic first-key", False), ("Bearer", False), ("Bearer ", False), ("", False),
        ("Bearer first-key,second-key", False), ("Bearer first-ke", False), ("Bearer first-keyy", False),
        ("Bearer \xff\xfe", False), ("Bearer FIRST-KEY", False),
    ],
)  # fmt: skip
def test_key_spellings(value: str, allowed: bool) -> None:
    with client(FakeService(), KEYS) as http:
        response = http.get("/v1/models", headers={b"authorization": value.encode("latin-1")})
        if allowed:
            assert response.status_code == 200
            return
        error = assert_error(response, 401, "invalid_api_key")
        assert error["type"] == "authentication_error"


def test_keys_are_for_programs_only() -> None:
    with client(FakeService(), KEYS) as http:
        assert http.get("/").status_code == 200  # the page has logins of its own
        assert http.get("/health").status_code == 200
        assert http.get("/V1/models").json() == {"page": "/V1/models", "bytes": 0}  # not a route of ours
        twice = [("authorization", "Bearer first-key"), ("authorization", "Bearer nope")]
        assert http.get("/v1/models", headers=twice).status_code == 401
    with client(FakeService(), Settings(api_keys=("",))) as http:
        for value in ("Bearer", "Bearer ", ""):
            assert http.get("/v1/models", headers={"authorization": value}).status_code == 401


def test_a_root_path_does_not_hide_the_api() -> None:
    app = guarded(FakeService(), KEYS)
    with TestClient(app, base_url=HERE, root_path="/suri") as http:
        for path in ("/suri/v1/models", "/v1/models"):
            assert http.get(path).status_code == 401


# passing things through ----------------------------------------------------------------------------------------------


def test_websockets_are_refused() -> None:
    with client(FakeService()) as http, pytest.raises(WebSocketDisconnect):
        http.websocket_connect("/gradio_api/ws").__enter__()


def test_nothing_is_buffered() -> None:
    """The first event is here long before the reply ends."""
    service = FakeService(delay=0.2)
    service.reply = lambda asked: "word " * 50
    body = json.dumps({**TALK, "stream": True})
    with serving(service) as port, socket.create_connection(("127.0.0.1", port), 5) as opened:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        opened.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        received = b""
        while b'"content":"word"' not in received:
            received += opened.recv(65536)
        assert service.status().running == 1
        opened.close()
        wait_for(lambda: service.status().running == 0)


def test_lifespan_reaches_the_app() -> None:
    seen = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["type"])
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.complete"})

    with TestClient(Guard(app, Settings())):
        assert seen == ["lifespan"]


def test_routes_answer_every_method_themselves() -> None:
    """Without this the page, mounted at "/", would take a wrong method for one of its own paths."""
    app = create_api(FakeService(), Settings())
    any_method = {route.path for route in app.routes if isinstance(route, Route) and not route.methods}
    assert {route.path for route in app.routes} <= any_method  # type: ignore[attr-defined]
