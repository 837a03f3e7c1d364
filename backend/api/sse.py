"""Server-sent events: how they are framed, and a response that ends the moment its reader is gone.

Knows nothing of models: for a lost reader the event iterator is closed and `on_close` is called, no more.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

PING = b": ping\n\n"
DONE = b"data: [DONE]\n\n"
STALLED_SECONDS = 60.0  # a reader that takes nothing for this long has left without saying so


def event(body: dict[str, Any]) -> bytes:
    """One event. ASCII only: U+2028 and its kin are line ends to some clients' readers, and would split an event."""
    return b"data: " + json.dumps(body, separators=(",", ":")).encode("ascii") + b"\n\n"


class EventStream(Response):
    """Streams `events`; when the client disconnects or stalls, closes them instead of waiting for the next one.

    `on_close` is called at the end in every case: an iterator that was never started has no `finally` to run.
    """

    def __init__(self, events: AsyncGenerator[bytes, None], on_close: Callable[[], None]) -> None:
        self.events = events
        self.on_close = on_close
        self._sending_since: float | None = None
        self.status_code = 200
        self.background = None
        self.init_headers(
            {
                "content-type": "text/event-stream; charset=utf-8",
                "cache-control": "no-cache",
                "x-accel-buffering": "no",
            }
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        writing = asyncio.ensure_future(self._write(send))
        leaving = asyncio.ensure_future(disconnected(receive))
        stalling = asyncio.ensure_future(self._stalled())
        try:
            await asyncio.wait({writing, leaving, stalling}, return_when=asyncio.FIRST_COMPLETED)
            if writing.done():
                await writing
        finally:
            self.on_close()
            await ended(writing, leaving, stalling)
            await self.events.aclose()

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for data in self.events:
            self._sending_since = time.monotonic()
            await send({"type": "http.response.body", "body": data, "more_body": True})
            self._sending_since = None
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _stalled(self) -> None:
        """Return when one event has been on its way for too long. One look now and then costs less than a timer for
        each event."""
        while self._sending_since is None or time.monotonic() - self._sending_since < STALLED_SECONDS:
            await asyncio.sleep(STALLED_SECONDS / 4)


async def ended(*tasks: asyncio.Future[Any]) -> None:
    """Cancel the tasks and wait for their end. Their errors are taken, or asyncio would complain about them."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def disconnected(receive: Receive) -> None:
    """Return when the client has closed the connection. The request's body must have been read before."""
    while (await receive())["type"] != "http.disconnect":
        pass
