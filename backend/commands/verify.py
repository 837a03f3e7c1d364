"""python -m backend verify PATH: is a model whole and undamaged? Check sums where there are some, structure always."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from backend.checkpoint.base import Checkpoint
from backend.checkpoint.hf_files import weight_files
from backend.checkpoint.open import open_checkpoint
from backend.checkpoint.safetensors import read_safetensors
from backend.checkpoint.strictjson import read_json
from backend.commands.terminal import ProgressBar
from backend.convert.rows import magnitude, pieces
from backend.errors import CheckpointError, UserError
from backend.events import LoadProgress
from backend.tokenizer.open import open_tokenizer

HELP = "check a model's files: check sums, structure, and with --deep every number"
_LISTS = re.compile(r".*checklist\.chk|(sha256|md5|sha1)sums?(\.txt)?|.*\.(sha256|sha256sum|md5|sha1)", re.I)
_LINE = re.compile(r"\\?([0-9a-fA-F]{32,64})(?:\s+\*?(\S.*))?")
_BSD_LINE = re.compile(r"(?:MD5|SHA1|SHA256) \((.+)\) = ([0-9a-fA-F]{32,64})")
_ALGORITHMS = {32: "md5", 40: "sha1", 64: "sha256"}  # by the number of digits
_MAX_LIST = 1 << 22  # bytes
_PIECE = 1 << 22
Progress = Callable[[LoadProgress], None]


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. `message`: what is wrong, or what was found."""

    name: str
    ok: bool
    message: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, help="a model file or folder")
    parser.add_argument("--deep", action="store_true", help="decode every tensor and look for numbers that are none")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")


def run(arguments: argparse.Namespace) -> int:
    path: Path = arguments.path
    if not path.exists():
        raise CheckpointError(f"{path}: there is no such file or folder")
    checks: list[Check] = []
    bar = ProgressBar()
    try:
        for check in verify(path, arguments.deep, bar):
            checks.append(check)
            if not arguments.json:
                bar.close()
                print(f"{check.name}: {'OK' if check.ok else 'FAILED'} ({check.message})", flush=True)
    finally:
        bar.close()
    ok = all(check.ok for check in checks)
    if arguments.json:
        document = {"path": str(path), "ok": ok, "checks": [asdict(check) for check in checks]}
        json.dump(document, sys.stdout, indent=2, ensure_ascii=False)
        print()
    return 0 if ok else 1


def verify(path: Path, deep: bool, progress: Progress) -> Iterator[Check]:
    """All checks, one after the other."""
    yield from check_sums(path, progress)
    index = (path if path.is_dir() else path.parent) / "model.safetensors.index.json"
    if path.is_dir() and index.is_file() and not (path / "model.safetensors").is_file():
        yield _guarded(index.name, lambda: _index(path, index))
    found: list[Checkpoint] = []
    yield _guarded(path.name, lambda: _structure(path, found))
    if not found:
        return
    source = found[0]
    yield _guarded("tokenizer", lambda: _tokenizer(source))
    if deep:
        yield from _numbers(source, progress)


def check_sums(path: Path, progress: Progress) -> Iterator[Check]:
    """Every file that a list of check sums beside it names; for a single file, only that file."""
    folder = path if path.is_dir() else path.absolute().parent
    lists = sorted(file for file in folder.iterdir() if _LISTS.fullmatch(file.name) and file.is_file())
    for file in lists:
        try:
            entries = _entries(file)
        except UserError as error:
            yield Check(file.name, False, error.message)
            continue
        for name, digest in entries:
            target = folder / name
            if not path.is_dir() and target.resolve() != path.resolve():
                continue
            if folder.resolve() not in target.resolve().parents:
                yield Check(name, False, f"{file.name} names a file outside its folder")
            elif not target.is_file():
                yield Check(name, False, f"{file.name} names it, but it is missing")
            else:
                yield _guarded(name, lambda t=target, d=digest, f=file: _digest(t, d, f, progress))  # type: ignore[misc]


def _entries(file: Path) -> list[tuple[str, str]]:
    """(name, digest in lower case) of each line."""
    size = file.stat().st_size
    if size > _MAX_LIST:
        raise CheckpointError(f"{file}: {size} bytes are too many for a list of check sums")
    found: list[tuple[str, str]] = []
    for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        if bsd := _BSD_LINE.fullmatch(line):
            name, digest = bsd[1], bsd[2]
        elif plain := _LINE.fullmatch(line):
            name, digest = plain[2] or file.stem, plain[1]
        else:
            raise CheckpointError(f"{file}: line {number} is no check sum and file name")
        if len(digest) not in _ALGORITHMS or "\0" in name:
            raise CheckpointError(f"{file}: line {number} has {len(digest)} digits, expected 32, 40 or 64")
        found.append((name, digest.lower()))
    return found


def _digest(target: Path, expected: str, listed_in: Path, progress: Progress) -> str:
    algorithm = _ALGORITHMS[len(expected)]
    state = hashlib.new(algorithm, usedforsecurity=False)
    total, done = target.stat().st_size, 0
    with open(target, "rb") as file:
        while piece := file.read(_PIECE):
            state.update(piece)
            done += len(piece)
            progress(LoadProgress(f"Reading {target.name}", done, total))
    if state.hexdigest() != expected:
        raise CheckpointError(f"its {algorithm} is {state.hexdigest()}, but {listed_in.name} says {expected}")
    return f"{algorithm} as in {listed_in.name}"


def _index(folder: Path, index: Path) -> str:
    """All shards are there, each tensor is where the index says, and the sizes add up."""
    files, weight_map = weight_files(folder)
    total = 0
    for file in files:
        tensors = read_safetensors(file)
        total += sum(tensor.nbytes for tensor in tensors.values())
        for name, home in (weight_map or {}).items():
            if (name in tensors) != (home == file.name):
                raise CheckpointError(f"tensor '{name}' should be in {home}, {file.name} has it or misses it")
    metadata = read_json(index).get("metadata")
    said = metadata.get("total_size") if isinstance(metadata, dict) else None
    if said is not None and said != total:
        raise CheckpointError(f"the index says {said} bytes of tensors, the files hold {total}")
    return f"{len(files)} shards, {total:,} bytes of tensors"


def _structure(path: Path, found: list[Checkpoint]) -> str:
    source = open_checkpoint(path)
    for name, info in source.tensors.items():
        stored = source.read(name)
        if tuple(stored.shape) != tuple(info.shape):
            raise CheckpointError(f"tensor '{name}' has shape {stored.shape}, its header says {info.shape}")
        stored.release()
    found.append(source)
    return f"{source.format}, {len(source.tensors)} tensors"


def _tokenizer(source: Checkpoint) -> str:
    tokenizer = open_tokenizer(source.tokenizer, source.config.vocab_size)
    return f"{tokenizer.vocab_size:,} tokens for {source.config.vocab_size:,} rows"


def _numbers(source: Checkpoint, progress: Progress) -> Iterator[Check]:
    """One line for each tensor with a number that is none, or one line for all."""
    total, done, bad = sum(info.elements for info in source.tensors.values()), 0, 0
    for name, info in source.tensors.items():
        wrong = 0
        stored = source.read(name)
        for start, stop in pieces(tuple(info.shape)):
            values = stored.float32(start, stop) if len(info.shape) > 1 else stored.float32()
            if not math.isfinite(magnitude(values)):
                wrong += values.numel() - int(torch.isfinite(values).sum())
            done += values.numel()
            stored.release()
            progress(LoadProgress("Decoding all tensors", done, total, "values"))
        if wrong:
            bad += 1
            yield Check(name, False, f"tensor '{info.name}' has {wrong:,} values that are not finite numbers")
    if not bad:
        yield Check("numbers", True, f"{total:,} values of {len(source.tensors)} tensors are finite")


def _guarded(name: str, check: Callable[[], str]) -> Check:
    try:
        return Check(name, True, check())
    except UserError as error:
        return Check(name, False, error.message)
    except OSError as error:
        return Check(name, False, f"cannot be read ({error.strerror or error})")
