"""What is read once, and by whom it is found, as programs see it: over HTTP, with the starter, and in `/metrics`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from backend.service import Service
from backend.settings import Settings
from tests.api_server import client
from tests.test_metrics import samples

SYSTEM = "You answer questions about a long text. " + "The llama is an animal of the Andes, and carries loads. " * 80
BLOCK = 32  # tokens


@pytest.fixture
def service(tmp_path: Path) -> Any:
    service = Service(Settings(data_dir=tmp_path / "data"))
    service.load("starter")
    yield service
    service.close()


def ask(http: TestClient, chat: list[tuple[str, str]], key: str = "") -> dict[str, Any]:
    """The answer to a chat below the long system prompt."""
    messages = [{"role": role, "content": text} for role, text in [("system", SYSTEM), *chat]]
    headers = {"authorization": f"Bearer {key}"} if key else {}
    answer = http.post(
        "/v1/chat/completions",
        json={"messages": messages, "max_tokens": 8, "temperature": 1, "seed": 3},
        headers=headers,
    )
    assert answer.status_code == 200, answer.text
    return answer.json()  # type: ignore[no-any-return]


def evaluated(http: TestClient, key: str = "") -> float:
    """Prompt tokens that the model has evaluated up to now."""
    headers = {"authorization": f"Bearer {key}"} if key else {}
    return samples(http.get("/metrics", headers=headers).text)["suri_prompt_tokens_evaluated_total"]


def test_a_long_system_prompt_is_evaluated_once_and_a_turn_only_what_is_new(service: Service) -> None:
    with client(service) as http:  # type: ignore[arg-type]
        first = ask(http, [("user", "Who are you?")])
        whole = first["usage"]["prompt_tokens"]
        assert whole > 1000
        assert evaluated(http) == whole
        reply = first["choices"][0]["message"]["content"]
        steps = [
            # Another chat that begins alike; the same one again; its next turn.
            ([("user", "What is a llama?")], 1, BLOCK),
            ([("user", "Who are you?")], 0, 0),
            ([("user", "Who are you?"), ("assistant", reply), ("user", "Go on.")], 1, BLOCK),
        ]
        for chat, least, most in steps:
            before = evaluated(http)
            usage = ask(http, chat)["usage"]
            new = usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"]
            assert least <= new <= most
            assert evaluated(http) - before == new


def test_what_one_key_has_read_is_new_to_another(service: Service) -> None:
    with client(service, Settings(api_keys=("one", "two"))) as http:  # type: ignore[arg-type]
        chat = [("user", "Who are you?")]
        for key, again in (("one", False), ("two", False), ("one", True), ("two", True)):
            before = evaluated(http, key)
            usage = ask(http, chat, key)["usage"]
            cached = usage["prompt_tokens"] if again else 0
            assert usage["prompt_tokens_details"]["cached_tokens"] == cached, key
            assert evaluated(http, key) - before == usage["prompt_tokens"] - cached
