"""Every preset of the folder, with what it would take here and what it did here: the rows to choose from."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import replace

from backend.errors import UserError
from backend.events import Measured, PresetInfo
from backend.headers import Headers, read_headers
from backend.models import ModelFolder
from backend.placement.machine import Machine
from backend.placement.plan import Plan, nearest_that_fits, plan, with_draft, without
from backend.presets import DraftPreset, Preset, PresetFolder
from backend.room import Held, fits
from backend.settings import PROJECT
from backend.units import show_bytes

ROUNDED = 32  # parts of a memory: a change of less than one is no reason to plan anew
KEPT = 1000  # plans


class Catalog:
    """Thread-safe. Headers are read once for each file; presets and the machine are looked at anew each time."""

    def __init__(
        self, presets: PresetFolder, models: ModelFolder, measured: Callable[[], Mapping[str, Measured]] = dict
    ) -> None:
        """`measured`: what is known from earlier runs here, by preset."""
        self._presets, self._models, self._measured = presets, models, measured
        self._headers: dict[tuple[object, ...], Headers] = {}
        self._plans: dict[tuple[object, ...], Plan] = {}
        self._lock = threading.Lock()

    def rows(self, machine: Machine, held: Held, loaded: str | None) -> list[PresetInfo]:
        """In the folder's order. `held`: what the loaded model would give back. One that cannot be read says why."""
        measured = self._measured()
        rows = (self._row(name, machine, held) for name in self._presets.names())
        return [replace(row, loaded=row.name == loaded, measured=measured.get(row.name)) for row in rows]

    def suggest(self, wanted: Plan, machine: Machine) -> str | None:
        """The preset nearest to `wanted` that fits into this machine and whose model is here; None: nothing does."""
        plans = []
        for name in self._presets.names():
            try:
                made, headers = self._planned(self._presets.read(name), machine)
            except UserError:
                continue
            if not headers.note:
                plans.append(made)
        near = nearest_that_fits(wanted, plans)
        return near.preset if near else None

    def _row(self, name: str, machine: Machine, held: Held) -> PresetInfo:
        title, model = name, ""
        try:
            preset = self._presets.read(name)
            title, model = preset.title or name, preset.model
            made, headers = self._planned(preset, held.given_back(machine))
        except UserError as error:
            return PresetInfo(name, title, model, "", error=error.message)
        ram = made.extra_ram_bytes
        on_gpu = f" and {show_bytes(made.vram_bytes)} of GPU memory" if made.vram_bytes else ""
        return PresetInfo(
            name,
            title,
            model,
            f"about {show_bytes(ram)} of memory{on_gpu}",
            note=headers.note,
            fits=fits(made, machine),
            why_not=made.reason,
            ram_bytes=ram,
            vram_bytes=made.vram_bytes,
            tokens_per_second=made.tokens_per_second,
            bound_by=made.bound_by,
        )

    def _planned(self, preset: Preset, machine: Machine) -> tuple[Plan, Headers]:
        """Plans are kept for a while, because those of large models take a moment: so free memory is rounded down."""
        headers = self._headers_of(preset)
        machine = _rounded(machine)
        measured = machine.rates.bandwidth  # 0 until the speeds are there
        key = (preset, id(headers), machine.ram_free, tuple(gpu.free for gpu in machine.gpus), measured)
        found = self._plans.get(key)
        if found is None:
            if len(self._plans) >= KEPT:
                self._plans.clear()
            draft = preset.speculation
            if isinstance(draft, DraftPreset):
                beside, _ = self._planned(self._presets.read(draft.name), machine)
                own = plan(preset, headers.config, headers.tensors, without(machine, beside))
                found = with_draft(own, beside)
            else:
                found = plan(preset, headers.config, headers.tensors, machine)
            self._plans[key] = found
        return found, headers

    def _headers_of(self, preset: Preset) -> Headers:
        try:
            path = self._models.local(preset.model, PROJECT)
            stat = path.stat() if path else None
        except (OSError, UserError):  # not here, or not a file: what is known of it depends on its name alone
            path = stat = None
        if path is None or stat is None:
            return self._kept_headers((preset.model,), preset)
        return self._kept_headers((str(path), preset.overrides, stat.st_mtime_ns, stat.st_size), preset)

    def _kept_headers(self, key: tuple[object, ...], preset: Preset) -> Headers:
        with self._lock:
            if key not in self._headers:
                self._headers[key] = read_headers(preset, self._models, PROJECT)
            return self._headers[key]


def _rounded(machine: Machine) -> Machine:
    gpus = tuple(replace(gpu, free=_down(gpu.free, gpu.total)) for gpu in machine.gpus)
    return replace(machine, ram_free=_down(machine.ram_free, machine.ram_total), gpus=gpus)


def _down(free: int, total: int) -> int:
    step = max(1, total // ROUNDED)
    return free // step * step
