"""A hub of models for tests: the endpoints that downloads use, on a free port of this machine, with faults on order.

    with HubServer({"some/model": {"model.gguf": b"..."}}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)

It speaks GET /api/models/REPO/revision/REVISION?blobs=true and HEAD/GET /REPO/resolve/COMMIT/FILE with ETag,
X-Repo-Commit, X-Linked-Size, Range and 206, and counts what it is asked for and how many bytes it gives.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = 1000  # files from this size on are listed with a SHA-256, smaller ones with git's hash


class HubServer:
    """`repos`: repository -> file -> content. Change the fields while it runs to make things go wrong."""

    def __init__(self, repos: Mapping[str, Mapping[str, bytes]]) -> None:
        self.repos = {repo: dict(files) for repo, files in repos.items()}
        self.commit = COMMIT
        self.revisions = {"main"}
        self.token: str | None = None  # when set, files are given only with it
        self.gated = False  # say so when the token is missing
        self.break_after: list[int] = []  # for each coming request of a file: bytes after which the connection breaks
        self.refuse_files = False  # close the connection when a file is asked for
        self.status = 0  # answer everything with this status
        self.ranges = True
        self.elsewhere = False  # send those who ask for a file to another address, as the hub does with large ones
        self.tokens_elsewhere: list[str | None] = []  # the Authorization headers that arrived there
        self.damaged: set[str] = set()  # files whose content is not what the list says
        self.listing: list[dict[str, Any]] | None = None  # instead of the true one
        self.answer: bytes | None = None  # instead of the whole listing
        self.stopped = False
        self.requests: list[str] = []
        self.file_bytes = 0
        hub = self

        class Handler(_Handler):
            server_of = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def stop(self) -> None:
        self.stopped = True  # connections that are still open get no answer any more
        if self._thread.is_alive():
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()

    def forget(self) -> None:
        self.requests.clear()
        self.file_bytes = 0

    @property
    def asked(self) -> list[str]:
        """Files that were asked for, in order."""
        return [request.split("/resolve/")[1].split("/", 1)[1] for request in self.requests if "/resolve/" in request]

    def siblings(self, repo: str) -> list[dict[str, Any]]:
        return self.listing if self.listing is not None else [entry(*file) for file in self.repos[repo].items()]


def entry(name: str, content: bytes) -> dict[str, Any]:
    """How the hub lists a file."""
    git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    found: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": git}
    if len(content) >= LARGE:
        found["lfs"] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest(), "pointerSize": 130}
    return found


class _Handler(BaseHTTPRequestHandler):
    server_of: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        hub, path = self.server_of, unquote(urlsplit(self.path).path)
        if hub.stopped:
            self.close_connection = True
            return None
        hub.requests.append(path)
        listing = re.fullmatch(r"/api/models/([^/]+/[^/]+)/revision/([^/]+)", path)
        file = re.fullmatch(r"(?:/elsewhere)?/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if hub.status:
            return self._error(hub.status, "")
        if not (listing or file):
            return self._error(404, "")
        repo = (listing or file)[1]  # type: ignore[index]
        if repo not in hub.repos:
            return self._error(401, "RepoNotFound")
        if listing:
            if listing[2] not in (*hub.revisions, hub.commit):
                return self._error(404, "RevisionNotFound")
            found = {"id": repo, "sha": hub.commit, "siblings": hub.siblings(repo)}
            answer = hub.answer if hub.answer is not None else json.dumps(found).encode()
            return self._send(200, answer, {"Content-Type": "application/json"})
        if path.startswith("/elsewhere/"):
            hub.tokens_elsewhere.append(self.headers.get("Authorization"))
        elif hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
            return self._error(403 if hub.gated else 401, "GatedRepo" if hub.gated else "RepoNotFound")
        assert file is not None
        content = hub.repos[repo].get(file[3])
        if content is None:
            return self._error(404, "EntryNotFound")
        if hub.elsewhere and not path.startswith("/elsewhere/"):
            port = urlsplit(hub.url).port
            return self._send(302, b"", {"Location": f"http://localhost:{port}/elsewhere{self.path}"})
        return self._send_file(file[3], content, body)

    def _send_file(self, name: str, content: bytes, body: bool) -> None:
        hub, start = self.server_of, 0
        if hub.refuse_files:
            self.close_connection = True
            return
        if name in hub.damaged:
            content = bytes([content[0] ^ 1]) + content[1:]
        headers = {"ETag": '"x"', "X-Repo-Commit": hub.commit, "X-Linked-Size": str(len(content))}
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if asked and hub.ranges:
            start = int(asked[1])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        part = content[start:]
        cut = len(part)
        if hub.break_after and body:
            cut = min(cut, hub.break_after.pop(0))
        hub.file_bytes += cut if body else 0  # before it is sent: who has it, or wants no more of it, may look at once
        self._send(206 if "Content-Range" in headers else 200, part, headers, cut if body else 0)
        self.close_connection = self.close_connection or cut < len(part)

    def _error(self, status: int, code: str) -> None:
        self._send(status, b'{"error":"no"}', {"X-Error-Code": code, "Content-Type": "application/json"})

    def _send(self, status: int, content: bytes, headers: Mapping[str, str], count: int | None = None) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[:count])
        self.wfile.flush()
