"""Whatever is sent: never a 5xx, never FastAPI's own words, always the one error shape."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from backend.events import Status
from backend.knobs import Knob
from backend.params import KNOBS
from backend.text.messages import Message
from tests.api_server import TALK, assert_error, client
from tests.fakes import FakeService

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
EXTREMES: list[Any] = [2**63, 2**64 + 1, 10**400, -1, 1e308, "", "1", [], [1], {}, True, False]
NUMBERS = [knob for knob in KNOBS if knob.kind in ("int", "float", "seed")]


@pytest.fixture(scope="module")
def service() -> FakeService:
    service = FakeService(delay=0)
    service.reply = lambda asked: "ok"
    return service


@pytest.fixture(scope="module")
def http(service: FakeService) -> Iterator[TestClient]:
    with client(service) as opened:
        yield opened


def user(content: Any, role: Any = "user", **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content, **more}]}


BAD_CHATS: list[tuple[dict[str, Any], str, str | None]] = [
    ({}, "invalid_value", "messages"),
    ({"messages": []}, "invalid_value", "messages"),
    ({**TALK, "n": 0}, "invalid_value", "n"),
    ({**TALK, "n": 65}, "invalid_value", "n"),
    ({**TALK, "n": True}, "invalid_value", "n"),
    ({**TALK, "logprobs": 1}, "invalid_value", "logprobs"),
    ({**TALK, "top_logprobs": 5}, "invalid_value", "top_logprobs"),
    ({**TALK, "logprobs": True, "top_logprobs": 21}, "invalid_value", "top_logprobs"),
    ({**TALK, "logit_bias": {"x": 1}}, "invalid_value", "logit_bias"),
    ({**TALK, "logit_bias": {"5": 101}}, "invalid_value", "logit_bias"),
    ({**TALK, "frequency_penalty": False}, "invalid_value", "frequency_penalty"),
    ({**TALK, "response_format": {"type": "xml"}}, "invalid_value", "response_format.type"),
    ({**TALK, "response_format": {"type": "json_schema"}}, "invalid_value", "response_format.json_schema"),
    ({**TALK, "samplers": ["temprature"]}, "invalid_value", "sampler_order"),
    ({**TALK, "ignore_eos": 1}, "invalid_value", "ignore_eos"),
    ({**TALK, "stop_token_ids": [-1]}, "invalid_value", "stop_token_ids"),
    ({**TALK, "mirostat_mode": 3}, "invalid_value", "mirostat"),
    ({"messages": None}, "invalid_value", "messages"),
    ({"messages": "hi"}, "invalid_value", "messages"),
    ({"messages": ["hi"]}, "invalid_value", "messages[0]"),
    ({"messages": [{}]}, "invalid_value", "messages[0].role"),
    (user("x", role="root"), "invalid_value", "messages[0].role"),
    (user("x", role=["user"]), "invalid_value", "messages[0].role"),
    (user("x", role="tool"), "unsupported_parameter", "messages[0].role"),
    (user(None), "invalid_value", "messages[0].content"),
    (user(5), "invalid_value", "messages[0].content"),
    (user([]), "invalid_value", "messages[0].content"),
    (user(["x"]), "invalid_value", "messages[0].content[0]"),
    (user([{"type": "text"}]), "invalid_value", "messages[0].content[0].text"),
    (
        user([{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": "http://evil.test/x.png"}}]),
        "unsupported_parameter",
        "messages[0].content[1].type",
    ),
    (user("x", role="assistant", tool_calls=[{"id": "1"}]), "unsupported_parameter", "messages[0].tool_calls"),
    ({**TALK, "stream": 1}, "invalid_value", "stream"),
    ({**TALK, "stream": "yes"}, "invalid_value", "stream"),
    ({**TALK, "stream_options": {"include_usage": True}}, "invalid_value", "stream_options"),
    ({**TALK, "stream": True, "stream_options": []}, "invalid_value", "stream_options"),
    (
        {**TALK, "stream": True, "stream_options": {"include_usage": 1}},
        "invalid_value",
        "stream_options.include_usage",
    ),
    ({**TALK, "model": "gpt-4o"}, "model_not_found", "model"),
    ({**TALK, "model": ""}, "model_not_found", "model"),
    ({**TALK, "model": 5}, "invalid_value", "model"),
    ({**TALK, "preset": "starter-f32"}, "model_not_found", "model"),
    ({**TALK, "stop": [1]}, "invalid_value", "stop"),
    ({**TALK, "stop": {"a": "b"}}, "invalid_value", "stop"),
    ({**TALK, "stop": ["x"] * 17}, "invalid_value", "stop"),
    ({**TALK, "stop": "x" * 1001}, "invalid_value", "stop"),
    ({**TALK, "max_tokens": 0}, "invalid_value", "max_tokens"),
    ({**TALK, "max_completion_tokens": 0}, "invalid_value", "max_completion_tokens"),
    ({**TALK, "temperature": 5.01}, "invalid_value", "temperature"),
    ({**TALK, "top_p": 1.5}, "invalid_value", "top_p"),
    ({**TALK, "top_k": 1.5}, "invalid_value", "top_k"),
]
UNSUPPORTED: list[tuple[str, str, Any]] = [
    (CHAT, "tools", [{"type": "function", "function": {"name": "f"}}]),
    (CHAT, "tool_choice", "required"),
    (CHAT, "functions", [{"name": "f"}]),
    (CHAT, "truncate_prompt_tokens", 100),
    (CHAT, "audio", {"voice": "x"}),
    (CHAT, "modalities", ["text", "audio"]),
    (CHAT, "store", True),
    (CHAT, "chat_template", "{{ 1 }}"),
    (TEXT, "use_beam_search", True),
    (TEXT, "suffix", "end"),
]
NEUTRAL = {
    "n": 1, "tools": [], "tool_choice": None, "response_format": {"type": "text"}, "logprobs": False,
    "top_logprobs": 0, "logit_bias": {}, "presence_penalty": 0, "frequency_penalty": 0.0, "audio": None,
    "modalities": ["text"], "user": "someone", "metadata": {"a": "b"}, "store": False, "stop": None, "seed": None,
    "temperature": None, "max_tokens": None, "max_completion_tokens": None, "stream": None, "stream_options": None,
    "model": None, "unheard_of": [1, {"x": None}], "top_k": None, "min_p": 0,
}  # fmt: skip


def body_of(path: str) -> dict[str, Any]:
    return TALK if path == CHAT else {"prompt": "x"}


@pytest.mark.parametrize(("body", "code", "param"), BAD_CHATS)
def test_bad_chat(http: TestClient, body: dict[str, Any], code: str, param: str | None) -> None:
    error = assert_error(http.post(CHAT, json=body), 404 if code == "model_not_found" else 400, code)
    assert error["param"] == param


@pytest.mark.parametrize(("path", "name", "value"), UNSUPPORTED)
def test_what_we_cannot_honour_is_refused_by_name(http: TestClient, path: str, name: str, value: Any) -> None:
    error = assert_error(http.post(path, json={**body_of(path), name: value}), 400, "unsupported_parameter")
    assert error["param"] == name
    assert name in error["message"]


def test_neutral_values_pass(http: TestClient, service: FakeService) -> None:
    assert http.post(CHAT, json={**TALK, **NEUTRAL}).status_code == 200
    neutral = {name: value for name, value in NEUTRAL.items() if name != "logprobs"}
    assert http.post(TEXT, json={"prompt": "x", **neutral, "logprobs": None, "best_of": 1}).status_code == 200
    assert service.params[-1].temperature == service.default_params().temperature
    assert service.params[-1].max_tokens == 16


@pytest.mark.parametrize("knob", NUMBERS, ids=lambda knob: knob.name)
def test_extreme_numbers(http: TestClient, knob: Knob) -> None:
    for value in EXTREMES:
        fits = type(value) in (int, float) and knob.low <= value <= knob.high
        if fits or (knob.name == "top_n_sigma" and value == -1):  # llama.cpp's way to switch it off
            continue
        assert_error(http.post(CHAT, json={**TALK, knob.name: value}), 400, "invalid_value")
    for literal in ("NaN", "Infinity", "-Infinity", "1e999"):
        content = f'{{"messages": [{{"role": "user", "content": "x"}}], "{knob.name}": {literal}}}'
        response = http.post(CHAT, content=content, headers={"content-type": "application/json"})
        assert_error(response, 400)


@pytest.mark.parametrize(
    "prompt",
    [None, [], [[]], 5, True, {}, [None], [True], [1, "a"], ["a", 1], [-1], [2**63], [1.5], [[1], [True]], ["a"] * 65],
)
def test_bad_prompts(http: TestClient, prompt: Any) -> None:
    assert_error(http.post(TEXT, json={"prompt": prompt}), 400, "invalid_value")
    assert_error(http.post(TEXT, json={}), 400, "invalid_value")


@pytest.mark.parametrize(
    "raw",
    [
        b"", b"{", b"nonsense", b"[]", b"5", b'"x"', b"null", b"\xff\xfe{}", b'{"a": NaN}', b"{'a': 1}",
        b'{"messages": ' + b"[" * 70 + b"]" * 70 + b"}",
        b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        b'{"seed": ' + b"9" * 5000 + b"}",
    ],
)  # fmt: skip
def test_bodies_that_are_no_json_object(http: TestClient, raw: bytes) -> None:
    for path in (CHAT, TEXT, "/v1/presets/load"):
        assert_error(http.post(path, content=raw, headers={"content-type": "application/json"}), 400, "invalid_json")


def test_half_an_emoji_is_no_reason_to_fail(http: TestClient, service: FakeService) -> None:
    raw = b'{"messages": [{"role": "user", "content": "a\\ud83d b\\ud83d\\ude00"}]}'
    assert http.post(CHAT, content=raw, headers={"content-type": "application/json"}).status_code == 200
    assert service.asked[-1] == (Message("user", "a\ufffd b😀"),)


def test_long_values_are_not_sent_back(http: TestClient) -> None:
    response = http.post(CHAT, json={**TALK, "temperature": ["x" * 100_000]})
    assert_error(response, 400)
    assert len(response.content) < 2000


@pytest.mark.parametrize("method", ["PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"])
@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/starter", "/models", "/health", "/version", CHAT])
def test_wrong_methods(http: TestClient, method: str, path: str) -> None:
    response = http.request(method, path)
    assert_error(response, 405, "method_not_allowed")
    assert "GET" in response.headers["allow"] or "POST" in response.headers["allow"]


def test_get_and_post_swapped(http: TestClient) -> None:
    for path in (CHAT, "/chat/completions", TEXT, "/completions", "/v1/presets/load"):
        assert assert_error(http.get(path), 405)
    for path in ("/v1/models", "/health", "/v1/presets", "/openapi.json"):
        assert assert_error(http.post(path, json={}), 405)


@pytest.mark.parametrize("path", ["/v1", "/v1/", "/v1/nothing", "/v1/models2", "/v1/chat", "/v1//models", "/v1/a/b/c"])
def test_unknown_paths_under_v1(http: TestClient, path: str) -> None:
    for method in ("GET", "DELETE"):
        assert_error(http.request(method, path), 404, "not_found")
    assert_error(http.post(path, json={}), 404, "not_found")


def test_all_other_paths_are_the_pages(http: TestClient) -> None:
    for path in ("/", "/config", "/chat", "/v2/x", "/docs", "/gradio_api/info"):
        assert http.get(path).json()["page"] == path
    assert http.get("/missing").text == "page 404"


def test_no_documentation_page_from_elsewhere(http: TestClient) -> None:
    schema = http.get("/openapi.json").json()
    chat = schema["paths"][CHAT]["post"]["requestBody"]["content"]["application/json"]["schema"]["properties"]
    assert {knob.name for knob in KNOBS} | {"messages", "model", "stream"} <= set(chat)


def test_health_and_readiness() -> None:
    service = FakeService()
    with client(service) as http:
        assert http.get("/health").json() == {"status": "ok"}
        assert http.head("/health").status_code == 200
        for state in ("empty", "loading", "failed", "stopped"):
            service.set_status(Status(state=state))
            response = http.get("/health")
            assert_error(response, 503, "not_ready")
            assert int(response.headers["retry-after"]) > 0
            assert_error(http.post(CHAT, json={**TALK, "model": "any"}), 503, "not_ready")
            assert http.get("/v1/models").json() == {"object": "list", "data": []}


def test_presets() -> None:
    service = FakeService()
    service.load_seconds = 0.05
    with client(service) as http:
        rows = http.get("/v1/presets").json()["data"]
        assert [row["name"] for row in rows if row["loaded"]] == ["starter"]
        assert_error(http.post("/v1/presets/load", json={"preset": "nope"}), 400, "invalid_preset")
        for bad in ({}, {"preset": None}, {"preset": ""}, {"preset": 5}, {"preset": ["starter"]}):
            assert_error(http.post("/v1/presets/load", json=bad), 400, "invalid_value")
        loaded = http.post("/v1/presets/load", json={"preset": "starter-f32"}).json()
        assert (loaded["preset"], loaded["status"]) == ("starter-f32", "ready")
        assert http.post(CHAT, json={**TALK, "model": "starter-f32"}).status_code == 200
        assert_error(http.post(CHAT, json={**TALK, "model": "starter"}), 404, "model_not_found")
        assert http.get("/version").json()["version"]


def test_a_defect_of_ours_has_the_shape_too() -> None:
    class Defect(FakeService):
        def chat(self, messages: Any, params: Any) -> Any:
            raise RuntimeError("/secret/path")

        def status(self) -> Status:
            if self.asked:
                raise RuntimeError("/secret/path")
            return super().status()

    with client(Defect()) as http:
        for stream in (True, False):
            response = http.post(CHAT, json={**TALK, "stream": stream})
            assert_error(response, 500, "internal_error")
            assert "secret" not in response.text


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
FIELDS = st.sampled_from([*(knob.name for knob in KNOBS), *NEUTRAL, "prompt", "messages", "echo", "stop", "best_of"])
GOOD = st.sampled_from([{}, TALK, {"prompt": "x"}, {"prompt": [1, 2]}])
BODIES = st.builds(lambda good, more: {**good, **more}, GOOD, st.dictionaries(FIELDS, JSON, max_size=3))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=BODIES | JSON, path=st.sampled_from([CHAT, TEXT, "/v1/presets/load"]))
def test_no_body_makes_a_server_error(http: TestClient, body: Any, path: str) -> None:
    raw = json.dumps(body).encode()
    response = http.post(path, content=raw, headers={"content-type": "application/json"})
    assert response.status_code < 500
    if response.status_code != 200:
        assert_error(response)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(raw=st.binary(max_size=200))
def test_no_bytes_make_a_server_error(http: TestClient, raw: bytes) -> None:
    assert_error(http.post(CHAT, content=raw, headers={"content-type": "application/json"}), 400)
