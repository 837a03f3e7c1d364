"""What was measured on which machine: speeds, memory and quality of presets, in one small JSON file.

`bench` and `perplexity` write, the Presets tab shows. A measurement belongs to what was run (the preset's name, and a
fingerprint of its keys and of the model's files), where (the machine) and with which version of the libraries: whatever
of these changes begins a new entry, so a number is never shown for something else.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import os
import platform
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from backend.store.files import replace_text

MAX_ENTRIES = 1000  # the oldest go first
SAMPLE = 1 << 16  # bytes of the beginning and of the end of a file that its fingerprint covers


@dataclass(frozen=True)
class Run:
    """What a measurement is of."""

    preset: str
    fingerprint: str  # of the preset's keys and the model's files
    machine: str
    version: str


@dataclass(frozen=True)
class Measurement:
    """None: not measured. Speeds in tokens per second, sizes in bytes, KL divergence in nats per token."""

    run: Run
    date: str = ""  # of the latest number, ISO 8601
    model: str = ""
    tokens_per_second: float | None = None
    prefill_tokens_per_second: float | None = None
    time_to_first_token_s: float | None = None
    peak_ram_bytes: int | None = None
    peak_vram_bytes: int | None = None
    perplexity: float | None = None
    text: str | None = None  # the text that perplexity, kl and top1_agreement are of
    reference: str | None = None  # the preset that kl and top1_agreement compare with
    kl: float | None = None
    top1_agreement: float | None = None


_VALUES = {field.name: field for field in dataclasses.fields(Measurement) if field.name != "run"}
_TEXTS = ("date", "model", "text", "reference")


class Measurements:
    """The file; always replaced whole. A file that cannot be read counts as empty: everything in it can be measured
    again, and a page that shows presets must not fail for it."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()

    def all(self) -> list[Measurement]:
        """Oldest first."""
        with self._lock:
            return self._read()

    def latest(self, machine: str) -> dict[str, Measurement]:
        """preset -> its newest measurement on this machine, whatever its files and version."""
        return {entry.run.preset: entry for entry in self.all() if entry.run.machine == machine}

    def of(self, run: Run) -> Measurement | None:
        """What is known of exactly this."""
        return next((entry for entry in self.all() if entry.run == run), None)

    def record(self, run: Run, **values: Any) -> Measurement:
        """Add numbers to what is known of `run`; those not given stay. Raises UserError when it cannot be written."""
        with self._lock:
            entries = self._read()
            known = next((entry for entry in entries if entry.run == run), Measurement(run))
            today = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
            entry = dataclasses.replace(known, **(values | {"date": today}))
            rest = [other for other in entries if other.run != run]
            self._write([*rest, entry][-MAX_ENTRIES:])
        return entry

    def _read(self) -> list[Measurement]:
        try:
            stored = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return []
        if not isinstance(stored, list):
            return []
        return [entry for entry in map(_entry, stored) if entry is not None]

    def _write(self, entries: Iterable[Measurement]) -> None:
        text = json.dumps([_stored(entry) for entry in entries], indent=1)
        replace_text(self._path, text)


def fingerprint(keys: Mapping[str, object], files: Iterable[Path]) -> str:
    """16 hexadecimal digits of a preset's keys and of its model's files: names, sizes, and the bytes at their ends."""
    digest = hashlib.sha256(repr(sorted(keys.items())).encode())
    for path in files:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(f"{path.name} {size}".encode() + file.read(SAMPLE))
            file.seek(max(0, size - SAMPLE))
            digest.update(file.read(SAMPLE))
    return digest.hexdigest()[:16]


def this_machine() -> str:
    """The processor, its cores and the memory, as measurements are filed under them."""
    memory = psutil.virtual_memory().total / (1 << 30)
    return f"{processor()}, {psutil.cpu_count(logical=False) or os.cpu_count()} cores, {memory:.0f} GiB"


def processor() -> str:
    """The processor's name as the system knows it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _stored(entry: Measurement) -> dict[str, Any]:
    values = {name: getattr(entry, name) for name in _VALUES}
    return dataclasses.asdict(entry.run) | {name: value for name, value in values.items() if value is not None}


def _entry(stored: Any) -> Measurement | None:
    """One entry of the file; None when it is not one, e.g. written by a version to come."""
    if not isinstance(stored, dict):
        return None
    run = {field.name: stored.get(field.name) for field in dataclasses.fields(Run)}
    if not all(isinstance(value, str) for value in run.values()):
        return None
    values = {name: stored[name] for name in _VALUES if name in stored}
    for name, value in values.items():
        fits = isinstance(value, str) if name in _TEXTS else isinstance(value, int | float)
        if not fits or isinstance(value, bool):
            return None
    return Measurement(Run(**run), **values)  # type: ignore[arg-type]
