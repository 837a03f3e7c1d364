"""Programs and a switch: requests wait in the gap, a second load is told no, the admin key, what the rows say."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

import backend.runtime
import backend.switch
from backend.service import Service
from backend.settings import Settings
from tests.api_server import TALK, assert_error, client, read_events
from tests.fakes import FakeService
from tests.switching import Gate, Loading, three_models, wait_until

CHAT, LOAD, CANCEL = "/v1/chat/completions", "/v1/presets/load", "/v1/presets/cancel"


@pytest.fixture
def service(tmp_path: Path):
    service = Service(three_models(tmp_path))
    yield service
    service.close()


@pytest.fixture
def gate(monkeypatch) -> Gate:
    gate = Gate()
    monkeypatch.setattr(backend.runtime, "load_model", gate.load_model)
    return gate


class Asking(threading.Thread):
    """One request in a thread of its own; `response` is its answer."""

    def __init__(self, http, **body: object) -> None:
        super().__init__(daemon=True)
        self.http, self.body = http, {**TALK, "max_tokens": 3, **body}
        self.start()

    def run(self) -> None:
        self.response = self.http.post(CHAT, json=self.body)

    def ended(self):
        self.join(20)
        assert not self.is_alive()
        return self.response


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_in_the_gap_waits_and_tells_who_answered(service: Service, gate: Gate, stream, monkeypatch):
    monkeypatch.setattr(backend.switch, "fits", lambda *_: "after-unload")
    service.load("one")
    gate.shut("two")
    with client(service) as http:  # type: ignore[arg-type]
        load = Loading(service, "two")
        assert gate.arrived["two"].wait(10)
        assert_error(http.get("/health"), 503, "not_ready")
        asked = Asking(http, stream=stream, model="one")
        wait_until(lambda: service.status().waiting == 1)
        gate.open["two"].set()
        assert load.ended() is None
        response = asked.ended()
    assert response.status_code == 200
    if stream:
        events = [event for event in read_events(response.content) if isinstance(event, dict)]
        assert {event["model"] for event in events} == {"two"}
    else:
        assert response.json()["model"] == "two"
        assert response.json()["usage"]["completion_tokens"] > 0


def test_a_second_load_is_told_no_and_the_first_can_be_cancelled(service: Service, gate: Gate):
    service.load("one")
    gate.shut("two")
    with client(service) as http:  # type: ignore[arg-type]
        load = Loading(service, "two")
        assert gate.arrived["two"].wait(10)
        response = http.post(LOAD, json={"preset": "three"})
        assert "'two' is being loaded" in assert_error(response, 503, "queue_full")["message"]
        assert int(response.headers["retry-after"]) > 0
        assert http.post(CANCEL, json={}).json() == {"cancelled": True}
        assert load.ended() is not None
        assert http.post(CANCEL, json={}).json() == {"cancelled": False}
        assert_error(http.get(CANCEL), 405)
        assert http.post(LOAD, json={"preset": "three"}).json() == {
            "status": "ready",
            "preset": "three",
            "model": "three",
        }


def test_what_does_not_fit_says_so_in_numbers(service: Service, monkeypatch):
    service.load("one")
    monkeypatch.setattr(backend.switch, "fits", lambda *_: "no")
    with client(service) as http:  # type: ignore[arg-type]
        error = assert_error(http.post(LOAD, json={"preset": "two"}), 503, "out_of_memory")
        assert error["needed_bytes"] > 0
        assert error["free_bytes"] > 0


def test_rows_say_what_a_preset_takes_and_whether_it_fits(service: Service):
    with client(service) as http:  # type: ignore[arg-type]
        rows = {row["name"]: row for row in http.get("/v1/presets").json()["data"]}
    assert rows["one"]["fits"] == "now"
    assert rows["one"]["ram_bytes"] > 0
    assert rows["one"]["measured"] is None


def test_the_admin_key_is_for_loading():
    settings = Settings(api_keys=("user",), admin_key="admin")
    with client(FakeService(), settings) as http:
        for path, body in ((LOAD, {"preset": "starter-f32"}), (CANCEL, {})):
            assert_error(http.post(path, json=body), 401, "invalid_api_key")
            user, admin = ({"Authorization": f"Bearer {key}"} for key in ("user", "admin"))
            assert_error(http.post(path, json=body, headers=user), 403, "forbidden")
            assert http.post(path, json=body, headers=admin).status_code == 200
        assert http.get("/v1/presets", headers=user).status_code == 200
        assert http.get("/v1/models", headers=admin).status_code == 200
    with client(FakeService(), Settings(admin_key="admin")) as http:  # no other keys: only loading is guarded
        assert http.get("/v1/presets").status_code == 200
        assert_error(http.post(LOAD, json={"preset": "starter"}), 401)
