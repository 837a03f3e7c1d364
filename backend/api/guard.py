"""The door-keeper: one ASGI middleware in front of the API and the page, which decides before either sees a request.

A browser that is told to visit a hostile page will carry requests to this server, from inside of the user's machine:
binding to 127.0.0.1 protects nobody. So the name the browser believes to talk to (Host) must be ours, and whatever
changes something must come from our own page (Origin, Sec-Fetch-Site) or from a program (no such headers).

Also here, because it must hold for every route: API keys, sizes, content type, security headers, request ids. Nothing
is buffered: bodies are counted as they pass, so that streams, disconnects and slow readers behave as without a guard.
"""

from __future__ import annotations

import hmac
import ipaddress
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import unquote

import anyio
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from backend import persons
from backend.api import paths
from backend.api.failures import HTTPFailure, error_headers, error_response
from backend.settings import Settings

MEBIBYTE = 2**20
CSP = (
    "default-src 'self'; img-src 'self' data: blob:; connect-src 'self'; font-src 'self' data:; "
    "style-src 'self' 'unsafe-inline'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "worker-src 'self' blob:; frame-ancestors 'self'; base-uri 'self'; object-src 'none'; form-action 'self'"
)
LOOPBACK = ("localhost", "127.0.0.1", "::1")
WILDCARDS = ("", "0.0.0.0", "::")  # noqa: S104 - compared with, not bound to
READING = ("GET", "HEAD", "OPTIONS")
UPLOAD = "/gradio_api/upload"
# Gradio fetches a URL for anyone who asks for it as a "file", and forwards to Spaces under "proxy"
FETCHING = re.compile(r"/+gradio_api/+(file=\s*http|proxy=)", re.IGNORECASE)
DRAIN_SECONDS = 2.0
REPLACED = (b"content-security-policy", b"referrer-policy", b"x-content-type-options", b"x-request-id")


@dataclass(frozen=True)
class Limits:
    """Bytes. Bodies are counted while they arrive; headers include the path and the query."""

    api_body: int = 4 * MEBIBYTE
    page_body: int = 1 * MEBIBYTE
    upload_body: int = 20 * MEBIBYTE
    headers: int = 64 * 1024

    def body(self, path: str) -> int:
        if paths.is_api_path(path):
            return self.api_body
        return self.upload_body if path == UPLOAD else self.page_body


class Guard:
    """ASGI middleware around `app`. `hosts` are further names under which the server is reached, without ports."""

    def __init__(self, app: ASGIApp, settings: Settings, hosts: Sequence[str] = (), limits: Limits | None = None):
        self._app = app
        self._limits = limits or Limits()
        self._admin = settings.admin_key.encode() if settings.admin_key is not None else None
        self._keys = (*(key.encode() for key in settings.api_keys), *([self._admin] if self._admin else []))
        self._open = not settings.api_keys  # to everybody, but for what needs the admin key
        self._any_address = settings.host in WILDCARDS
        self._hosts = frozenset(_plain_name(name) for name in (*LOOPBACK, settings.host, *hosts) if name)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":  # neither API nor page has one, and browsers open them across origins
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = paths.route_path(scope)
        exchange = Exchange(receive, send, api=paths.is_api_path(path), limit=self._limits.body(path))
        try:
            self._check(scope, path, exchange.limit)
        except HTTPFailure as refusal:
            await exchange.refuse(scope, refusal)
            return
        try:
            known = {"request_id": exchange.request_id, "person": self._person(scope)}
            scope = {**scope, "state": {**scope.get("state", {}), **known}}
            await self._app(scope, exchange.receive, exchange.send)
        except Exception:
            if exchange.too_large is None:
                raise
        if exchange.too_large is not None and not exchange.started:
            await exchange.refuse(scope, exchange.too_large)

    def _check(self, scope: Scope, path: str, limit: int) -> None:
        """Raise HTTPFailure for a request that must not get further. Cheap checks that need no secret come first."""
        headers = _headers(scope)
        self._check_form(scope, path)
        host = self._checked_host(headers.get(b"host", []))
        if scope["method"] not in READING:
            _check_origin(headers, host)
        if paths.is_api_path(path):
            self._check_key(path, headers.get(b"authorization", []))
            if scope["method"] == "POST":
                _check_content_type(headers.get(b"content-type", []))
        elif _fetches(path):
            raise HTTPFailure(403, "this server fetches no addresses")
        _check_length(headers.get(b"content-length", []), limit)

    def _check_form(self, scope: Scope, path: str) -> None:
        size = len(scope.get("raw_path") or b"") + len(scope.get("query_string", b""))
        size += sum(len(name) + len(value) + 4 for name, value in scope["headers"])
        if size > self._limits.headers:
            raise HTTPFailure(431, f"the request's address and headers exceed {self._limits.headers} bytes")
        if not path.startswith("/"):
            raise HTTPFailure(400, "the request's path must begin with /", code="invalid_path")

    def _checked_host(self, values: list[bytes]) -> str:
        host = values[0].decode("latin-1").lower() if len(values) == 1 else ""
        name = _host_name(host)
        if name is None or not (name in self._hosts or (self._any_address and _is_address(name))):
            raise HTTPFailure(403, "this server does not answer under that host name", code="host_not_allowed")
        return host

    def _check_key(self, path: str, values: list[bytes]) -> None:
        guarded = path in paths.ADMIN and self._admin is not None
        if path == paths.HEALTH or (self._open and not guarded):
            return
        scheme, _, given = (values[0] if len(values) == 1 else b"").partition(b" ")
        given = given.strip()
        # every key is compared, so that the time taken tells nothing about which one nearly fits
        matches = [hmac.compare_digest(given, key) for key in self._keys]
        if scheme.lower() != b"bearer" or not given or not any(matches):
            raise HTTPFailure(
                401, "a valid API key is needed: Authorization: Bearer KEY", headers={"www-authenticate": "Bearer"}
            )
        if guarded and self._admin is not None and not hmac.compare_digest(given, self._admin):
            raise HTTPFailure(403, "loading presets needs the admin key")

    def _person(self, scope: Scope) -> str:
        """Who asks, by the key where keys are asked for. After the check: the key is one of ours."""
        address = (scope.get("client") or ("", 0))[0]
        if self._open:
            return persons.by_address(address)
        values = _headers(scope).get(b"authorization", [])
        return persons.by_key(values[0].partition(b" ")[2].strip()) if values else persons.by_address(address)


class Exchange:
    """One request and its answer: counts what comes in, marks what goes out."""

    def __init__(self, receive: Receive, send: Send, *, api: bool, limit: int) -> None:
        self.request_id = f"req_{uuid.uuid4().hex}"
        self.limit = limit
        self.started = False
        self.too_large: HTTPFailure | None = None
        self._api = api
        self._receive = receive
        self._send = send
        self._taken = 0
        self._more = True  # the client has not said yet that its body is complete

    async def receive(self) -> Message:
        message = await self._counted()
        if self._taken > self.limit:
            self.too_large = _too_large(self.limit)
            raise self.too_large
        return message

    async def _counted(self) -> Message:
        message = await self._receive()
        self._taken += len(message.get("body", b""))
        self._more = message["type"] == "http.request" and bool(message.get("more_body"))
        return message

    async def send(self, message: Message) -> None:
        if self.too_large is not None and not self.started:
            return  # whatever the app makes of the broken-off body, the answer is 413
        if message["type"] == "http.response.start":
            self.started = True
            message = {**message, "headers": self._marked(message.get("headers", []))}
        await self._send(message)

    async def refuse(self, scope: Scope, error: HTTPFailure) -> None:
        """Answer in the words of whoever asked: JSON for programs, a sentence for the page."""
        response: Response = error_response(error)
        if not self._api:
            response = PlainTextResponse(error.message, status_code=error.status, headers=error_headers(error))
        self.too_large = None
        if error.status == 413:
            response.headers["connection"] = "close"
            await self._drain(_headers(scope))
        await response(scope, self._receive, self.send)

    async def _drain(self, headers: dict[bytes, list[bytes]]) -> None:
        """Read on for a moment: closing on a client that still writes would lose it the answer."""
        if b"expect" in headers:  # it waits for our word before it sends
            return
        with anyio.move_on_after(DRAIN_SECONDS):
            while self._more and self._taken <= 2 * self.limit + MEBIBYTE:
                await self._counted()

    def _marked(self, headers: Sequence[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        """Our headers in place of the app's. Nobody gets a CORS permission: Gradio gives them to anyone on a LAN."""
        kept = [
            (name, value)
            for name, value in headers
            if name.lower() not in REPLACED and not name.lower().startswith(b"access-control-")
        ]
        kept.append((b"x-request-id", self.request_id.encode()))
        kept.append((b"x-content-type-options", b"nosniff"))
        kept.append((b"referrer-policy", b"no-referrer"))
        if not self._api:
            kept.append((b"content-security-policy", CSP.encode()))
        return kept


def _headers(scope: Scope) -> dict[bytes, list[bytes]]:
    found: dict[bytes, list[bytes]] = {}
    for name, value in scope["headers"]:
        found.setdefault(name.lower(), []).append(value)
    return found


def _check_origin(headers: dict[bytes, list[bytes]], host: str) -> None:
    """A browser names the page that sends; a program does not, and passes."""
    if any(value.strip().lower() == b"cross-site" for value in headers.get(b"sec-fetch-site", [])):
        raise HTTPFailure(403, "requests from other sites are refused", code="cross_site")
    origins = headers.get(b"origin", [])
    if origins and (len(origins) > 1 or not _same_place(origins[0].decode("latin-1").lower(), host)):
        raise HTTPFailure(403, "requests from other origins are refused", code="cross_site")


def _same_place(origin: str, host: str) -> bool:
    scheme, _, place = origin.partition("://")
    port = {"http": ":80", "https": ":443"}.get(scheme)
    return port is not None and place.removesuffix(port) == host.removesuffix(port)


def _check_content_type(values: list[bytes]) -> None:
    """JSON only: the types an HTML form can send would need no permission from another site."""
    kind = values[0].split(b";")[0].strip().lower() if len(values) == 1 else b""
    if kind != b"application/json":
        raise HTTPFailure(415, "the body must be sent as Content-Type: application/json")


def _check_length(values: list[bytes], limit: int) -> None:
    for value in values:
        if not value.isdigit():
            raise HTTPFailure(400, "Content-Length is not a number", code="invalid_length")
        if len(value) > 18 or int(value) > limit:
            raise _too_large(limit)


def _too_large(limit: int) -> HTTPFailure:
    return HTTPFailure(413, f"the body is larger than {limit} bytes")


def _fetches(path: str) -> bool:
    """Also when the path was encoded more than once; who decodes how often is not ours to know."""
    for _ in range(4):
        if FETCHING.match(path):
            return True
        path = unquote(path)
    return False


def _host_name(host: str) -> str | None:
    """The name or address in a Host header, without port and brackets; None when it is malformed."""
    found = re.fullmatch(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:[0-9]{1,5})?", host)
    return _plain_name(found[1]) if found else None


def _plain_name(name: str) -> str:
    """One spelling per name: lower case, no brackets, addresses in their shortest form."""
    plain = name.lower().removeprefix("[").removesuffix("]")
    try:
        return str(ipaddress.ip_address(plain))
    except ValueError:
        return plain


def _is_address(name: str) -> bool:
    """An address cannot be rebound by a hostile name server, so it is safe when all addresses are listened on."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
