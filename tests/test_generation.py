"""A reply between the engine's thread and its reader: nothing lost, nothing twice, nobody waits for nothing."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from backend.bell import Bell
from backend.errors import EngineError
from backend.events import Chunk, Stats
from backend.generation import Generation


class FakeRequest:
    id = "r1"

    def __init__(self) -> None:
        self.asked = 0

    def stats(self) -> Stats:
        self.asked += 1
        return Stats(phase="decode", prompt_tokens=3, completion_tokens=self.asked)


WORDS = ["Hello", " ", "wörld", "!", " ##", "# hidden"]


def reply(stop: tuple[str, ...] = ()) -> tuple[Generation, list[str]]:
    """A generation over WORDS, and the list to which a cancel is noted."""
    generation, cancels = Generation(lambda i: WORDS[i].encode(), stop, (7, 8, 9)), []
    generation.attach(FakeRequest(), lambda: cancels.append("cancel"))
    return generation, cancels


def speak(generation: Generation, ids: list[int], pause: float = 0.0, reason: str = "stop") -> threading.Thread:
    def run() -> None:
        for token in ids:
            time.sleep(pause)
            if generation.on_token(token, -0.5):
                break
        generation.on_finish(reason)  # type: ignore[arg-type]

    thread = threading.Thread(target=run)
    thread.start()
    return thread


async def gathered(generation: Generation, **options: Any) -> list[Chunk]:
    return [chunk async for chunk in generation.chunks(**options)]


READERS: dict[str, Callable[[Generation], list[Chunk]]] = {
    "blocking": list,
    "async": lambda generation: asyncio.run(gathered(generation)),
    "async with a pause": lambda generation: asyncio.run(gathered(generation, pause=0.02)),
    "async with keep-alive": lambda generation: asyncio.run(gathered(generation, keep_alive=0.003)),
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS.keys())
@pytest.mark.parametrize("pause", [0.0, 0.005])
def test_every_reader_gets_everything_once(read: Callable[[Generation], list[Chunk]], pause: float) -> None:
    generation, cancels = reply()
    thread = speak(generation, [0, 1, 2, 3], pause)
    chunks = read(generation)
    thread.join()
    assert "".join(chunk.text for chunk in chunks) == "Hello wörld!"
    assert [token for chunk in chunks for token in chunk.ids] == [0, 1, 2, 3]
    assert [value for chunk in chunks for value in chunk.logprobs] == [-0.5] * 4
    assert [chunk.finish_reason for chunk in chunks][-1] == "stop"
    assert all(chunk.finish_reason is None for chunk in chunks[:-1])
    assert generation.finished
    assert cancels == []


@pytest.mark.parametrize("read", READERS.values(), ids=READERS.keys())
def test_what_came_before_reading_is_one_chunk(read: Callable[[Generation], list[Chunk]]) -> None:
    generation, _ = reply()
    speak(generation, [0, 1, 2]).join()
    chunks = read(generation)
    assert [(chunk.text, chunk.ids, chunk.finish_reason) for chunk in chunks] == [("Hello wörld", (0, 1, 2), "stop")]
    assert read(generation) == [], "a reply is read once"


def test_a_stop_string_ends_the_text() -> None:
    generation, _ = reply(stop=("###",))
    assert not generation.on_token(0, None)
    assert not generation.on_token(4, None)
    assert generation.on_token(5, None)
    generation.on_finish("stop")
    (chunk,) = list(generation)
    assert (chunk.text, chunk.ids, chunk.logprobs) == ("Hello ", (0, 4, 5), ())


def test_text_that_was_held_comes_at_the_end() -> None:
    generation, _ = reply(stop=("###",))
    generation.on_token(0, None)
    generation.on_token(4, None)
    generation.on_finish("length")
    assert "".join(chunk.text for chunk in generation) == "Hello ##"


def test_an_end_token_is_counted_and_not_shown() -> None:
    generation, _ = reply()
    generation.on_token(0, None)
    generation.on_token(3, None, visible=False)
    generation.on_finish("stop")
    (chunk,) = list(generation)
    assert (chunk.text, chunk.ids) == ("Hello", (0, 3))


def test_an_error_arrives_with_the_last_chunk_and_only_the_first_end_counts() -> None:
    generation, _ = reply()
    generation.on_token(0, None)
    error = EngineError("broken")
    generation.on_finish("error", error)
    generation.on_finish("stop")
    (chunk,) = list(generation)
    assert (chunk.text, chunk.finish_reason, chunk.error) == ("Hello", "error", error)


def test_a_reply_without_any_token_still_ends() -> None:
    generation, _ = reply()
    generation.on_finish("cancelled")
    assert [(chunk.text, chunk.finish_reason) for chunk in generation] == [("", "cancelled")]


def test_stats_before_and_after_attach() -> None:
    generation = Generation(lambda i: b"", (), ())
    assert generation.stats == Stats()
    assert generation.id == ""
    generation.stop()  # nothing to stop yet, and no error
    generation.attach(FakeRequest(), lambda: None)
    assert generation.id == "r1"
    assert generation.stats.prompt_tokens == 3


def test_leaving_the_blocking_loop_does_not_stop_the_engine() -> None:
    generation, cancels = reply()
    generation.on_token(0, None)
    for _ in generation:
        break
    assert cancels == []
    generation.stop()
    assert cancels == ["cancel"]


# on an event loop -------------------------------------------------------------------------------------------------


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, 10))


def test_a_slow_reader_gets_joined_chunks() -> None:
    async def main() -> None:
        generation, _ = reply()
        thread = speak(generation, [0, 1, 2, 3] * 10, 0.002)
        begin, chunks = time.monotonic(), []
        async for chunk in generation.chunks(pause=0.03):
            chunks.append(chunk)
        elapsed = time.monotonic() - begin
        thread.join()
        assert "".join(chunk.text for chunk in chunks) == "Hello wörld!" * 10
        assert len(chunks) <= elapsed / 0.03 + 2, "at most one each pause"
        assert max(len(chunk.ids) for chunk in chunks) > 1

    run(main())


def test_keep_alive_comes_in_silence_with_fresh_stats() -> None:
    async def main() -> None:
        generation, _ = reply()
        stream = generation.chunks(keep_alive=0.02)
        first, second = await anext(stream), await anext(stream)
        assert (first.text, first.ids, first.finish_reason) == ("", (), None)
        assert second.stats.completion_tokens > first.stats.completion_tokens
        generation.on_token(0, None)
        assert (await anext(stream)).text == "Hello"
        generation.on_finish("stop")
        assert (await anext(stream)).finish_reason == "stop"
        with pytest.raises(StopAsyncIteration):
            await anext(stream)

    run(main())


def test_next_chunk_returns_none_when_time_is_up() -> None:
    async def main() -> None:
        generation, _ = reply()
        begin = time.monotonic()
        assert await generation.next_chunk(0.05) is None
        assert time.monotonic() - begin >= 0.04
        generation.on_token(0, None)
        chunk = await generation.next_chunk(0.05)
        assert chunk is not None
        assert chunk.text == "Hello"

    run(main())


def test_closing_the_iterator_stops_the_request() -> None:
    async def main() -> None:
        generation, cancels = reply()
        stream = generation.chunks()
        generation.on_token(0, None)
        assert (await anext(stream)).text == "Hello"
        assert cancels == []
        await stream.aclose()  # type: ignore[attr-defined]
        assert cancels == ["cancel"]

    run(main())


def test_a_cancelled_task_stops_the_request() -> None:
    async def main() -> None:
        generation, cancels = reply()
        task = asyncio.create_task(gathered(generation))
        await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert cancels == ["cancel"]
        generation.on_token(0, None)  # the engine speaks on into nothing, unharmed
        generation.on_finish("cancelled")

    run(main())


def test_closing_after_the_end_stops_nothing() -> None:
    async def main() -> None:
        generation, cancels = reply()
        generation.on_token(0, None)
        generation.on_finish("stop")
        stream = generation.chunks()
        await anext(stream)
        await stream.aclose()  # type: ignore[attr-defined]
        assert cancels == []

    run(main())


def test_the_engine_outlives_the_readers_loop() -> None:
    generation, _ = reply()

    async def wait_a_moment() -> None:
        await generation.next_chunk(None)

    loop = asyncio.new_event_loop()
    task = loop.create_task(wait_a_moment())
    loop.run_until_complete(asyncio.sleep(0.01))
    generation._bell.pull(
        loop, lambda: pytest.fail("nobody is there")
    )  # as the engine does just before the loop closes
    task.cancel()
    loop.run_until_complete(asyncio.gather(task, return_exceptions=True))
    loop.close()
    generation.on_token(0, None)
    generation.on_finish("stop")
    assert [chunk.text for chunk in generation] == ["Hello"]


def test_readers_of_a_bell_are_woken_together_when_it_rings() -> None:
    class Loop(asyncio.SelectorEventLoop):
        calls = 0

        def call_soon_threadsafe(self, *args: Any, **kwargs: Any) -> asyncio.Handle:
            self.calls += 1
            return super().call_soon_threadsafe(*args, **kwargs)

    bell, loop = Bell(), Loop()
    replies = [reply()[0] for _ in range(8)]
    for generation in replies:
        generation.begin(lambda i: WORDS[i].encode(), (), (7,), bell=bell)

    async def main() -> None:
        waiting = [asyncio.ensure_future(generation.next_chunk()) for generation in replies]
        await asyncio.sleep(0)
        for generation in replies:
            generation.on_token(0, None)
        await asyncio.sleep(0.01)
        assert not any(task.done() for task in waiting), "the engine has more to do first"
        before = loop.calls
        bell.ring()
        assert loop.calls == before + 1
        assert [chunk.text for chunk in await asyncio.gather(*waiting) if chunk] == ["Hello"] * 8
        bell.ring()
        assert loop.calls == before + 1, "nobody is waiting"
        last = asyncio.ensure_future(replies[0].next_chunk())
        await asyncio.sleep(0)
        replies[0].on_finish("stop")
        chunk = await asyncio.wait_for(last, 1)
        assert getattr(chunk, "finish_reason", None) == "stop", "an end is told at once"

    try:
        loop.run_until_complete(main())
    finally:
        loop.close()


def test_readers_start_no_threads() -> None:
    before = threading.active_count()

    async def main() -> None:
        replies = [reply()[0] for _ in range(50)]
        tasks = [asyncio.create_task(gathered(generation, keep_alive=0.01)) for generation in replies]
        await asyncio.sleep(0.05)
        assert threading.active_count() == before
        for generation in replies:
            generation.on_token(0, None)
            generation.on_finish("stop")
        for chunks in await asyncio.gather(*tasks):
            assert "".join(chunk.text for chunk in chunks) == "Hello"

    run(main())
    assert threading.active_count() == before
