"""Over HTTP on a tiny model: prompts that are scored and said again, the best of several, chats that are cut."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient

from backend.service import Service
from backend.settings import Settings
from tests.api_server import client, read_events
from tests.oracle import reference_model
from tests.tiny import TinyModel, write_tiny

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("scored")
    path = write_tiny(folder / "tiny.gguf", TinyModel(scale=0.3))
    (folder / "tiny.yaml").write_text(f"model: {path}\nweights: f32\ncontext: 256\n")
    running = Service(Settings(presets_dir=folder, models_dir=folder, data_dir=folder / "data"))
    running.load("tiny")
    yield running
    running.close()


@pytest.fixture(scope="module")
def http(service: Service) -> Iterator[TestClient]:
    with client(service) as opened:  # type: ignore[arg-type]
        yield opened


@pytest.fixture(scope="module")
def logs(service: Service) -> Any:
    """Ids -> log probabilities (tokens, vocab), by transformers."""
    model = reference_model(service.runtime().checkpoint.path)

    def of(ids: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            return torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), 1)

    return of


def choice(http: TestClient, **body: Any) -> dict[str, Any]:
    answer = http.post(TEXT, json={"temperature": 0, **body})
    assert answer.status_code == 200, answer.text
    return dict(answer.json()["choices"][0])


def near(values: list[float]) -> Any:
    """Other pieces of a prompt are summed in another order."""
    return pytest.approx(values, abs=1e-4)


PROMPT = "hello world, in the hello"


def test_a_prompt_is_scored_and_said_again(http: TestClient, service: Service, logs: Any) -> None:
    ids = service.runtime().prompting.encode_text(PROMPT)
    expected = logs(ids)
    for prompt in (PROMPT, ids):
        found = choice(http, prompt=prompt, echo=True, max_tokens=0, logprobs=2)
        assert found["text"] == PROMPT
        assert found["finish_reason"] == "length"
        scored = found["logprobs"]
        assert scored["token_logprobs"][0] is None
        assert scored["top_logprobs"][0] is None
        assert scored["token_logprobs"][1:] == pytest.approx(
            [float(expected[n, token]) for n, token in enumerate(ids[1:])], abs=1e-4
        )
        assert len(scored["tokens"]) == len(scored["text_offset"]) == len(scored["top_logprobs"]) == len(ids)
        assert "".join(scored["tokens"]) == PROMPT
        for token, offset in zip(scored["tokens"], scored["text_offset"], strict=True):
            assert PROMPT[offset : offset + len(token)] == token
        # two tokens of half a character have the same text, so only the best value is sure to be there
        assert max(scored["top_logprobs"][1].values()) == pytest.approx(float(expected[0].max()), abs=1e-4)


def test_prompt_and_reply_count_one_by_one(http: TestClient, service: Service) -> None:
    """As evaluations do it: they send ids, and take the scores of the last ones of them."""
    ids = service.runtime().prompting.encode_text(PROMPT)
    for tokens in (1, 5):
        found = choice(http, prompt=ids, echo=True, max_tokens=tokens, logprobs=1, ignore_eos=True)
        assert len(found["logprobs"]["tokens"]) == len(ids) + tokens
        plain = choice(http, prompt=ids, max_tokens=tokens, logprobs=1, ignore_eos=True)
        assert found["logprobs"]["token_logprobs"][len(ids) :] == near(plain["logprobs"]["token_logprobs"])
        assert found["text"] == PROMPT + plain["text"]


def test_streamed_it_is_the_same(http: TestClient) -> None:
    asked = {"prompt": [PROMPT, "the"], "echo": True, "max_tokens": 6, "logprobs": 1, "temperature": 0}
    whole = http.post(TEXT, json=asked).json()["choices"]
    events = read_events(http.post(TEXT, json={**asked, "stream": True}).content)[:-1]
    for index, expected in enumerate(whole):
        mine = [event["choices"][0] for event in events if event["choices"][0]["index"] == index]
        assert "".join(piece["text"] for piece in mine) == expected["text"]
        assert mine[0]["text"] == asked["prompt"][index]
        pieces = [piece["logprobs"] for piece in mine if piece["logprobs"]]
        for key in ("tokens", "text_offset"):
            assert [value for piece in pieces for value in piece[key]] == expected["logprobs"][key]
        values = [value for piece in pieces for value in piece["token_logprobs"]]
        assert values[0] is expected["logprobs"]["token_logprobs"][0] is None
        assert values[1:] == near(expected["logprobs"]["token_logprobs"][1:])


def test_echo_without_scores(http: TestClient, service: Service) -> None:
    ids = service.runtime().prompting.encode_text(PROMPT)
    reply = choice(http, prompt=PROMPT, max_tokens=4)["text"]
    assert choice(http, prompt=ids, echo=True, max_tokens=4)["text"] == PROMPT + reply
    nothing = http.post(TEXT, json={"prompt": PROMPT, "echo": True, "max_tokens": 0}).json()
    assert nothing["choices"][0]["text"] == PROMPT
    assert nothing["choices"][0]["logprobs"] is None
    assert nothing["usage"]["completion_tokens"] == 0
    assert nothing["usage"]["prompt_tokens"] == len(ids)


def test_prompt_logprobs(http: TestClient, service: Service, logs: Any) -> None:
    """vLLM's: a list of its own, by token id, with ranks."""
    ids = service.runtime().prompting.encode_text(PROMPT)
    expected = logs(ids)
    found = choice(http, prompt=PROMPT, max_tokens=3, prompt_logprobs=2)
    assert found["logprobs"] is None
    scores = found["prompt_logprobs"]
    assert scores[0] is None
    assert len(scores) == len(ids)
    for place, token in enumerate(ids[1:]):
        own = scores[place + 1][str(token)]
        order = expected[place].argsort(descending=True).tolist()
        assert own["logprob"] == pytest.approx(float(expected[place, token]), abs=1e-4)
        assert own["rank"] == order.index(token) + 1
        assert set(scores[place + 1]) == {str(each) for each in (*order[:2], token)}
    chat = http.post(
        CHAT, json={"messages": [{"role": "user", "content": "hello"}], "prompt_logprobs": 0, "max_tokens": 2}
    )
    assert len(chat.json()["prompt_logprobs"]) == chat.json()["usage"]["prompt_tokens"]


def test_the_best_of_several(http: TestClient) -> None:
    """The n with the highest mean log probability, best first; all are counted."""
    asked = {"prompt": [PROMPT, "the"], "max_tokens": 6, "seed": 5, "temperature": 2.0, "top_k": 0, "ignore_eos": True}
    tries = http.post(TEXT, json={**asked, "n": 6, "logprobs": 0}).json()["choices"]
    body = http.post(TEXT, json={**asked, "n": 2, "best_of": 6}).json()
    assert [each["index"] for each in body["choices"]] == [0, 1, 2, 3]
    assert body["usage"]["completion_tokens"] == 2 * 6 * 6
    for place in (0, 1):
        group = tries[6 * place : 6 * place + 6]
        group.sort(key=lambda each: -sum(each["logprobs"]["token_logprobs"]))
        assert [c["text"] for c in body["choices"][2 * place : 2 * place + 2]] == [c["text"] for c in group[:2]]


def test_choices_share_the_prompt(http: TestClient, service: Service) -> None:
    """All choices of one question read it once."""
    prompt = "there was a time in the world when " * 4
    ids = service.runtime().prompting.encode_text(prompt)
    before = service.runtime().runner.tokens_evaluated
    body = http.post(TEXT, json={"prompt": prompt, "n": 4, "max_tokens": 1, "seed": 1}).json()
    assert service.runtime().runner.tokens_evaluated - before < len(ids) + 4 * 40
    assert body["usage"]["prompt_tokens"] == len(ids)


REFUSED = [
    (TEXT, {"prompt": "x", "max_tokens": 0}, "max_tokens"),
    (TEXT, {"prompt": "x", "best_of": 2, "stream": True}, "best_of"),
    (TEXT, {"prompt": "x", "best_of": 2, "n": 3}, "best_of"),
    (TEXT, {"prompt": ["x"] * 8, "best_of": 9}, "n"),
    (TEXT, {"prompt": "x", "prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    (TEXT, {"prompt": "x", "prompt_logprobs": 21}, "prompt_logprobs"),
    (CHAT, {"messages": [{"role": "user", "content": "x"}], "truncation": "middle"}, "truncation"),
    (
        CHAT,
        {"messages": [{"role": "user", "content": "x"}], "guidance_scale": 2, "context_shift": True},
        "context_shift",
    ),
]


@pytest.mark.parametrize(("path", "body", "param"), REFUSED)
def test_what_does_not_go_together(http: TestClient, path: str, body: dict[str, Any], param: str) -> None:
    answer = http.post(path, json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


# chats that have outgrown the context --------------------------------------------------------------------------------


def long_chat(turns: int) -> list[dict[str, str]]:
    chat = [{"role": "system", "content": "be brief"}]
    for turn in range(turns):
        chat += [{"role": "user", "content": f"hello world {turn}"}, {"role": "assistant", "content": "hello in the"}]
    return chat[:-1]


def test_by_default_a_long_chat_is_refused_with_both_counts(http: TestClient) -> None:
    for more in ({}, {"truncation": "disabled"}, {"truncation": None}):
        answer = http.post(CHAT, json={"messages": long_chat(12), **more})
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (400, "context_length_exceeded")
        assert error["n_ctx"] == 256
        assert error["n_prompt_tokens"] > 256


def test_where_it_may_be_cut_the_answer_says_how_much(http: TestClient, service: Service) -> None:
    chat = long_chat(12)
    asked = {"messages": chat, "truncation": "auto", "max_tokens": 4, "temperature": 0}
    body = http.post(CHAT, json=asked).json()
    left_out = body["messages_left_out"]
    assert left_out > 0
    assert left_out % 2 == 0
    kept = [chat[0], *chat[1 + left_out :]]
    shorter = http.post(CHAT, json={**asked, "messages": kept}).json()
    assert shorter["messages_left_out"] == 0
    assert shorter["choices"][0]["message"] == body["choices"][0]["message"]
    assert shorter["usage"]["prompt_tokens"] == body["usage"]["prompt_tokens"]
    events = read_events(http.post(CHAT, json={**asked, "stream": True}).content)[:-1]
    assert [event.get("messages_left_out") for event in events] == [left_out] + [None] * (len(events) - 1)
    plain = http.post(CHAT, json={"messages": long_chat(2), "max_tokens": 2}).json()
    assert "messages_left_out" not in plain
    cannot = http.post(CHAT, json={"messages": [chat[0], {"role": "user", "content": "x" * 400}], "truncation": "auto"})
    assert cannot.json()["error"]["code"] == "context_length_exceeded"


def test_guidance_and_shift_over_http(http: TestClient) -> None:
    asked = {"messages": long_chat(1), "temperature": 0, "max_tokens": 20, "ignore_eos": True}
    plain = http.post(CHAT, json=asked).json()["choices"][0]["message"]["content"]
    guided = {"guidance_scale": 2.5, "negative_prompt": "the world in the hello"}
    first = http.post(CHAT, json={**asked, **guided}).json()["choices"][0]["message"]["content"]
    other = {"cfg_scale": 2.5, "cfg_negative_prompt": "the world in the hello"}
    assert http.post(CHAT, json={**asked, **other}).json()["choices"][0]["message"]["content"] == first != plain
    long = http.post(CHAT, json={**asked, "max_tokens": 300, "context_shift": True, "n_keep": 4}).json()
    assert long["usage"]["completion_tokens"] == 300
    assert 50 < long["usage"]["shifted_tokens"] < 300
    assert http.post(CHAT, json={**asked, "max_tokens": 300}).json()["usage"]["completion_tokens"] < 256
