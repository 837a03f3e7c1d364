"""Generations -> answers: a stream of events, or the same chunks folded into one body.

Both ways stop every generation that is still running when they are left, for whatever reason they are left.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from backend.api.failures import as_user_error, error_body, error_response
from backend.api.scores import Scored, Scores
from backend.api.shapes import Reply, Shape
from backend.api.sse import DONE, PING, disconnected, ended, event
from backend.errors import UserError
from backend.events import Chunk, Stats
from backend.generation import Generation

PING_SECONDS = 15.0
LOOK = 0.05  # seconds between looks whether the awaited model is there
CLIENT_CLOSED = 499  # nobody reads it; it tells the access log apart from a success

log = logging.getLogger(__name__)


def stop_all(generations: Sequence[Generation]) -> None:
    for generation in generations:
        if not generation.finished:
            generation.stop()


async def events(
    shape: Shape, generations: Sequence[Generation], ping_seconds: float = PING_SECONDS
) -> AsyncGenerator[bytes, None]:
    """Server-sent events of all choices, interleaved by index. After the 200 an error can only be an event."""
    try:
        async with aclosing(_told(shape, generations, ping_seconds)) as told:
            async for data in told:
                yield data
    except Exception as error:
        yield event(error_body(_reported(error)))
    finally:
        stop_all(generations)
    yield DONE


async def _told(shape: Shape, generations: Sequence[Generation], ping_seconds: float) -> AsyncGenerator[bytes, None]:
    last = [Stats()] * len(generations)
    scores = [Scores() for _ in generations]
    async with aclosing(_unbegun(generations, ping_seconds)) as pings:
        async for ping in pings:
            yield ping
    shape = shape.answered_by(generations[0].model)
    for index in range(len(generations)):
        opening = shape.opening(index)
        if opening:
            yield event(opening)
    spoken = time.monotonic()
    async with aclosing(merged(generations, ping_seconds)) as chunks:
        async for index, chunk in chunks:
            last[index] = chunk.stats
            if chunk.finish_reason == "error":
                raise _reported(chunk.error)
            scored = scores[index].take(chunk, generations[index].token_bytes) if chunk.logprobs else ()
            if chunk.text or scored:
                yield event(shape.piece(index, chunk.text, scored))
            if chunk.finish_reason:
                yield event(shape.ending(index, chunk.finish_reason))
            if chunk.text or scored or chunk.finish_reason:
                spoken = time.monotonic()
            elif time.monotonic() - spoken >= ping_seconds * 0.9:  # timers may fire a little early
                yield PING
                spoken = time.monotonic()
    closing = shape.closing(last)
    if closing:
        yield event(closing)


async def _unbegun(generations: Sequence[Generation], ping_seconds: float) -> AsyncGenerator[bytes, None]:
    """Until a model has taken them all: pings while one is being loaded. Only then is its name known."""
    spoken = time.monotonic()
    while not all(generation.begun for generation in generations):
        await asyncio.sleep(LOOK)
        if time.monotonic() - spoken >= ping_seconds:
            yield PING
            spoken = time.monotonic()


async def answer(shape: Shape, generations: Sequence[Generation], request: Request) -> Response:
    """One JSON body, or nothing to nobody when the client has gone in the meantime."""
    folding = asyncio.ensure_future(_folded(generations))
    leaving = asyncio.ensure_future(disconnected(request.receive))
    try:
        await asyncio.wait({folding, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not folding.done():
            return Response(status_code=CLIENT_CLOSED)
        whole = await folding
        return JSONResponse(shape.answered_by(generations[0].model).whole(whole))
    except UserError as error:
        return error_response(error)
    finally:
        stop_all(generations)
        await ended(folding, leaving)


async def _folded(generations: Sequence[Generation]) -> list[Reply]:
    texts: list[list[str]] = [[] for _ in generations]
    scores = [Scores() for _ in generations]
    scored: list[list[Scored]] = [[] for _ in generations]
    replies: dict[int, Reply] = {}
    async with aclosing(merged(generations, None)) as chunks:
        async for index, chunk in chunks:
            if chunk.finish_reason == "error":
                raise _reported(chunk.error)
            texts[index].append(chunk.text)
            if chunk.logprobs:
                scored[index] += scores[index].take(chunk, generations[index].token_bytes)
            if chunk.finish_reason:
                text = "".join(texts[index])
                replies[index] = Reply(text, chunk.finish_reason, chunk.stats, tuple(scored[index]))
    return [replies[index] for index in range(len(generations))]


async def merged(
    generations: Sequence[Generation], keep_alive: float | None
) -> AsyncGenerator[tuple[int, Chunk], None]:
    """Chunks of all generations as they come, each with its index; an empty one after `keep_alive` silent seconds.

    The next chunk is asked for only when the last one was taken, so a slow reader lets a generation join its chunks.
    Each wait is a task of its own because a task can be left at any moment: `asyncio.wait_for`, before Python 3.12,
    sometimes loses a cancellation, and a loop around it would then go on for nobody.
    """

    def ask(index: int) -> asyncio.Future[Chunk | None]:
        return asyncio.ensure_future(generations[index].next_chunk(keep_alive))

    waiting = {ask(index): index for index in range(len(generations))}
    try:
        while waiting:
            arrived, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in arrived:
                index = waiting.pop(task)
                chunk = task.result() or Chunk(stats=generations[index].stats)
                yield index, chunk
                if chunk.finish_reason is None:
                    waiting[ask(index)] = index
    finally:
        await ended(*waiting)


def _reported(error: Exception | None) -> UserError:
    """The error for the client; what was not meant for people goes to the log with its trace."""
    if not isinstance(error, UserError):
        log.error("a reply ended with an unexpected error", exc_info=error)
    return as_user_error(error)
