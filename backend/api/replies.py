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
from backend.api.scores import Scored, Scores, prompt_logprobs
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
    async with aclosing(_unbegun(generations, ping_seconds)) as pings:
        async for ping in pings:
            yield ping
    shape = _known(shape, generations)
    scores = [_scores(shape, generation) for generation in generations]
    unsaid = set(range(len(generations))) if shape.echoed and shape.envelope.scored else set()
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
            if index in unsaid and (chunk.ids or chunk.finish_reason):
                unsaid.discard(index)
                yield event(shape.piece(index, *_echo(shape, scores[index], index, generations[index])))
            scored = scores[index].take(chunk) if chunk.logprobs else ()
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
    folding = asyncio.ensure_future(_folded(shape, generations))
    leaving = asyncio.ensure_future(disconnected(request.receive))
    try:
        await asyncio.wait({folding, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not folding.done():
            return Response(status_code=CLIENT_CLOSED)
        whole = await folding
        return JSONResponse(_known(shape, generations).whole(whole))
    except UserError as error:
        return error_response(error)
    finally:
        stop_all(generations)
        await ended(folding, leaving)


async def _folded(shape: Shape, generations: Sequence[Generation]) -> list[Reply]:
    said: list[list[Chunk]] = [[] for _ in generations]
    async with aclosing(merged(generations, None)) as chunks:
        async for index, chunk in chunks:
            if chunk.finish_reason == "error":
                raise _reported(chunk.error)
            said[index].append(chunk)
    shape = _known(shape, generations)
    return [_reply(shape, index, generation, said[index]) for index, generation in enumerate(generations)]


def _reply(shape: Shape, index: int, generation: Generation, chunks: Sequence[Chunk]) -> Reply:
    """One finished reply from its chunks."""
    scores, last = _scores(shape, generation), chunks[-1]
    assert last.finish_reason is not None
    scored: tuple[Scored, ...] = ()
    if shape.envelope.scored:
        echo = _echo(shape, scores, index, generation)[1] if shape.echoed else ()
        scored = (*echo, *(token for chunk in chunks for token in scores.take(chunk)))
    wanted, of_prompt = shape.envelope.prompt_logprobs, None
    if wanted is not None:
        of_prompt = prompt_logprobs(generation.prompt_ids, generation.prompt_scores, wanted, generation.token_bytes)
    values = [value for chunk in chunks for value in chunk.logprobs]
    likelihood = sum(values) / len(values) if values else 0.0
    text = "".join(chunk.text for chunk in chunks)
    return Reply(text, last.finish_reason, last.stats, scored, of_prompt, likelihood)


def _known(shape: Shape, generations: Sequence[Generation]) -> Shape:
    """The shape with what is known when a model has taken the request."""
    echoed = [
        prompt if isinstance(prompt, str) else b"".join(map(generation.token_bytes, prompt)).decode("utf-8", "replace")
        for prompt, generation in zip(shape.echoed, generations)
    ]
    return shape.answered_by(generations[0].model, generations[0].left_out, echoed)


def _scores(shape: Shape, generation: Generation) -> Scores:
    return Scores(generation.token_bytes, shape.envelope.top_logprobs, every=bool(shape.echoed))


def _echo(shape: Shape, scores: Scores, index: int, generation: Generation) -> tuple[str, tuple[Scored, ...]]:
    """A prompt that is said again, and its scored tokens."""
    text = str(shape.echoed[index])
    return text, scores.echo(generation.prompt_ids, generation.prompt_scores, text)


async def merged(
    generations: Sequence[Generation], keep_alive: float | None
) -> AsyncGenerator[tuple[int, Chunk], None]:
    """Chunks of all generations as they come, each with its index; an empty one after `keep_alive` silent seconds.

    The next chunk is asked for only when the last one was taken, so a slow reader lets a generation join its chunks.
    Of several, each wait is a task of its own because a task can be left at any moment: `asyncio.wait_for`, before
    Python 3.12, sometimes loses a cancellation, and a loop around it would then go on for nobody. One needs no task.
    """
    if len(generations) == 1:
        (generation,) = generations
        while True:
            chunk = await generation.next_chunk(keep_alive) or Chunk(stats=generation.stats)
            yield 0, chunk
            if chunk.finish_reason is not None:
                return

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
