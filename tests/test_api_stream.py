"""Streams byte by byte, errors after the 200, and clients that leave."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.types import Message

from backend.api import replies
from backend.api.shapes import ChatShape, Envelope
from backend.api.sse import DONE, PING, EventStream
from backend.errors import NumericalError, UserError
from backend.generation import Generation
from backend.params import GenerationParams
from tests.api_server import TALK, client, port_of, raw_post, read_events, server_of, serving, wait_for
from tests.fakes import FakeRequest, FakeService


class BrokenService(FakeService):
    """Says two words and then fails, with `error`, or waits for a cancel without a word."""

    def __init__(self, error: Exception | None) -> None:
        super().__init__(delay=0.001)
        self.error = error

    def _speak(self, generation: Generation, request: FakeRequest, count: int, limit: int) -> None:
        generation.on_token(0, None)
        generation.on_token(1, None)
        request.update(phase="done")
        generation.on_finish("error", self.error)


@pytest.fixture(scope="module")
def slow() -> Iterator[tuple[FakeService, int]]:
    service = FakeService(delay=0.02, prefill_delay=0.0)
    service.reply = lambda asked: "word " * 2000
    with serving(service) as port:
        yield service, port


def test_chat_events() -> None:
    with client(FakeService(delay=0.001)) as http:
        response = http.post("/v1/chat/completions", json={**TALK, "stream": True})
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    assert response.headers["x-request-id"]
    events = read_events(response.content)
    assert events[-1] == "[DONE]"
    chunks = events[:-1]
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert all(chunk["object"] == "chat.completion.chunk" and "usage" not in chunk for chunk in chunks)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert all(set(delta) == {"content"} and delta["content"] for delta in deltas[1:-1])
    assert deltas[-1] == {}
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]


@pytest.mark.parametrize(("path", "body"), [("/chat/completions", TALK), ("/completions", {"prompt": "a b"})])
def test_usage_chunk(path: str, body: dict[str, Any]) -> None:
    with client(FakeService(delay=0.001)) as http:
        asked = {**body, "stream": True, "stream_options": {"include_usage": True}}
        events = read_events(http.post(path, json=asked).content)
        whole = http.post("/v1" + path, json=body).json()
    assert all(chunk["usage"] is None for chunk in events[:-2])
    assert events[-2]["choices"] == []
    assert events[-2]["usage"] == whole["usage"]
    assert events[-1] == "[DONE]"


@pytest.mark.parametrize(
    ("error", "code"), [(NumericalError("not a number"), "numerical_error"), (None, "internal_error")]
)
def test_an_error_after_the_start(error: UserError | None, code: str) -> None:
    with client(BrokenService(error)) as http:
        events = read_events(http.post("/v1/chat/completions", json={**TALK, "stream": True}).content)
        whole = http.post("/v1/chat/completions", json=TALK)
        several = read_events(http.post("/v1/completions", json={"prompt": ["a", "b"], "stream": True}).content)
    assert events[-2]["error"]["code"] == code
    assert events[-1] == "[DONE]"
    assert several[-2]["error"]["code"] == code
    assert several[-1] == "[DONE]"
    assert whole.status_code == 500
    assert whole.json()["error"]["code"] == code


def test_an_unexpected_error_tells_nothing_of_our_insides() -> None:
    with client(BrokenService(RuntimeError("/secret/path"))) as http:
        for asked in ({**TALK, "stream": True}, TALK):
            assert "secret" not in http.post("/v1/chat/completions", json=asked).text


def test_a_cancelled_reply_has_stopped() -> None:
    service = FakeService(delay=0.05)
    service.reply = lambda asked: "word " * 100
    with serving(service) as port, raw_post(port, "/v1/chat/completions", TALK) as opened:
        wait_for(lambda: service.requests)
        service.requests[0].cancelled.set()
        answer = opened.recv(65536)
        while b"}]" not in answer:
            answer += opened.recv(65536)
    assert b'"finish_reason":"stop"' in answer


def test_pings_in_silence() -> None:
    async def told() -> list[bytes]:
        service = FakeService(delay=0.001, prefill_delay=0.3)
        generation = service.complete("hello", GenerationParams())
        shape = ChatShape(Envelope("id", 0, "m", False))
        return [data async for data in replies.events(shape, [generation], ping_seconds=0.05)]

    events = asyncio.run(told())
    assert 3 <= events.count(PING) <= 6
    assert events[1] == PING
    assert events[-1] == DONE
    assert json.loads(events[0][6:])["choices"][0]["delta"]["role"] == "assistant"


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("path", "body"), [("/v1/chat/completions", TALK), ("/v1/completions", {"prompt": ["a", "b"], "max_tokens": 2000})]
)
def test_a_client_that_leaves_stops_its_requests(
    slow: tuple[FakeService, int], path: str, body: dict[str, Any], stream: bool
) -> None:
    service, port = slow
    before = len(service.requests)
    opened = raw_post(port, path, {**body, "stream": stream})
    expected = 2 if "prompt" in body else 1
    wait_for(lambda: len(service.requests) == before + expected)
    if stream:
        assert opened.recv(100)
    opened.close()
    mine = service.requests[before:]
    assert wait_for(lambda: all(request.cancelled.is_set() for request in mine)) < 1
    wait_for(lambda: service.status().running == 0)


def test_a_client_that_leaves_during_the_prefill_stops_its_request() -> None:
    service = FakeService(prefill_delay=20)
    with serving(service) as port:
        for stream in (True, False):
            opened = raw_post(port, "/v1/chat/completions", {**TALK, "stream": stream})
            wait_for(lambda: service.status().running == 1)
            opened.close()
            assert wait_for(lambda: service.status().running == 0) < 1


def test_a_hundred_clients_leave_at_any_moment() -> None:
    """Nothing goes on for them: no request and, on the event loop, no task."""
    dice = random.Random(5)
    service = FakeService(delay=0.004)
    service.reply = lambda asked: "word " * 400
    body = {**TALK, "prompt": ["a", "b"], "max_tokens": 400}
    with server_of(service) as server:
        for number in range(100):
            path = dice.choice(["/v1/chat/completions", "/v1/completions"])
            opened = raw_post(port_of(server), path, {**body, "stream": number % 3 > 0})
            time.sleep(dice.random() * 0.02)
            opened.close()
        wait_for(lambda: service.status().running == 0 and not server.server_state.tasks, 2)
    assert len(service.requests) > 50


def test_one_refused_prompt_stops_the_others() -> None:
    class Refusing(FakeService):
        def complete(self, prompt: Any, params: GenerationParams, **options: Any) -> Generation:
            if prompt == "bad":
                raise UserError("no")
            return super().complete(prompt, params, **options)

    service = Refusing(delay=5)
    with client(service) as http:
        assert http.post("/v1/completions", json={"prompt": ["good", "bad"]}).status_code == 400
    assert [request.cancelled.is_set() for request in service.requests] == [True]


def test_a_stream_that_never_began_still_stops_its_request() -> None:
    """The client is gone before the first byte: an async generator that never ran has no `finally` to run."""

    async def left() -> bool:
        service = FakeService(delay=5)
        generation = service.complete("hello", GenerationParams())
        shape = ChatShape(Envelope("id", 0, "m", False))
        stream = EventStream(replies.events(shape, [generation]), lambda: replies.stop_all([generation]))

        async def receive() -> Message:
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            await asyncio.sleep(60)

        await asyncio.wait_for(stream({"type": "http"}, receive, send), 2)
        return service.requests[0].cancelled.is_set()

    assert asyncio.run(left())
