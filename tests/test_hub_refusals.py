"""Downloads that a hub refuses, lies about, or damages."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from backend.hub import HubModel
from backend.hub_download import HubFolder
from tests.hub_server import HubServer, entry
from tests.hubfiles import BIG, GGUF, files_in, refused


@pytest.fixture
def folder(tmp_path: Path) -> HubFolder:
    return HubFolder(tmp_path / "hub")


def test_gated_models(hub: HubServer, folder: HubFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.token, hub.gated = "hf_secret", True
    message = refused(folder, GGUF, "accepted its licence")
    assert f"{hub.url}/org/gguf" in message
    assert "HF_TOKEN" in message
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert folder.resolve(GGUF).read_bytes() == BIG


def test_large_files_come_from_another_server_without_the_token(
    hub: HubServer, folder: HubFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.token, hub.elsewhere = "hf_secret", True
    hub.break_after = [1_000_000]
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert folder.resolve(GGUF).read_bytes() == BIG
    assert hub.file_bytes == len(BIG)
    assert hub.tokens_elsewhere == [None, None]  # two requests, because the first was cut


def test_unknown_repositories_and_files(hub: HubServer, folder: HubFolder) -> None:
    assert "HF_TOKEN" in refused(folder, HubModel("org/nothing"), "there is no model org/nothing")
    refused(folder, HubModel("org/gguf", "Q3_K"), "no file 'Q3_K'.*m.Q2_K.gguf")
    del hub.repos["org/gguf"]["m.Q8_0.gguf"]
    hub.listing = [entry("m.Q8_0.gguf", BIG)]
    refused(folder, GGUF, "is listed by .* but cannot be fetched")


@pytest.mark.parametrize(
    ("status", "words"), [(429, "wait some minutes"), (500, "error 500"), (503, "503"), (400, "400")]
)
def test_other_errors(
    hub: HubServer, folder: HubFolder, monkeypatch: pytest.MonkeyPatch, status: int, words: str
) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    hub.status = status
    refused(folder, GGUF, words)


@pytest.mark.parametrize(
    "answer", [b"", b"<html>Log in to the hotel</html>", b"[]", b"null", b"{}", b'{"id":1,"siblings":[{}]}',
               b'{"siblings":7}', b'{"id":"a/b","sha":"../x","siblings":[]}', b"\xff\xfe", b"[" * 20000]
)  # fmt: skip
def test_answers_that_are_no_listing(hub: HubServer, folder: HubFolder, answer: bytes) -> None:
    hub.answer = answer
    refused(folder, GGUF, ".")


@pytest.mark.parametrize("name", ["../x.gguf", "/tmp/x.gguf", "a/../../x.gguf", "C:\\x.gguf", "x\ny.gguf", 7, None])
def test_hostile_names_in_the_listing(hub: HubServer, folder: HubFolder, tmp_path: Path, name: Any) -> None:
    hub.listing = [entry("m.Q8_0.gguf", BIG), entry("x", b"x") | {"rfilename": name}]
    refused(folder, GGUF, "no plain path")
    assert hub.file_bytes == 0
    assert not list(tmp_path.rglob("*.gguf"))


@pytest.mark.parametrize(
    "change", [{"lfs": None, "size": -1}, {"lfs": None, "size": "many"}, {"lfs": None, "size": None},
               {"lfs": {"size": 1}}, {"lfs": None, "blobId": "../../x"}, {"lfs": None, "blobId": 5}]
)  # fmt: skip
def test_hostile_facts_in_the_listing(hub: HubServer, folder: HubFolder, change: dict[str, Any]) -> None:
    hub.listing = [entry("m.Q8_0.gguf", BIG) | change]
    refused(folder, GGUF, ".")
    assert hub.file_bytes == 0


@pytest.mark.parametrize("model", [GGUF, HubModel("org/gguf", "Q2_K")])  # SHA-256, and git's hash
def test_damaged_content_never_gets_the_final_name(hub: HubServer, folder: HubFolder, model: HubModel) -> None:
    name = "m.Q8_0.gguf" if model is GGUF else "m.Q2_K.gguf"
    hub.damaged = {name}
    refused(folder, model, f"{name} of org/gguf arrived damaged")
    assert files_in(folder.folder) == []
    hub.damaged = set()
    assert folder.resolve(model).name == name


def test_a_file_that_is_longer_than_listed(hub: HubServer, folder: HubFolder) -> None:
    hub.listing = [entry("m.Q8_0.gguf", BIG[:1000])]
    refused(folder, GGUF, "org/gguf")
    assert "m.Q8_0.gguf" not in files_in(folder.folder)
    hub.listing = None
    assert folder.resolve(GGUF).read_bytes() == BIG
