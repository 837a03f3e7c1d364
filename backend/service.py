"""The one door: what the page, the API and the commands may ask for. Everything else is behind it.

Thread-safe. Loading happens beside what is loaded, and the switch is one assignment: whatever goes wrong on the way,
the earlier model still answers.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import psutil

from backend.checkpoint.lora import parse_adapter
from backend.checkpoint.open import open_checkpoint
from backend.checkpoint.override import with_overrides
from backend.errors import BusyError, EngineError, NotReadyError, UserError
from backend.events import LoadProgress, PresetInfo, Status
from backend.generation import Generation
from backend.models import ModelFolder
from backend.params import GenerationParams
from backend.placement.plan import plan
from backend.presets import Preset, PresetFolder
from backend.runtime import Prepared, Runtime
from backend.settings import PROJECT, Settings
from backend.store.sampling_sets import SamplingSets
from backend.text.messages import Message

Progress = Callable[[LoadProgress], None]

log = logging.getLogger(__name__)


class Service:
    """Presets, one loaded model, and replies from it."""

    def __init__(self, settings: Settings, models: ModelFolder | None = None) -> None:
        self.settings = settings
        self._presets = PresetFolder(settings.presets_dir)
        self._models = models or ModelFolder(settings.models_dir)
        self._sets = SamplingSets(settings.data_dir / "sampling_sets.json")
        self._switching = threading.Lock()  # held by whoever loads
        self._runtime: Runtime | None = None
        self._loading: LoadProgress | None = None
        self._loading_preset: str | None = None
        self._load_error: str | None = None
        self._closed = False
        self._needs: dict[tuple[object, ...], str] = {}
        self._process = psutil.Process()

    # presets and loading ----------------------------------------------------------------------------------------------

    def presets(self) -> list[PresetInfo]:
        """Every preset of the folder; one that cannot be read is a row that says why."""
        loaded = self._runtime.preset.name if self._runtime else None
        rows = []
        for name in self._presets.names():
            try:
                preset = self._presets.read(name)
                row = PresetInfo(name, preset.title or name, preset.model, self._needs_of(preset), name == loaded)
            except UserError as error:
                row = PresetInfo(name, name, "", "", name == loaded, error.message)
            rows.append(row)
        return rows

    def load(self, name: str, progress: Progress | None = None) -> None:
        """Load a preset by name and switch to it. Blocks; on any failure what was loaded goes on answering."""
        self._switch(name, lambda report: self.prepare(self._presets.read(name), report), progress)

    def load_preset(self, preset: Preset, progress: Progress | None = None) -> None:
        """The same for a preset that is not in the folder (a file or --model on the command line)."""
        self._switch(preset.name, lambda report: self.prepare(preset, report), progress)

    def load_prepared(self, prepared: Prepared, progress: Progress | None = None) -> None:
        """The same, when the first half is done already."""
        self._switch(prepared.preset.name, lambda _: prepared, progress)

    def prepare(self, preset: Preset, progress: Progress = lambda _: None) -> Prepared:
        """Find (or fetch) the model and check its headers: everything that can go wrong before loading."""
        adapters = [parse_adapter(entry) for entry in preset.lora]
        return Prepared(
            preset,
            self._models.resolve(preset.model, PROJECT, progress),
            [(self._models.resolve(place, PROJECT, progress), strength) for place, strength in adapters],
        )

    def read_preset(self, name_or_file: str) -> Preset:
        """A preset by name, or from a file when the argument is a path."""
        path = Path(name_or_file)
        if path.suffix in (".yaml", ".yml") or path.parent != Path("."):
            return self._presets.read_file(path)
        return self._presets.read(name_or_file)

    def status(self) -> Status:
        """What is loaded, what is on its way, and what it takes."""
        runtime, loading = self._runtime, self._loading
        status = Status(
            state="empty",
            process_bytes=self._process.memory_info().rss,
            loading=loading,
            loading_preset=self._loading_preset,
            error=self._load_error,
        )
        if self._closed:
            return replace(status, state="stopped")
        if runtime is None:
            return replace(status, state="loading" if loading else "failed" if self._load_error else "empty")
        return replace(
            status,
            state="ready",
            preset=runtime.preset.name,
            title=runtime.preset.title or runtime.preset.name,
            model=runtime.name,
            context=runtime.plan.context,
            weight_bytes=runtime.weight_bytes,
            kv_bytes=runtime.kv_bytes,
            running=runtime.worker.running,
            waiting=runtime.worker.waiting,
        )

    # replies ----------------------------------------------------------------------------------------------------------

    def chat(self, messages: Sequence[Message], params: GenerationParams) -> Generation:
        """Answer a chat. Raises UserError before anything runs when it cannot be answered."""
        runtime = self.runtime()
        return runtime.start_chat(messages, params)

    def complete(self, prompt: str | Sequence[int], params: GenerationParams) -> Generation:
        """Continue raw text, or token ids as they are."""
        runtime = self.runtime()
        return runtime.start(runtime.prompting.encode_text(prompt) if isinstance(prompt, str) else prompt, params)

    def count_chat(self, messages: Sequence[Message]) -> int:
        """Tokens of a chat's prompt as the model would read it, without the opening of a reply."""
        return len(self.runtime().prompting.encode_chat(messages, generation_prompt=False)) if messages else 0

    def count_text(self, text: str) -> int:
        return len(self.runtime().prompting.encode_text(text)) if text else 0

    def default_params(self) -> GenerationParams:
        """The loaded preset's sampling, or the general defaults."""
        return self._runtime.preset.sampling if self._runtime else GenerationParams()

    def runtime(self) -> Runtime:
        """What answers now, for commands that measure it. Raises when nothing is loaded."""
        runtime = self._runtime
        if runtime is None:
            raise NotReadyError("no model is loaded yet" if self._loading else "no model is loaded")
        return runtime

    # sampling sets ----------------------------------------------------------------------------------------------------

    def sampling_sets(self) -> dict[str, GenerationParams]:
        return self._sets.all()

    def save_sampling_set(self, name: str, params: GenerationParams) -> None:
        self._sets.save(name, params)

    def delete_sampling_set(self, name: str) -> None:
        self._sets.delete(name)

    # ends -------------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Stop all replies and let the model go."""
        self._closed = True
        runtime, self._runtime = self._runtime, None
        if runtime:
            runtime.close(drain=False)

    def _switch(self, name: str, prepare: Callable[[Progress], Prepared], progress: Progress | None) -> None:
        if not self._switching.acquire(blocking=False):
            raise BusyError(f"'{self._loading_preset}' is being loaded; try again when it is done")
        try:
            self._load_error, self._loading_preset = None, name
            self._report(LoadProgress(f"Opening {name}"), progress)
            prepared = prepare(lambda step: self._report(step, progress))
            runtime = Runtime(prepared, self.settings.max_waiting, lambda step: self._report(step, progress))
            before, self._runtime = self._runtime, runtime
            if before is not None:
                # Replies that are being written are finished by the model that began them.
                threading.Thread(target=before.close, kwargs={"drain": True}, name="drain", daemon=True).start()
        except UserError as error:
            self._load_error = error.message
            raise
        except Exception as error:  # also torch's failed allocations, which are plain RuntimeErrors
            log.exception("loading %s failed", name)
            self._load_error = f"preset {name} could not be loaded: {type(error).__name__}: {error}"
            raise EngineError(self._load_error) from error
        finally:
            self._loading = self._loading_preset = None
            self._switching.release()

    def _report(self, step: LoadProgress, progress: Progress | None) -> None:
        self._loading = step
        if progress:
            progress(step)

    def _needs_of(self, preset: Preset) -> str:
        """What a preset takes, in words. Headers are read once per file."""
        try:
            path = self._models.local(preset.model, PROJECT)
            if path is None:
                return "its model is fetched first"
            stat = path.stat()
        except OSError as error:
            raise UserError(f"{preset.model}: {error.strerror or error}") from None
        key = (preset, str(path), stat.st_mtime_ns, stat.st_size)
        if key not in self._needs:
            checkpoint = with_overrides(open_checkpoint(path), dict(preset.overrides))
            size = plan(preset, checkpoint.config, checkpoint.tensors)
            self._needs[key] = f"about {max(0.1, size.total_bytes / 1e9):.1f} GB of memory"
        return self._needs[key]
