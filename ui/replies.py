"""Following one reply from Send to its end, for both writing tabs. Knows the service and a run; knows no widgets.

The iterator is what Gradio drives: it is closed when the browser goes away, and whatever way it ends, the engine's work
on the reply ends with it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import cast

from backend.errors import UserError
from backend.events import Chunk
from backend.generation import Generation
from ui import wording
from ui.door import Service
from ui.sessions import Run

logger = logging.getLogger(__name__)

PAUSE = 0.12  # seconds between updates: about 8 a second, since each costs the browser time the engine could use
PAUSE_PER_CHARACTER = 0.12 / 10_000  # the browser renders a long reply slower, so it is shown less often
KEEP_ALIVE = 0.5  # seconds of silence after which we look whether anybody is still there
OUR_FAULT = "Something went wrong inside Suri. The server's log says what; your text is kept."


@dataclass(frozen=True)
class Moment:
    """News of a reply: text that came since the last one, and what is going on, in words."""

    text: str
    words: str


async def follow(service: Service, run: Run, ask: Callable[[], Generation]) -> AsyncGenerator[Moment, None]:
    """Wait for a model, ask it, and pass on what it says. How it ended is in `run.reason` and `run.error`."""
    shown = 0
    try:
        async with aclosing(_wait_until_ready(service, run)) as waiting:
            async for words in waiting:
                yield Moment("", words)
        if run.stopped:
            run.reason = "cancelled"
            return
        generation = await asyncio.to_thread(_start, run, ask)
        stream = cast(AsyncGenerator[Chunk, None], generation.chunks(pause=PAUSE, keep_alive=KEEP_ALIVE))
        async with aclosing(stream) as chunks:
            async for chunk in chunks:
                run.stats, run.left_out = chunk.stats, generation.left_out
                shown += len(chunk.text)
                if chunk.finish_reason is not None:
                    run.reason = chunk.finish_reason
                    if chunk.error is not None:
                        run.error = sentence(chunk.error)
                yield Moment(chunk.text, wording.phase(chunk.stats))
                await asyncio.sleep(shown * PAUSE_PER_CHARACTER if chunk.finish_reason is None else 0)
    except Exception as error:
        run.reason, run.error = "error", sentence(error)
    finally:
        run.stop()


def sentence(error: Exception) -> str:
    """One sentence for the person. A defect of ours goes to the log whole and to the page as a plain apology."""
    if isinstance(error, UserError):
        text = error.message
        if text.split(" ", 1)[0].isalpha():  # the name of a file or a parameter keeps its spelling
            text = text[:1].upper() + text[1:]
        return text if text.endswith((".", "?")) else f"{text}."
    logger.error("a reply failed", exc_info=error)
    return OUR_FAULT


def _start(run: Run, ask: Callable[[], Generation]) -> Generation:
    """In a worker thread. Whoever comes second, a `stop()` or the generation, sees the other."""
    generation = ask()
    run.generation = generation
    if run.stopped:
        generation.stop()
    return generation


async def _wait_until_ready(service: Service, run: Run) -> AsyncGenerator[str, None]:
    """While a preset is being loaded, what is going on; ends when there is something to ask, or to be told no by."""
    while not run.stopped:
        status = await asyncio.to_thread(service.status)
        if status.state != "loading":
            return
        yield wording.loading(status.loading, status.loading_preset)
        await asyncio.sleep(0.25)
