"""The official client against a real server: both endpoints, streaming and not."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from backend.errors import BusyError, ContextLengthError
from backend.settings import Settings
from backend.text.messages import Message
from tests.api_server import serving
from tests.fakes import FakeService

KEY = "sk-test"
ANSWER = "Grüße aus\u2028dem Süden 🌞 👩‍👩‍👧 done"


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[FakeService, int]]:
    service = FakeService(delay=0.001)
    service.reply = lambda asked: ANSWER
    with serving(service, Settings(api_keys=("other", KEY))) as port:
        yield service, port


@pytest.fixture
def service(server: tuple[FakeService, int]) -> FakeService:
    return server[0]


@pytest.fixture
def client(server: tuple[FakeService, int]) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"http://127.0.0.1:{server[1]}/v1", api_key=KEY, max_retries=0) as opened:
        yield opened


def test_chat(client: openai.OpenAI, service: FakeService) -> None:
    reply = client.chat.completions.create(
        model="starter",
        messages=[
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
        ],
        temperature=0.25,
        stop="never",
        extra_body={"top_k": 7, "some_future_field": {"a": [1]}},
    )
    assert reply.object == "chat.completion"
    assert reply.id.startswith("chatcmpl-")
    assert reply.model == "SmolLM2-135M-Instruct"
    assert reply.choices[0].message.content == ANSWER
    assert reply.choices[0].message.role == "assistant"
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage is not None
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + len(ANSWER.split(" "))
    assert reply.usage.prompt_tokens_details is not None
    assert reply.usage.prompt_tokens_details.cached_tokens == 0
    assert reply._request_id is not None
    assert service.asked[-1] == (Message("system", "be brief"), Message("user", "one\ntwo"))
    params = service.params[-1]
    assert (params.temperature, params.top_k, params.stop, params.max_tokens) == (0.25, 7, ("never",), 0)
    assert params.top_p == service.default_params().top_p


def test_chat_stream_equals_the_whole(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="SmolLM2-135M-Instruct",
        messages=[{"role": "user", "content": "hello"}],
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == ANSWER
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage is not None
    assert not chunks[-1].choices
    assert chunks[-2].choices[0].finish_reason == "stop"


def test_chat_length(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model="starter", messages=[{"role": "user", "content": "x"}], max_completion_tokens=2, max_tokens=50
    )
    assert reply.choices[0].finish_reason == "length"
    assert reply.choices[0].message.content == " ".join(ANSWER.split(" ")[:2])


def test_completion(client: openai.OpenAI, service: FakeService) -> None:
    reply = client.completions.create(model="starter", prompt="say it", seed=3)
    assert reply.object == "text_completion"
    assert reply.id.startswith("cmpl-")
    assert reply.choices[0].text == ANSWER
    assert service.params[-1].max_tokens == 16
    assert service.params[-1].seed == 3
    client.completions.create(model="starter", prompt=[5, 6, 7])
    assert service.asked[-1] == (5, 6, 7)


def test_completion_stream_of_several_prompts(client: openai.OpenAI, service: FakeService) -> None:
    texts = {0: "", 1: "", 2: ""}
    reasons = {}
    stream = client.completions.create(model="starter", prompt=["a", "b", "c"], stream=True)
    for chunk in stream:
        choice = chunk.choices[0]
        texts[choice.index] += choice.text
        if choice.finish_reason:
            reasons[choice.index] = choice.finish_reason
    assert texts == dict.fromkeys(range(3), ANSWER)
    assert reasons == dict.fromkeys(range(3), "stop")
    whole = client.completions.create(model="starter", prompt=[[1, 2], [3]])
    assert [choice.index for choice in whole.choices] == [0, 1]
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 2 * len(ANSWER.split(" "))


def test_models(client: openai.OpenAI) -> None:
    models = client.models.list().data
    assert [model.id for model in models] == ["SmolLM2-135M-Instruct"]
    assert client.models.retrieve("starter").id == "starter"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-4o")
    assert caught.value.code == "model_not_found"


def test_errors_become_the_clients_exceptions(client: openai.OpenAI, service: FakeService) -> None:
    messages: list[openai.types.chat.ChatCompletionMessageParam] = [{"role": "user", "content": "x"}]
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="gpt-4o", messages=messages)
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    service.fail_next = ContextLengthError("too long", param="messages", n_prompt_tokens=3000, n_ctx=2048)
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(model="starter", messages=messages, stream=True)
    assert long.value.code == "context_length_exceeded"
    assert isinstance(long.value.body, dict)
    assert long.value.body["n_ctx"] == 2048
    service.fail_next = BusyError("too many requests are waiting")
    with pytest.raises(openai.InternalServerError) as busy:
        client.completions.create(model="starter", prompt="x")
    assert busy.value.status_code == 503
    assert busy.value.response.headers["retry-after"]
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()
