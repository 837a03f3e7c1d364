"""What `/metrics` says, read by Prometheus' own parser, against what was asked."""

from __future__ import annotations

from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from backend.api import exposition
from backend.errors import BusyError, ContextLengthError, NumericalError
from backend.events import Stats, Status
from backend.metrics import COUNTERS, WAITS, Family, Histogram, Records
from backend.params import GenerationParams
from backend.persons import by_address, by_key, by_page, salt_of
from backend.service import Service
from backend.settings import Settings
from tests.api_server import TALK, client
from tests.fakes import FakeService
from tests.real import read
from tests.tiny import TinyModel, write_tiny

GREEDY = GenerationParams(temperature=0, max_tokens=6)


def samples(text: str) -> dict[str, float]:
    """'name{label=value}' -> value, as Prometheus understands the text."""
    found = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation
        assert family.type in ("counter", "gauge", "histogram")
        for sample in family.samples:
            labels = ",".join(f"{key}={value}" for key, value in sorted(sample.labels.items()))
            found[sample.name + (f"{{{labels}}}" if labels else "")] = sample.value
    return found


def of(service: Service) -> dict[str, float]:
    return samples(exposition.text(service.metrics()).decode())


@pytest.fixture
def service(tmp_path: Path):
    presets = tmp_path / "presets"
    presets.mkdir()
    for name, seed in (("one", 1), ("two", 2)):
        path = write_tiny(tmp_path / f"{name}.gguf", TinyModel(seed=seed))
        (presets / f"{name}.yaml").write_text(f"model: {path}\ncontext: 256\n")
    service = Service(Settings(presets_dir=presets, models_dir=tmp_path / "models", data_dir=tmp_path / "data"))
    yield service
    service.close()


def test_a_chat_is_counted_and_a_shared_beginning_once(service):
    assert of(service)["suri_up"] == 0
    service.load("one")
    empty = of(service)
    assert empty["suri_up"] == 1
    assert empty["suri_prompt_tokens_total"] == 0, "the reply that warms a model up is nobody's"
    assert empty["suri_preset_info{device=cpu,model=one,preset=one}"] == 1
    preface = list(range(3, 103))
    first = service.complete([*preface, 5], GREEDY, person="a")
    second = service.complete([*preface, 6], GREEDY, person="b")  # while the first is being read, or after
    generated = sum(len(read(each)[1]) for each in (first, second))
    now = of(service)
    assert now["suri_prompt_tokens_total"] == 202
    assert now["suri_prompt_tokens_cached_total"] == 202 - now["suri_prompt_tokens_evaluated_total"]
    assert now["suri_prompt_tokens_evaluated_total"] <= 101 + 1 + service.runtime().blocks.block_size
    assert now["suri_generated_tokens_total"] == generated
    assert sum(value for name, value in now.items() if name.startswith("suri_requests_total{")) == 2
    assert now["suri_time_to_first_token_seconds_count"] == now["suri_request_duration_seconds_count"] == 2
    assert now["suri_inter_token_seconds_count"] == generated - 2
    assert now["suri_model_tokens_total"] >= now["suri_prompt_tokens_evaluated_total"] + generated - 2
    assert now["suri_requests_running"] == now["suri_cache_blocks{state=in_use}"] == 0
    blocks = service.runtime().blocks
    kinds = [now[f"suri_cache_blocks{{state={state}}}"] for state in ("in_use", "cached", "free")]
    assert sum(kinds) == blocks.n_blocks
    assert now["suri_memory_bytes{of=kv}"] == service.status().kv_bytes


def test_counters_never_fall_when_the_model_changes(service):
    service.load("one")
    read(service.complete([5, 6, 7], GREEDY))
    before = of(service)
    service.load("two")
    read(service.complete([5, 6, 7], GREEDY))
    after = of(service)
    assert after["suri_preset_info{device=cpu,model=two,preset=two}"] == 1
    for name in ("prompt_tokens", "generated_tokens", *COUNTERS):
        assert after[f"suri_{name}_total"] >= before[f"suri_{name}_total"]
    assert after["suri_steps_total"] > before["suri_steps_total"] > 0


def test_what_could_not_be_answered_is_counted_by_its_reason(service):
    service.load("one")
    for _ in range(2):
        with pytest.raises(ContextLengthError):
            service.complete([5] * 300, GREEDY)
    found = of(service)
    assert found["suri_requests_total{reason=refused}"] == 2
    assert found["suri_request_errors_total{code=context_length_exceeded}"] == 2


def test_records() -> None:
    records = Records()
    records.ended(Stats(prompt_tokens=7, evaluated_tokens=4, cached_tokens=3), 0.3, "error", NumericalError("x"))
    records.ended(Stats(completion_tokens=2, seconds_to_first_token=0.02), 400.0, "error", ValueError("x"))
    records.refused(BusyError("x"))
    records.retire({"steps": 5})
    found = samples(exposition.text(records.families(Status("ready"), [{"steps": 2}, {"preemptions": 1}])).decode())
    assert found["suri_request_errors_total{code=numerical_error}"] == 1
    assert found["suri_request_errors_total{code=internal_error}"] == 1
    assert found["suri_request_errors_total{code=queue_full}"] == 1
    assert (found["suri_steps_total"], found["suri_preemptions_total"]) == (7, 1)
    assert found["suri_request_duration_seconds_bucket{le=0.25}"] == 0
    assert found["suri_request_duration_seconds_bucket{le=0.5}"] == 1
    assert found[f"suri_request_duration_seconds_bucket{{le={WAITS[-1]}}}"] == 1
    assert found["suri_request_duration_seconds_bucket{le=+Inf}"] == 2
    assert found["suri_request_duration_seconds_sum"] == pytest.approx(400.3)
    assert found["suri_time_to_first_token_seconds_count"] == 1


def test_a_value_at_an_end_belongs_below_it() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 9.0):
        histogram.add(value)
    assert histogram.shown("x", "x").counts == (2, 4, 5)


def test_labels_from_outside_cannot_break_the_text() -> None:
    family = Family("requests", "x", "gauge", ("name",), {('a"b\\c\nd',): 3.0})
    assert list(samples(exposition.text([family]).decode()).values()) == [3.0]


def test_the_route_is_guarded_like_the_others() -> None:
    with client(FakeService(), Settings(api_keys=("secret",))) as http:
        assert http.get("/metrics").status_code == 401
        answer = http.get("/metrics", headers={"authorization": "Bearer secret"})
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
        assert samples(answer.text)["suri_up"] == 1
        assert http.get("/metrics", headers={"authorization": "Bearer secret", "host": "evil.test"}).status_code == 403
        assert http.post("/metrics", json={}, headers={"authorization": "Bearer secret"}).status_code == 405


# who is who --------------------------------------------------------------------------------------------------------


def test_people_are_told_apart_by_key_or_by_address() -> None:
    service = FakeService()
    with client(service, Settings(api_keys=("one", "two"))) as http:
        for key in ("one", "two", "one"):
            http.post("/v1/chat/completions", json=TALK, headers={"authorization": f"Bearer {key}"})
    assert service.people == [by_key(b"one"), by_key(b"two"), by_key(b"one")]
    assert len(set(service.people)) == 2
    assert not any("one" in person or "two" in person for person in service.people), "the key cannot be read from it"
    service = FakeService()
    with client(service) as http:
        http.post("/v1/completions", json={"prompt": "a"}, headers={"authorization": "Bearer whatever"})
    assert service.people == [by_address("testclient")], "without keys nobody can choose who to be"


def test_the_cache_is_apart_for_those_who_prove_who_they_are() -> None:
    apart = [by_key(b"one"), by_key(b"two"), by_page("ann", "s1"), by_page("bob", "s1")]
    assert len({salt_of(person) for person in apart} | {b""}) == 5
    assert by_page("ann", "s1") == by_page("ann", "s2")
    assert {salt_of(person) for person in (by_address("::1"), by_page("", "s1"), "")} == {b""}
