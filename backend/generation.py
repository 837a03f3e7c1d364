"""One reply on its way from the engine thread to whoever reads it.

The engine thread calls the listener side (`on_token`, `on_finish`); readers iterate, blocking or on an event loop. A
slow reader never makes the engine wait, and a reader that polls is not woken for every token: chunks are joined until
they are read.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Protocol

from backend.bell import Bell, Wake
from backend.events import Chunk, FinishReason, PromptScore, Stats
from backend.text.stream import TextStream


class EngineRequest(Protocol):
    """What a generation needs to know of the engine's request."""

    id: str

    @property
    def prompt_scores(self) -> Sequence[PromptScore]: ...

    def stats(self) -> Stats: ...


class Generation:
    """A running reply. Iterate for chunks; the last one carries `finish_reason`. `stop()` may be called by anyone."""

    def __init__(
        self,
        token_bytes: Callable[[int], bytes],
        stop: tuple[str, ...],
        prompt_ids: tuple[int, ...],
        *,
        trim_start: bool = False,
    ) -> None:
        self.id = ""
        self.model = ""  # id of the model that answers, as programs know it
        self.left_out = 0  # messages of the chat that are not read any more, because the context is full
        self.begin(token_bytes, stop, prompt_ids, trim_start=trim_start)
        self._request: EngineRequest | None = None
        self._cancel: Callable[[], None] = lambda: None
        self._changed = threading.Condition()
        self._pieces: list[str] = []
        self._ids: list[int] = []
        self._logprobs: list[float] = []
        self._top_logprobs: list[tuple[tuple[int, float], ...]] = []
        self._finish: FinishReason | None = None
        self._error: Exception | None = None
        self._delivered = False
        self._waker: tuple[asyncio.AbstractEventLoop, Wake] | None = None

    @classmethod
    def waiting(cls) -> Generation:
        """A reply whose model is still being loaded: `begin` follows when it is there, or `on_finish`."""
        generation = cls(lambda _: b"", (), ())
        generation._begun = False
        return generation

    @property
    def begun(self) -> bool:
        """Whether a model has taken the request, or it has ended before that."""
        return self._begun or self.finished

    def begin(
        self,
        token_bytes: Callable[[int], bytes],
        stop: tuple[str, ...],
        prompt_ids: tuple[int, ...],
        *,
        trim_start: bool = False,
        bell: Bell | None = None,
    ) -> None:
        """What the model makes of the request. Before any token arrives. `bell`: of the engine, which rings it when it
        has told of all tokens; without one the reader is woken for each at once."""
        self.prompt_ids = prompt_ids
        self.token_bytes = token_bytes
        self._bell, self._at_once = bell or Bell(), bell is None
        self._text = TextStream(stop, trim_start=trim_start)
        self._begun = True

    def attach(self, request: EngineRequest, cancel: Callable[[], None]) -> None:
        """Called when the engine has accepted the request; before, when it has to wait for a model."""
        self._request = request
        self._cancel = cancel
        self.id = request.id

    @property
    def stats(self) -> Stats:
        """How things stand now, also between chunks."""
        return self._request.stats() if self._request else Stats()

    @property
    def prompt_scores(self) -> Sequence[PromptScore]:
        """Of the prompt's tokens from the second on, where asked for; all of them are here before the first token."""
        return self._request.prompt_scores if self._request else ()

    @property
    def finished(self) -> bool:
        return self._finish is not None

    def stop(self) -> None:
        """End the reply within one engine step; what was said so far stays. Idempotent, never blocks."""
        self._cancel()

    # the engine's side -----------------------------------------------------------------------------------------------

    def on_token(
        self, token_id: int, logprob: float | None, *, visible: bool = True, top: tuple[tuple[int, float], ...] = ()
    ) -> bool:
        """Take one token; return True when the text has met a stop string. `visible` False: an end token, no text."""
        text = self._text.push(self.token_bytes(token_id)) if visible else ""
        with self._changed:
            self._ids.append(token_id)
            if logprob is not None:
                self._logprobs.append(logprob)
                self._top_logprobs.append(top)
            if text:
                self._pieces.append(text)
            self._notify(self._at_once)
        return self._text.stopped

    def on_finish(self, reason: FinishReason, error: Exception | None = None) -> None:
        """The engine is done with this request; frees nothing here, only tells the reader. Later calls do nothing."""
        rest = self._text.flush()
        with self._changed:
            if self._finish is not None:
                return
            if rest:
                self._pieces.append(rest)
            self._finish, self._error = reason, error
            self._notify(True)

    def _notify(self, at_once: bool) -> None:
        self._changed.notify_all()
        waker, self._waker = self._waker, None
        if waker is not None:
            self._bell.pull(*waker)
        if at_once:
            self._bell.ring()

    # the reader's side -----------------------------------------------------------------------------------------------

    def _take(self) -> Chunk | None:
        """Everything that came since the last read, as one chunk; None when there is nothing. Holds the lock."""
        if not self._ids and not self._pieces and (self._finish is None or self._delivered):
            return None
        chunk = Chunk(
            text="".join(self._pieces),
            finish_reason=self._finish,
            stats=self.stats,
            ids=tuple(self._ids),
            logprobs=tuple(self._logprobs),
            top_logprobs=tuple(self._top_logprobs),
            error=self._error,
        )
        self._pieces, self._ids, self._logprobs, self._top_logprobs = [], [], [], []
        self._delivered = self._finish is not None
        return chunk

    def __iter__(self) -> Iterator[Chunk]:
        """Blocking: for terminals and tests. Leaving the loop early does not stop the engine; call `stop()`."""
        while True:
            with self._changed:
                chunk = self._take()
                while chunk is None:
                    if self._delivered:
                        return
                    self._changed.wait()
                    chunk = self._take()
            yield chunk
            if chunk.finish_reason is not None:
                return

    async def next_chunk(self, timeout: float | None = None) -> Chunk | None:
        """Wait for news on the running event loop. None when `timeout` seconds passed without any."""
        loop = asyncio.get_running_loop()
        arrived = asyncio.Event()
        waker = loop, arrived.set
        with self._changed:
            chunk = self._take()
            if chunk is not None or self._delivered:
                return chunk
            self._waker = waker
        # Not asyncio.wait_for: before Python 3.12 it can swallow a cancellation that arrives together with the event.
        timer = loop.call_later(timeout, arrived.set) if timeout is not None else None
        try:
            await arrived.wait()
        finally:
            if timer is not None:
                timer.cancel()
            with self._changed:
                if self._waker is waker:
                    self._waker = None
        with self._changed:
            return self._take()

    async def chunks(self, pause: float = 0.0, keep_alive: float | None = None) -> AsyncIterator[Chunk]:
        """Chunks on the running event loop, at most one every `pause` seconds.

        With `keep_alive`, an empty chunk with fresh stats comes after that many seconds of silence, so that a reader
        whose client went away notices. Closing the iterator stops the engine's work on this reply.
        """
        try:
            while True:
                chunk = await self.next_chunk(keep_alive)
                if chunk is None:
                    if self._delivered:
                        return
                    chunk = Chunk(stats=self.stats)
                yield chunk
                if chunk.finish_reason is not None:
                    return
                if pause:
                    await asyncio.sleep(pause)
        finally:
            if self._finish is None:
                self.stop()
