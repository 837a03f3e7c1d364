"""Models of the hub: downloads that survive what networks do."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from backend import hub_download
from backend.errors import PresetError
from backend.events import LoadProgress
from backend.hub import HubModel
from backend.hub_download import HubFolder
from backend.models import ModelFolder
from tests.hub_server import HubServer
from tests.hubfiles import BIG, FILES, GGUF, MODEL, SIZE, TAKEN, files_in, refused


@pytest.fixture
def folder(tmp_path: Path) -> HubFolder:
    return HubFolder(tmp_path / "hub")


def test_a_folder_is_fetched_once(hub: HubServer, folder: HubFolder) -> None:
    steps: list[LoadProgress] = []
    assert folder.local(MODEL) is None
    path = folder.resolve(MODEL, steps.append)
    assert path == folder.folder / "org" / "llama"
    assert files_in(path) == TAKEN
    assert {name: (path / name).read_bytes() for name in TAKEN} == {name: FILES[name] for name in TAKEN}
    assert hub.file_bytes == SIZE
    download = [step for step in steps if step.stage == "Downloading org/llama"]
    assert {step.total for step in download} == {SIZE}
    assert [step.done for step in download] == sorted(step.done for step in download)
    assert download[-1].done == SIZE
    assert steps[0].stage.startswith("Asking ")
    hub.forget()
    assert folder.resolve(MODEL) == folder.local(MODEL) == path
    assert hub.requests == []


def test_everything_is_of_one_commit(hub: HubServer, folder: HubFolder) -> None:
    folder.resolve(MODEL)
    assert all(f"/resolve/{hub.commit}/" in request for request in hub.requests[1:])


def test_a_gguf_and_another_of_the_same_repository(hub: HubServer, folder: HubFolder) -> None:
    path = folder.resolve(GGUF)
    assert path.name == "m.Q8_0.gguf"
    assert path.read_bytes() == BIG
    assert hub.asked == ["m.Q8_0.gguf"]
    other = HubModel("org/gguf", "m.Q2_K.gguf")
    assert folder.local(other) is None
    assert folder.resolve(other).read_bytes() == b"small"
    assert folder.local(GGUF) == path


def test_a_revision_has_its_own_folder(hub: HubServer, folder: HubFolder) -> None:
    hub.revisions.add("v2")
    path = folder.resolve(HubModel("org/gguf", "Q2_K", "v2"))
    assert path == folder.folder / "org" / "gguf@v2" / "m.Q2_K.gguf"
    assert folder.local(HubModel("org/gguf", "Q2_K")) is None
    refused(folder, HubModel("org/gguf", "Q2_K", "v3"), "no revision 'v3'")


def test_a_broken_connection_goes_on_where_it_stopped(hub: HubServer, folder: HubFolder) -> None:
    hub.break_after = [1_500_000, 700_000]
    steps: list[LoadProgress] = []
    assert folder.resolve(GGUF, steps.append).read_bytes() == BIG
    assert hub.asked == ["m.Q8_0.gguf"] * 3
    assert hub.file_bytes == len(BIG)
    assert max(step.done for step in steps) == len(BIG)


def test_a_later_start_goes_on_where_the_first_stopped(hub: HubServer, folder: HubFolder) -> None:
    hub.break_after = [1_500_000] + [0] * 20
    message = refused(folder, GGUF, "goes on where it stopped")
    assert "org/gguf" in message
    assert hub.url in message
    target = folder.folder / "org" / "gguf"
    assert not (target / "m.Q8_0.gguf").exists()
    assert folder.local(GGUF) is None
    had = hub.file_bytes
    assert had == 1_500_000
    hub.break_after = []
    steps: list[LoadProgress] = []
    assert folder.resolve(GGUF, steps.append).read_bytes() == BIG
    assert hub.file_bytes == len(BIG)
    first = next(step for step in steps if step.stage.startswith("Downloading"))
    assert (first.done, first.total) == (had, len(BIG))
    assert files_in(target) == ["m.Q8_0.gguf"]


def test_an_interrupt_keeps_what_has_arrived(hub: HubServer, folder: HubFolder) -> None:
    def stop(step: LoadProgress) -> None:
        if step.done > 1_000_000:
            raise KeyboardInterrupt

    hub.break_after = [2_000_000]
    with pytest.raises(KeyboardInterrupt):
        folder.resolve(GGUF, stop)
    hub.break_after = []
    part = next((folder.folder / "org" / "gguf").glob("*.part"))
    kept = part.stat().st_size
    hub.forget()
    assert folder.resolve(GGUF).read_bytes() == BIG
    assert hub.file_bytes == len(BIG) - kept


def test_a_server_without_ranges_starts_from_the_beginning(hub: HubServer, folder: HubFolder) -> None:
    hub.break_after, hub.ranges = [1_500_000], False
    steps: list[LoadProgress] = []
    assert folder.resolve(GGUF, steps.append).read_bytes() == BIG
    assert max(step.done for step in steps) == len(BIG)
    assert hub.file_bytes == len(BIG) + 1_500_000


def test_whole_files_are_not_fetched_again_after_a_break(hub: HubServer, folder: HubFolder) -> None:
    hub.break_after = [len(BIG) * 2, len(BIG) * 2, 100] + [0] * 20
    refused(folder, MODEL, "goes on")
    assert folder.local(MODEL) is None
    hub.break_after = []
    folder.resolve(MODEL)
    assert hub.file_bytes == SIZE


# without network ------------------------------------------------------------------------------------------------------


def test_without_network_what_is_there_is_used(hub: HubServer, folder: HubFolder) -> None:
    path = folder.resolve(MODEL)
    hub.stop()
    assert folder.resolve(MODEL) == path
    message = refused(folder, GGUF, "could not be fetched")
    for words in ("hub:org/gguf:Q8_0", hub.url, "check the network", "local file"):
        assert words in message
    (path / "tokenizer.json").unlink()
    assert folder.local(MODEL) is None
    refused(folder, MODEL, "could not be fetched")


def test_offline_on_request(hub: HubServer, folder: HubFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder.resolve(GGUF)
    hub.forget()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert folder.resolve(GGUF) == path
    message = refused(folder, MODEL, "HF_HUB_OFFLINE")
    assert "org/llama" in message
    assert hub.requests == []


# the folder -----------------------------------------------------------------------------------------------------------


def test_a_file_that_lost_bytes_is_fetched_again(hub: HubServer, folder: HubFolder) -> None:
    path = folder.resolve(GGUF)
    os.truncate(path, 1000)
    assert folder.local(GGUF) is None
    assert folder.resolve(GGUF).read_bytes() == BIG


def test_files_that_the_user_put_there_are_checked_and_kept(hub: HubServer, folder: HubFolder) -> None:
    target = folder.folder / "org" / "llama"
    target.mkdir(parents=True)
    for name in TAKEN:
        (target / name).write_bytes(FILES[name])
    (target / "tokenizer.json").write_bytes(b"[2]")
    assert folder.resolve(MODEL) == target
    assert hub.asked == ["tokenizer.json"]
    assert (target / "tokenizer.json").read_bytes() == b"[1]"


def test_a_new_commit_in_the_middle(hub: HubServer, folder: HubFolder) -> None:
    hub.break_after = [len(BIG) * 2, len(BIG) * 2, 1000] + [0] * 20  # config.json, one shard, a piece of the next
    refused(folder, MODEL, "goes on")
    hub.break_after, hub.commit = [], "f" * 40
    hub.repos["org/llama"]["model-00002-of-00002.safetensors"] = b"new" * 1000
    hub.repos["org/llama"]["config.json"] = b"{1}"[:2] + b"}"
    hub.forget()
    path = folder.resolve(MODEL)
    assert "model-00001-of-00002.safetensors" not in hub.asked
    for name in TAKEN:
        assert (path / name).read_bytes() == hub.repos["org/llama"][name]
    assert files_in(path) == TAKEN


@pytest.mark.parametrize(
    "state", ["", "{", "[]", "null", '{"files": {}}',
              '{"commit":"x","done":["../../x"],"files":{"../../x":{"size":1,"digest":""}}}',
              '{"commit":"x","done":7,"files":{}}', '{"commit":"x","done":[],"files":{"a":7}}', "[" * 100000]
)  # fmt: skip
def test_a_damaged_state_is_asked_for_again(hub: HubServer, folder: HubFolder, state: str) -> None:
    path = folder.resolve(GGUF)
    (path.parent / hub_download.STATE).write_text(state)
    assert folder.local(GGUF) is None
    hub.forget()
    assert folder.resolve(GGUF) == path
    assert hub.file_bytes == 0  # the file itself was right


def test_a_full_disk(hub: HubServer, folder: HubFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 1_000_000})
    monkeypatch.setattr(hub_download.shutil, "disk_usage", lambda _: usage)
    refused(folder, GGUF, r"needs 0\.0 GB more|only 0\.0 GB are free")
    assert hub.asked == []
    monkeypatch.undo()
    monkeypatch.setenv("HF_ENDPOINT", hub.url)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(hub_download.os, "fsync", full)
    refused(folder, GGUF, "disk is full")


def test_a_folder_that_cannot_be_made(hub: HubServer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(HubFolder(tmp_path / "file" / "hub"), GGUF, "cannot be kept")


def test_files_beyond_plain_http(hub: HubServer, folder: HubFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_download, "LARGEST", len(BIG) - 1)
    refused(folder, GGUF, "hf download org/gguf m.Q8_0.gguf --local-dir")


TWIN = """
import sys
from pathlib import Path
from backend.hub import HubModel
from backend.hub_download import HubFolder
print("ready", flush=True)
sys.stdin.readline()
print(HubFolder(Path(sys.argv[1])).resolve(HubModel("org/gguf", "Q8_0")).stat().st_size)
"""


def test_two_programs_at_once(hub: HubServer, folder: HubFolder) -> None:
    environment = os.environ | {"HF_ENDPOINT": hub.url}
    command = [sys.executable, "-c", TWIN, str(folder.folder)]
    twins = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(2)
    ]
    for twin in twins:
        assert twin.stdout is not None
        assert twin.stdout.readline() == "ready\n"
    outputs = []
    for twin in twins:
        assert twin.stdin is not None
        twin.stdin.write("go\n")
        twin.stdin.flush()
    for twin in twins:
        outputs.append(twin.communicate(timeout=60)[0])
    assert outputs == [f"{len(BIG)}\n"] * 2
    assert hub.file_bytes == len(BIG)


# through the models folder --------------------------------------------------------------------------------------------


def test_presets_name_models_of_the_hub(hub: HubServer, tmp_path: Path) -> None:
    models = ModelFolder(tmp_path / "models")
    steps: list[LoadProgress] = []
    assert models.local("hub:org/gguf:q8_0", tmp_path) is None
    path = models.resolve("hub:org/gguf:q8_0", tmp_path, steps.append)
    assert path == tmp_path / "models" / "hub" / "org" / "gguf" / "m.Q8_0.gguf"
    assert hashlib.sha256(path.read_bytes()).digest() == hashlib.sha256(BIG).digest()
    assert steps
    assert models.local("hub:org/gguf:q8_0", tmp_path) == path
    with pytest.raises(PresetError, match="hub:ORG/REPO"):
        models.local("hub:gguf", tmp_path)


def test_the_state_is_plain_json(hub: HubServer, folder: HubFolder) -> None:
    path = folder.resolve(GGUF)
    state = json.loads((path.parent / hub_download.STATE).read_text())
    assert state["commit"] == hub.commit
    assert state["done"] == ["m.Q8_0.gguf"]
    assert state["files"]["m.Q8_0.gguf"] == {"size": len(BIG), "digest": hashlib.sha256(BIG).hexdigest()}
