"""Named sampling sets: one file, always whole; what cannot be read is never overwritten."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest

from backend.errors import ParameterError, UserError
from backend.params import GenerationParams
from backend.store.sampling_sets import MAX_NAME, MAX_SETS, SamplingSets


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "sets.json"


def test_saved_sets_are_there_for_the_next_process(path: Path) -> None:
    sets = SamplingSets(path)
    assert sets.all() == {}
    calm, wild = GenerationParams(temperature=0.1, stop=("é", "\n")), GenerationParams(temperature=2, seed=7)
    sets.save("calm", calm)
    sets.save("  wild ✨ ", wild)
    sets.save("defaults", GenerationParams())
    assert SamplingSets(path).all() == {"calm": calm, "wild ✨": wild, "defaults": GenerationParams()}
    assert json.loads(path.read_text())["calm"] == {"temperature": 0.1, "stop": ["é", "\n"]}, "only what differs"
    sets.save("calm", wild)
    sets.delete("wild ✨")
    sets.delete("wild ✨")
    assert SamplingSets(path).all() == {"calm": wild, "defaults": GenerationParams()}
    assert [entry.name for entry in path.parent.iterdir()] == ["sets.json"]


@pytest.mark.parametrize("name", ["", "   ", "a\nb", "a\0", "\u202eabc", "x" * (MAX_NAME + 1), "\ud800"])
def test_names_that_cannot_be_names(path: Path, name: str) -> None:
    with pytest.raises(ParameterError) as caught:
        SamplingSets(path).save(name, GenerationParams())
    assert caught.value.param == "name"
    assert not path.exists()


def test_half_a_surrogate_in_a_stop_string_is_kept(path: Path) -> None:
    params = GenerationParams(stop=("\ud800",))
    SamplingSets(path).save("odd", params)
    assert SamplingSets(path).all() == {"odd": params}


def test_there_is_a_limit(path: Path) -> None:
    path.parent.mkdir()
    path.write_text(json.dumps({f"set {i}": {} for i in range(MAX_SETS)}))
    sets = SamplingSets(path)
    with pytest.raises(ParameterError, match="delete one first"):
        sets.save("one more", GenerationParams())
    sets.save("set 3", GenerationParams(top_k=1))
    assert sets.all()["set 3"].top_k == 1


BROKEN = [
    "", "{", "[1]", '"x"', "null", "{\"a\": 1}", '{"a": {"temprature": 1}}', '{"a": {"top_p": 7}}', "[" * 100_000,
    b"\xff\xfe", b"\0" * 100,
]  # fmt: skip


@pytest.mark.parametrize("content", BROKEN, ids=lambda content: repr(content)[:20])
def test_a_file_that_cannot_be_read_is_told_and_kept(path: Path, content: str | bytes) -> None:
    path.parent.mkdir()
    data = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(data)
    sets = SamplingSets(path)
    for act in (sets.all, lambda: sets.save("x", GenerationParams()), lambda: sets.delete("x")):
        with pytest.raises(UserError, match=r"sets\.json"):
            act()
    assert path.read_bytes() == data


def test_a_failed_write_keeps_what_was_there(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sets = SamplingSets(path)
    sets.save("a", GenerationParams(top_k=3))
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left"):
        sets.save("b", GenerationParams())
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == ["sets.json"]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be"):
        SamplingSets(tmp_path / "file" / "sets.json").save("a", GenerationParams())


def test_saves_from_many_threads_are_all_kept(path: Path) -> None:
    sets = SamplingSets(path)
    threads = [
        threading.Thread(target=lambda i=i: sets.save(f"set {i}", GenerationParams(top_k=i + 1))) for i in range(20)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {name: params.top_k for name, params in sets.all().items()} == {f"set {i}": i + 1 for i in range(20)}
