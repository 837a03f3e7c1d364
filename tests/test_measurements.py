"""What was measured is kept: by run, merged, replaced whole, and never in the way when the file is damaged."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest

from backend.errors import UserError
from backend.store import measurements
from backend.store.measurements import Measurements, Run, fingerprint

RUN = Run("starter", "00ff", "a machine", "torch 2.13")


def test_two_commands_fill_one_entry(tmp_path: Path):
    store = Measurements(tmp_path / "data" / "measurements.json")
    assert store.all() == []
    store.record(RUN, tokens_per_second=40.5, peak_ram_bytes=700_000_000, model="SmolLM2")
    entry = store.record(RUN, perplexity=21.5, kl=0.01, reference="starter-f32")
    assert store.all() == [entry] == Measurements(tmp_path / "data" / "measurements.json").all()
    assert (entry.tokens_per_second, entry.perplexity, entry.model) == (40.5, 21.5, "SmolLM2")
    assert entry.prefill_tokens_per_second is None
    assert os.listdir(tmp_path / "data") == ["measurements.json"]  # no temporary file stays


@pytest.mark.parametrize("change", ["preset", "fingerprint", "machine", "version"])
def test_anything_else_is_another_entry(tmp_path: Path, change: str):
    store = Measurements(tmp_path / "m.json")
    store.record(RUN, tokens_per_second=1.0)
    other = Run(**(vars(RUN) | {change: "other"}))
    store.record(other, tokens_per_second=2.0)
    assert [entry.tokens_per_second for entry in store.all()] == [1.0, 2.0]
    first = store.of(RUN)
    assert first is not None
    assert first.tokens_per_second == 1.0
    assert store.of(Run("no", "no", "no", "no")) is None


def test_the_newest_of_this_machine_is_shown(tmp_path: Path):
    store = Measurements(tmp_path / "m.json")
    store.record(RUN, tokens_per_second=1.0)
    store.record(Run("starter", "new", "a machine", "v"), tokens_per_second=2.0)
    store.record(Run("starter", "new", "elsewhere", "v"), tokens_per_second=3.0)
    assert {name: entry.tokens_per_second for name, entry in store.latest("a machine").items()} == {"starter": 2.0}
    store.record(RUN, tokens_per_second=4.0)  # measured again: the newest now
    assert store.latest("a machine")["starter"].tokens_per_second == 4.0


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", '{"a": 1}', '[{"preset": 1}]', "[" * 100_000, "\x00\xff"])
def test_a_damaged_file_is_an_empty_one(tmp_path: Path, text: str):
    path = tmp_path / "m.json"
    path.write_text(text, encoding="latin-1")
    store = Measurements(path)
    assert store.all() == []
    store.record(RUN, perplexity=2.0)
    assert store.all()[0].perplexity == 2.0


def test_an_entry_with_a_wrong_value_is_left_out_and_unknown_keys_do_no_harm(tmp_path: Path):
    path = tmp_path / "m.json"
    good = vars(RUN) | {"perplexity": 3.5, "of_a_later_version": [1]}
    path.write_text(json.dumps([vars(RUN) | {"perplexity": "low"}, good, vars(RUN) | {"kl": True}]), encoding="utf-8")
    assert [entry.perplexity for entry in Measurements(path).all()] == [3.5]


def test_the_file_stays_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(measurements, "MAX_ENTRIES", 3)
    store = Measurements(tmp_path / "m.json")
    for number in range(5):
        store.record(Run(str(number), "", "", ""), perplexity=1.0)
    assert [entry.run.preset for entry in store.all()] == ["2", "3", "4"]


def test_writers_at_once_lose_nothing(tmp_path: Path):
    store = Measurements(tmp_path / "m.json")
    threads = [
        threading.Thread(target=lambda n=n: store.record(Run(f"p{n}", "", "", ""), perplexity=float(n)))
        for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(entry.perplexity for entry in store.all()) == [float(n) for n in range(8)]


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"cannot be written"):
        Measurements(tmp_path / "file" / "m.json").record(RUN, perplexity=1.0)


def test_fingerprint(tmp_path: Path):
    path = tmp_path / "model.gguf"
    path.write_bytes(bytes(300_000))
    first = fingerprint({"weights": "int8", "context": None}, [path])
    assert first == fingerprint({"context": None, "weights": "int8"}, [path])
    os.utime(path, (1, 1))
    assert first == fingerprint({"context": None, "weights": "int8"}, [path])  # a copy is the same model
    assert first != fingerprint({"context": None, "weights": "int4"}, [path])
    path.write_bytes(bytes(299_999) + b"\1")
    assert first != fingerprint({"context": None, "weights": "int8"}, [path])
    assert len(first) == 16
