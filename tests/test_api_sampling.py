"""Sampling over HTTP: other servers' names for our parameters, several choices, log probabilities, echo."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from backend.api.dialects import known, translated
from backend.errors import ParameterError
from backend.params import KNOBS, GenerationParams
from tests.api_server import TALK, client, read_events
from tests.fakes import FakeService

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def service() -> FakeService:
    service = FakeService(delay=0)
    service.reply = lambda asked: "one two \u00e4 four"
    return service


@pytest.fixture(scope="module")
def http(service: FakeService) -> Iterator[TestClient]:
    with client(service) as opened:
        yield opened


SAME: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"repeat_penalty": 1.2, "repeat_last_n": -1}, {"repetition_penalty": 1.2}),
    ({"repeat_penalty": 1.2, "repeat_last_n": 64}, {"repetition_penalty": 1.2, "repetition_range": 64}),
    ({"repeat_penalty": 1.2, "penalty_last_n": 0}, {"repetition_penalty": 1.0}),
    ({"typ_p": 0.5}, {"typical_p": 0.5}),
    ({"typical": 0}, {"typical_p": 1.0}),
    ({"typical_p": 0}, {"typical_p": 1.0}),
    ({"tfs_z": 0.9}, {"tfs": 0.9}),
    ({"top_n_sigma": -1}, {}),
    ({"mirostat_mode": 2, "mirostat_tau": 3}, {"mirostat": 2, "mirostat_tau": 3}),
    ({"no_repeat_ngram_size": 3}, {"no_repeat_ngram": 3}),
    ({"dry_multiplier": 0.8, "dry_sequence_breakers": ["x"]}, {"dry_multiplier": 0.8, "dry_breakers": ["x"]}),
    ({"dry_sequence_breakers": '"\\n", "a"'}, {"dry_breakers": ["\n", "a"]}),
    ({"dry_multiplier": 0.8, "dry_penalty_last_n": -1}, {"dry_multiplier": 0.8}),
    ({"temperature": 1.0, "dynatemp_range": 0.4}, {"temperature": 1.0, "dynatemp_low": 0.6, "dynatemp_high": 1.4}),
    ({"dynamic_temperature": False, "dynatemp_low": 0.5, "dynatemp_high": 2}, {}),
    ({"dynamic_temperature": True, "dynatemp_low": 0.5, "dynatemp_high": 2}, {"dynatemp_low": 0.5, "dynatemp_high": 2}),
    ({"samplers": ["top_k", "typ_p", "temperature"], "top_k": 7, "min_p": 0.2},
     {"sampler_order": ["top_k", "typical_p", "temperature"], "top_k": 7, "min_p": 0, "top_p": 1}),
    ({"sampler_priority": "temperature\ntop_p"}, {"sampler_order": ["temperature", "top_p"]}),
    ({"ban_eos_token": True}, {"ignore_eos": True}),
    ({"bad_words": ["x"]}, {"banned_strings": ["x"]}),
    ({"logit_bias": {"5": -100}}, {"logit_bias": {5: -100}}),
    ({"logit_bias": [[5, False], [6, 1.5]]}, {"logit_bias": {5: -100, 6: 1.5}}),
    ({"response_format": {"type": "text"}}, {}),
    ({"response_format": {"type": "json_object"}}, {"json_schema": '{"type": "object"}'}),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "array"}}}},
     {"json_schema": '{"type": "array"}'}),
    ({"json_schema": {"type": "array"}}, {"json_schema": '{"type": "array"}'}),
    ({"guided_json": {"type": "array"}}, {"json_schema": '{"type": "array"}'}),
    ({"guided_regex": "a+"}, {"regex": "a+"}),
    ({"grammar_string": 'root ::= "a"'}, {"grammar": 'root ::= "a"'}),
    ({"guided_choice": ["a.b", "c"]}, {"regex": r"a\.b|c"}),
    ({"structured_outputs": {"regex": "a+", "json": None}}, {"regex": "a+"}),
    ({"typ_p": 0.5, "typical_p": 0.7}, {"typical_p": 0.7}),
    ({"repeat_penalty": None, "samplers": None, "response_format": None}, {}),
]  # fmt: skip


@pytest.mark.parametrize(("sent", "means"), SAME, ids=[json.dumps(sent)[:50] for sent, _ in SAME])
def test_other_names(http: TestClient, service: FakeService, sent: dict[str, Any], means: dict[str, Any]) -> None:
    response = http.post(CHAT, json={**TALK, **sent})
    assert response.status_code == 200, response.text
    assert service.params[-1] == GenerationParams.from_mapping({"max_tokens": 0, **means})


def test_every_other_name_gives_a_knob() -> None:
    names = {knob.name for knob in KNOBS}
    for field in known():
        for value in (1, 0.5, True, ["x"], {"json": {}}, "x", {"type": "json_object"}, 0):
            try:
                assert set(translated({field: value})) <= names
            except ParameterError as error:
                assert error.param is not None


def test_a_choice_is_matched_as_it_is_written() -> None:
    texts = ["a.b*c", "(x)|[y]", "1 + 1 = 2?", "\\d {}^$-~&#/"]
    pattern = translated({"guided_choice": texts})["regex"]
    assert all(re.fullmatch(pattern, text) for text in texts)
    assert not re.fullmatch(pattern, "aXb*c")


# several choices --------------------------------------------------------------------------------------------------


def test_several_choices(http: TestClient, service: FakeService) -> None:
    body = http.post(CHAT, json={**TALK, "n": 3, "seed": 7}).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert {choice["message"]["content"] for choice in body["choices"]} == {"one two \u00e4 four"}
    assert [params.seed for params in service.params[-3:]] == [7, 8, 9]
    assert body["usage"]["prompt_tokens"] == service.requests[-1].stats().prompt_tokens, "the prompt counts once"
    assert body["usage"]["completion_tokens"] == 12
    body = http.post(TEXT, json={"prompt": ["a", "b c"], "n": 2, "seed": 2**63 - 1}).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert [params.seed for params in service.params[-4:]] == [2**63 - 1, 0] * 2
    assert service.asked[-4:] == ["a", "a", "b c", "b c"]
    assert body["usage"]["prompt_tokens"] == 3
    assert http.post(TEXT, json={"prompt": ["a"] * 33, "n": 2}).status_code == 400


def test_several_choices_streamed(http: TestClient) -> None:
    events = read_events(http.post(CHAT, json={**TALK, "n": 2, "stream": True}).content)[:-1]
    texts = {0: "", 1: ""}
    for event in events:
        for choice in event["choices"]:
            texts[choice["index"]] += choice["delta"].get("content", "")
    assert texts == dict.fromkeys((0, 1), "one two \u00e4 four")


# log probabilities ------------------------------------------------------------------------------------------------


def test_chat_log_probabilities(http: TestClient) -> None:
    body = http.post(CHAT, json={**TALK, "logprobs": True, "top_logprobs": 2}).json()
    content = body["choices"][0]["logprobs"]["content"]
    assert bytes(byte for token in content for byte in token["bytes"]).decode() == "one two \u00e4 four"
    assert [token["token"] for token in content] == ["one", " two", " \u00e4", " four"]
    assert [token["logprob"] for token in content] == [0.0, -0.5, -1.0, -1.5]
    assert [(top["token"], top["logprob"]) for top in content[2]["top_logprobs"]] == [(" \u00e4", -1.0), (" two", -2.0)]
    assert body["choices"][0]["logprobs"]["refusal"] is None
    assert http.post(CHAT, json=TALK).json()["choices"][0]["logprobs"] is None
    plain = http.post(CHAT, json={**TALK, "logprobs": True}).json()["choices"][0]["logprobs"]["content"]
    assert [token["top_logprobs"] for token in plain] == [[]] * 4


def test_streamed_log_probabilities_are_the_same(http: TestClient) -> None:
    asked = {**TALK, "logprobs": True, "top_logprobs": 2}
    whole = http.post(CHAT, json=asked).json()["choices"][0]["logprobs"]["content"]
    events = read_events(http.post(CHAT, json={**asked, "stream": True}).content)[:-1]
    pieces = [event["choices"][0]["logprobs"] for event in events]
    assert [token for piece in pieces if piece for token in piece["content"]] == whole


def test_completion_log_probabilities(http: TestClient) -> None:
    logprobs = http.post(TEXT, json={"prompt": "x", "logprobs": 1}).json()["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["one", " two", " \u00e4", " four"]
    assert logprobs["token_logprobs"] == [0.0, -0.5, -1.0, -1.5]
    assert logprobs["text_offset"] == [0, 3, 7, 9]
    assert logprobs["top_logprobs"][1] == {" two": -1.0}
    nothing = http.post(TEXT, json={"prompt": "x", "logprobs": 0}).json()["choices"][0]["logprobs"]
    assert nothing["top_logprobs"][1] == {" two": -0.5}
    for value in (None, False):
        assert http.post(TEXT, json={"prompt": "x", "logprobs": value}).json()["choices"][0]["logprobs"] is None


# echo -------------------------------------------------------------------------------------------------------------


def test_echo(http: TestClient) -> None:
    body = http.post(TEXT, json={"prompt": ["say: ", "and: "], "echo": True, "n": 2}).json()
    assert [choice["text"] for choice in body["choices"]] == [
        prompt + "one two \u00e4 four" for prompt in ("say: ", "say: ", "and: ", "and: ")
    ]
    events = read_events(http.post(TEXT, json={"prompt": "say: ", "echo": True, "stream": True}).content)[:-1]
    assert "".join(event["choices"][0]["text"] for event in events) == "say: one two \u00e4 four"
