"""Fetching models from the Hugging Face hub into a folder: resumable, checked, and without network once they are there.

A repository's files lie in FOLDER/ORG/REPO (FOLDER/ORG/REPO@REVISION), so that people see and can use them. A file has
its final name only when it is whole and right; until then it is NAME.HASH.part and a later start goes on from there.
`.hub.json` beside them says which files the repository has and which of them are here and checked; with it nothing
is asked of the network again. To fetch a newer state of a repository, delete that folder.

The transfer itself is `huggingface_hub`'s (proxies, tokens, redirects, retries). Its own download function is not used:
it forgets what has arrived when a program ends. HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE are obeyed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from backend.errors import DownloadError
from backend.events import LoadProgress
from backend.hub import HubModel, choose, is_safe

Progress = Callable[[LoadProgress], None]

STATE = ".hub.json"
MAX_FILES = 20_000
MAX_STATE_BYTES = 16 << 20
LARGEST = 50_000_000_000  # bytes of a file that the hub gives by plain HTTP
SECONDS = 20.0  # to wait for the list of files
_HEX = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


@dataclass(frozen=True)
class HubFile:
    """What the hub says of a file. `digest`: SHA-256 (64 digits), or git's SHA-1 of a small file (40); "": unknown."""

    size: int
    digest: str


@dataclass
class _State:
    """A repository at one commit, and which of its files are here, whole and right."""

    commit: str
    files: dict[str, HubFile]
    done: set[str] = field(default_factory=set)


class HubFolder:
    """Models of the hub, under one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def local(self, model: HubModel) -> Path | None:
        """The model's file or folder when all of it is here; no network. None when something has to be fetched."""
        target = self._target(model)
        state = _read_state(target / STATE)
        if state is None:
            return None
        try:
            choice = choose(state.files, model)
        except DownloadError:
            return None
        here = all(name in state.done and _has_size(target / name, state.files[name].size) for name in choice.names)
        return target / choice.path if here else None

    def resolve(self, model: HubModel, progress: Progress = lambda _: None) -> Path:
        """The model's file or folder, fetched as far as it is not here. Raises DownloadError."""
        if path := self.local(model):
            return path
        endpoint = _endpoint()
        if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
            raise DownloadError(
                f"{model} is not in {self._target(model)}, and HF_HUB_OFFLINE forbids to fetch it from {endpoint}; "
                "unset HF_HUB_OFFLINE, or give a local file as the model"
            )
        target = self._target(model)
        with _explained(model, endpoint, target):
            target.mkdir(parents=True, exist_ok=True)
            with _alone(target, model, progress):
                return self.local(model) or _fetch(model, endpoint, target, progress)

    def _target(self, model: HubModel) -> Path:
        return self.folder / (model.repo + (f"@{model.revision}" if model.revision else ""))


def _endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or "https://huggingface.co"


def _fetch(model: HubModel, endpoint: str, target: Path, progress: Progress) -> Path:
    progress(LoadProgress(f"Asking {endpoint} for the files of {model.repo}"))
    state, before = _ask(model, endpoint), _read_state(target / STATE)
    choice = choose(state.files, model)
    if before is not None:  # what was right then and has not changed since
        state.done |= {name for name in before.done if before.files.get(name) == state.files.get(name)}
    meter = _Meter(progress, f"Downloading {model.repo}", sum(state.files[name].size for name in choice.names))
    missing = []
    for name in choice.names:
        file, path = state.files[name], target / name
        known = name in state.done and _has_size(path, file.size)
        if known or (_has_size(path, file.size) and _is_right(path, file, progress)):
            meter.end_file(file.size)
            state.done.add(name)
        else:
            state.done.discard(name)
            missing.append(name)
    _refuse_when_too_big(
        model, target, [(state.files[name], _part(target / name, state.files[name])) for name in missing]
    )
    _write_state(target / STATE, state)
    for name in missing:
        _fetch_file(model, endpoint, state, name, target, meter)
        state.done.add(name)
        _write_state(target / STATE, state)
    return target / choice.path


def _ask(model: HubModel, endpoint: str) -> _State:
    """The repository's files, as the hub lists them now."""
    from huggingface_hub import HfApi  # takes half a second

    info = HfApi(endpoint=endpoint).model_info(
        model.repo, revision=model.revision or "main", files_metadata=True, timeout=SECONDS
    )
    siblings = info.siblings or []
    if len(siblings) > MAX_FILES:
        raise DownloadError(f"{model.repo} has {len(siblings)} files; expected at most {MAX_FILES}")
    files: dict[str, HubFile] = {}
    for entry in siblings:
        if not isinstance(entry.rfilename, str) or not is_safe(entry.rfilename):
            raise DownloadError(
                f"{endpoint} lists a file {str(entry.rfilename)[:100]!r} in {model.repo}, which is no plain path; "
                "nothing was downloaded"
            )
        size = entry.lfs.size if entry.lfs else entry.size
        digest = entry.lfs.sha256 if entry.lfs else entry.blob_id or ""
        if not isinstance(size, int) or size < 0 or not (digest == "" or _HEX.fullmatch(str(digest))):
            raise DownloadError(f"{endpoint} gives no usable size and hash for {entry.rfilename} of {model.repo}")
        files[entry.rfilename] = HubFile(size, digest)
    if not isinstance(info.sha, str) or not _HEX.fullmatch(info.sha):
        raise DownloadError(f"{endpoint} gives no commit for {model.repo}, so it is no hub of models")
    return _State(info.sha, files)


def _fetch_file(model: HubModel, endpoint: str, state: _State, name: str, target: Path, meter: _Meter) -> None:
    from httpx2 import ReadError
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    file, path = state.files[name], target / name
    part = _part(path, file)
    if file.size > LARGEST:
        raise DownloadError(
            f"{name} of {model.repo} has {file.size / 1e9:.0f} GB, and the hub gives files above 50 GB only to its own "
            f"program: fetch it with 'hf download {model.repo} {name} --local-dir {target}' and start again"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    # The plain bytes: with a compressed answer neither sizes nor ranges would fit.
    headers = build_hf_headers(library_name="suri") | {"Accept-Encoding": "identity"}
    bar: Any = meter.bar  # the library wants the class of a tqdm; it takes whatever acts like one
    url = hf_hub_url(model.repo, name, revision=state.commit, endpoint=endpoint)
    with open(part, "ab") as out:
        if out.tell() > file.size:
            out.truncate(0)
        for retries_left in (2, 1, 0):
            arrived = out.tell()
            meter.start_file(arrived)
            try:
                # The library goes on by itself after most kinds of interruption, but not after a reset connection.
                http_get(url, out, resume_size=arrived, headers=headers, expected_size=file.size, tqdm_class=bar)
                break
            except ReadError:
                if not retries_left:
                    raise
        out.flush()
        os.fsync(out.fileno())
    meter.end_file(file.size)
    if not _is_right(part, file, meter.progress):
        part.unlink()
        raise DownloadError(f"{name} of {model.repo} arrived damaged; start again to download it again")
    os.replace(part, path)
    for old in path.parent.glob(f"{_escaped(path.name)}.*.part"):
        old.unlink(missing_ok=True)


def _part(path: Path, file: HubFile) -> Path:
    """Named by content, so that pieces of two states of a repository never meet."""
    return path.with_name(f"{path.name}.{file.digest[:12] or file.size}.part")


def _escaped(name: str) -> str:
    return re.sub(r"([\[\]*?])", r"[\1]", name)


def _refuse_when_too_big(model: HubModel, target: Path, missing: list[tuple[HubFile, Path]]) -> None:
    need = sum(file.size - (part.stat().st_size if part.is_file() else 0) for file, part in missing)
    free = shutil.disk_usage(target).free
    if need > free:
        raise DownloadError(
            f"{model.repo} needs {need / 1e9:.1f} GB more in {target}, but only {free / 1e9:.1f} GB are free there"
        )


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _is_right(path: Path, file: HubFile, progress: Progress) -> bool:
    """Size and hash are those the hub gave."""
    if not _has_size(path, file.size):
        return False
    if not file.digest:
        return True
    git = len(file.digest) == 40
    digest = hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False) if git else hashlib.sha256()
    done = 0
    with open(path, "rb") as source:
        while piece := source.read(1 << 20):
            digest.update(piece)
            done += len(piece)
            progress(LoadProgress(f"Checking {path.name.split('.part')[0]}", done, file.size))
    return digest.hexdigest() == file.digest


class _Meter:
    """Adds up the bytes of all files for one progress bar."""

    def __init__(self, progress: Progress, stage: str, total: int) -> None:
        self.progress, self._stage, self._total = progress, stage, total
        self._files, self._here = 0, 0  # bytes of whole files, and of the one that is on its way

    def start_file(self, arrived: int) -> None:
        self._here = arrived
        self.progress(LoadProgress(self._stage, self._files + self._here, self._total))

    def add(self, count: int) -> None:
        self.start_file(self._here + count)

    def end_file(self, size: int) -> None:
        self._files += size
        self.start_file(0)

    def bar(self, *_: object, initial: int = 0, **__: object) -> _Bar:
        """The library's progress bar; `initial`: bytes that were there, 0 when the server starts from the beginning."""
        self.start_file(initial)
        return _Bar(self)


class _Bar:
    """As much of a tqdm as the library uses."""

    def __init__(self, meter: _Meter) -> None:
        self._meter = meter

    def update(self, count: int) -> None:
        self._meter.add(count)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        """Nothing to close."""


# state --------------------------------------------------------------------------------------------------------------


def _read_state(path: Path) -> _State | None:
    """None when there is none, or none that can be used: then the hub is asked again."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(MAX_STATE_BYTES)
        found: Any = json.loads(text)
        files = {str(name): _hub_file(entry) for name, entry in found["files"].items() if is_safe(str(name))}
        return _State(str(found["commit"]), files, {name for name in files if name in found["done"]})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _hub_file(entry: Mapping[str, Any]) -> HubFile:
    return HubFile(int(entry["size"]), str(entry["digest"]))


def _write_state(path: Path, state: _State) -> None:
    text = json.dumps(
        {
            "commit": state.commit,
            "done": sorted(state.done),
            "files": {name: asdict(file) for name, file in state.files.items()},
        },
        indent=1,
    )
    scratch = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, path)


@contextmanager
def _alone(target: Path, model: HubModel, progress: Progress) -> Iterator[None]:
    """One process at a time writes into a repository's folder."""
    from filelock import FileLock, Timeout

    lock = FileLock(target / ".hub.lock")
    while True:
        try:
            lock.acquire(timeout=0.2)
            break
        except Timeout:
            progress(LoadProgress(f"Waiting for another program that downloads {model.repo}"))
    try:
        yield
    finally:
        lock.release()


# errors -------------------------------------------------------------------------------------------------------------


@contextmanager
def _explained(model: HubModel, endpoint: str, target: Path) -> Iterator[None]:
    """Whatever goes wrong on the way becomes one sentence that says what to do."""
    try:
        yield
    except DownloadError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DownloadError(_sentence(error, model, endpoint, target)) from None
    except Exception as error:
        if type(error).__module__.split(".")[0] in ("huggingface_hub", "httpx2", "httpcore2", "filelock"):
            raise DownloadError(_sentence(error, model, endpoint, target)) from None
        raise


def _sentence(error: Exception, model: HubModel, endpoint: str, target: Path) -> str:
    from huggingface_hub import errors

    said = " ".join(str(error).split())[:200]
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else 0
    if isinstance(error, errors.GatedRepoError) or status == 403:
        return (
            f"{model.repo} is open only to people who accepted its licence: do so on {endpoint}/{model.repo}, then set "
            "HF_TOKEN to a token of that account and start again"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{model.repo} has no revision '{model.revision or 'main'}' on {endpoint}"
    if isinstance(error, errors.RepositoryNotFoundError) or status == 401:
        return (
            f"there is no model {model.repo} on {endpoint}, or it is private; check the name, and for a private one "
            "set HF_TOKEN"
        )
    if isinstance(error, errors.EntryNotFoundError):
        return f"a file of {model.repo} is listed by {endpoint} but cannot be fetched ({said})"
    if status == 429:
        return (
            f"{endpoint} refuses more requests for now; wait some minutes and start again, it goes on where it stopped"
        )
    if status:
        return (
            f"{endpoint} answered with error {status} for {model.repo}; start again later, it goes on where it stopped"
        )
    if isinstance(error, OSError) and error.errno is not None and isinstance(error.filename, str | Path):
        return f"{model.repo} cannot be kept in {target}: {error.strerror or said}"
    if isinstance(error, OSError) and error.errno in (28, 122):  # no space, quota
        return f"{model.repo} cannot be kept in {target}: the disk is full; make room and start again"
    return (
        f"{model} could not be fetched from {endpoint} ({said or type(error).__name__}); check the network and start "
        "again, it goes on where it stopped, or give a local file as the model"
    )
