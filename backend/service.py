"""The one door: what the page, the API and the commands may ask for. Everything else is behind it. Thread-safe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import psutil

from backend.catalog import Catalog
from backend.checkpoint.lora import parse_adapter
from backend.errors import UserError
from backend.events import LoadProgress, Measured, PresetInfo, Status
from backend.generation import Generation
from backend.metrics import Distribution, Family, Records
from backend.models import ModelFolder
from backend.params import GenerationParams
from backend.placement.machine import Machine
from backend.presets import DraftPreset, Preset, PresetFolder
from backend.room import Held
from backend.runtime import Prepared, Runtime
from backend.settings import PROJECT, Settings
from backend.speeds import Speeds
from backend.store.caches import CacheFolder
from backend.store.measurements import Measurements
from backend.store.measurements import this_machine as measured_here
from backend.store.sampling_sets import SamplingSets
from backend.switch import Switch
from backend.text.messages import Message
from backend.waiting import Ask

Progress = Callable[[LoadProgress], None]


class Service:
    """Presets, one loaded model, and replies from it."""

    def __init__(
        self, settings: Settings, models: ModelFolder | None = None, machine: Callable[[], Machine] | None = None
    ) -> None:
        """`machine`: what is planned for, as it is now; by default the one this runs on."""
        self.settings = settings
        self._speeds = Speeds(self._is_busy)
        self._machine = machine or self._speeds.now
        self._presets = PresetFolder(settings.presets_dir)
        self._models = models or ModelFolder(settings.models_dir)
        self._catalog = Catalog(self._presets, self._models, self.measurements)
        self._measured = Measurements(settings.data_dir / "measurements.json")
        self._sets = SamplingSets(settings.data_dir / "sampling_sets.json")
        self._records = Records()
        self._switch = Switch(
            settings.max_waiting,
            settings.drain_seconds,
            machine or self._speeds.for_a_load,
            self._catalog.suggest,
            self._records,
            CacheFolder(settings.data_dir / "cache", settings.cache_disk) if settings.cache_disk else None,
        )
        self._process = psutil.Process()

    # presets and loading ----------------------------------------------------------------------------------------------

    def presets(self) -> list[PresetInfo]:
        """Every preset of the folder; one that cannot be read is a row that says why.

        Answers at once: the first time on a machine, predicted speeds are None until they are measured.
        """
        runtime = self._switch.runtime
        held = runtime.held() if runtime else Held()
        return self._catalog.rows(self._machine(), held, runtime.preset.name if runtime else None)

    def measure_speeds(self) -> None:
        """Begin to measure how fast this machine is, in the background; the first listing of presets does it too."""
        self._speeds.start()

    def measurements(self) -> dict[str, Measured]:
        """What presets did on this machine when `bench` and `perplexity` ran, by name; the latest of each."""
        entries = self._measured.latest(measured_here())
        return {
            name: Measured(
                tokens_per_second=entry.tokens_per_second,
                peak_ram_bytes=entry.peak_ram_bytes or 0,
                peak_vram_bytes=entry.peak_vram_bytes or 0,
                perplexity=entry.perplexity,
                kl=entry.kl,
            )
            for name, entry in entries.items()
        }

    def load(self, name: str, progress: Progress | None = None, *, wait: bool = True) -> None:
        """Load a preset by name and switch to it. Blocks; on any failure what answered before answers again.

        While another preset is being loaded it waits for its turn; with `wait` False it raises BusyError instead.
        """
        self._switch.load(name, lambda report: self._unless_loaded(self._presets.read(name), report), progress, wait)

    def load_preset(self, preset: Preset, progress: Progress | None = None) -> None:
        """The same for a preset that is not in the folder (a file or --model on the command line)."""
        self._switch.load(preset.name, lambda report: self._unless_loaded(preset, report), progress)

    def load_prepared(self, prepared: Prepared, progress: Progress | None = None) -> None:
        """The same, when the first half is done already."""
        self._switch.load(prepared.preset.name, lambda _: prepared, progress)

    def cancel_load(self, name: str | None = None) -> bool:
        """Cancel the load that is being carried out, or those of the preset `name`. False: there is none."""
        return self._switch.cancel(name)

    def prepare(self, preset: Preset, progress: Progress = lambda _: None) -> Prepared:
        """Find (or fetch) the model and check its headers: everything that can go wrong before loading."""
        adapters = [parse_adapter(entry) for entry in preset.lora]
        draft = preset.speculation
        return Prepared(
            preset,
            self._models.resolve(preset.model, PROJECT, progress),
            [(self._models.resolve(place, PROJECT, progress), strength) for place, strength in adapters],
            self.prepare(self._presets.read(draft.name), progress) if isinstance(draft, DraftPreset) else None,
        )

    def read_preset(self, name_or_file: str) -> Preset:
        """A preset by name, or from a file when the argument is a path."""
        path = Path(name_or_file)
        if path.suffix in (".yaml", ".yml") or path.parent != Path("."):
            return self._presets.read_file(path)
        return self._presets.read(name_or_file)

    def status(self) -> Status:
        """What is loaded, what is on its way, what it takes and what is left."""
        switch, names = self._switch, self._switch.names
        runtime = switch.runtime
        loading = switch.loading
        if switch.closed:
            holder = replace(runtime.status(), state="stopped") if runtime else Status("stopped")
        elif runtime is not None:
            holder = runtime.status()
        else:
            holder = Status("loading" if loading else "failed" if switch.error else "empty")
        return replace(
            holder,
            process_bytes=self._process.memory_info().rss,
            waiting=holder.waiting + switch.waiting,
            loading=loading,
            loading_preset=names[0] if names else None,
            next_presets=names[1:],
            error=switch.error,
        )

    # replies ----------------------------------------------------------------------------------------------------------

    def chat(
        self,
        messages: Sequence[Message],
        params: GenerationParams,
        *,
        top_logprobs: int | None = None,
        trim: bool = False,
        score_prompt: bool = False,
        person: str = "",
    ) -> Generation:
        """Answer a chat. Raises UserError before anything runs when it cannot be answered.

        While one model makes room for another, the reply waits for the next one, and is tokenised for it.
        `top_logprobs`: with it, log probabilities come too, and those of this many likeliest tokens at each place.
        `trim`: a chat that has outgrown the context is read without its oldest turns; `left_out` of the reply says so.
        `score_prompt`: log probabilities of the prompt, too. `person`: who asks, of `persons`; people share the engine
        evenly, however much each of them asks.
        """

        def ask(runtime: Runtime, generation: Generation | None = None) -> Generation:
            return runtime.start_chat(
                messages, params, generation=generation, top_logprobs=top_logprobs, trim=trim,
                score_prompt=score_prompt, person=person,
            )  # fmt: skip

        return self._start(ask)

    def complete(
        self,
        prompt: str | Sequence[int],
        params: GenerationParams,
        *,
        top_logprobs: int | None = None,
        score_prompt: bool = False,
        only_prompt: bool = False,
        person: str = "",
    ) -> Generation:
        """Continue raw text, or token ids as they are; `only_prompt`: only read it. Waits like `chat`."""

        def ask(runtime: Runtime, generation: Generation | None = None) -> Generation:
            return runtime.start_text(
                prompt, params, generation=generation, top_logprobs=top_logprobs, score_prompt=score_prompt,
                only_prompt=only_prompt, person=person,
            )  # fmt: skip

        return self._start(ask)

    def count_chat(self, messages: Sequence[Message], person: str = "") -> int:
        """Tokens of a chat's prompt as the model would read it, without the opening of a reply."""
        return len(self.runtime().encode_chat(messages, person=person, generation_prompt=False)) if messages else 0

    def save_cache(self, path: Path, messages: Sequence[Message], person: str = "") -> int:
        """Write what the model has read and said of a chat to a file beside it, so that it need not be read again after
        a restart. Returns tokens; 0: nothing is cached, and no file is written. Raises UserError."""
        runtime = self.runtime()
        return runtime.save_cache(path, runtime.encode_chat(messages, person=person, generation_prompt=False), person)

    def load_cache(self, path: Path, person: str = "") -> int:
        """Put what `save_cache` wrote back. Returns tokens. Raises SavedCacheError, and changes nothing, for a file
        that is damaged, or was made with another model or another way to run it."""
        return self.runtime().load_cache(path, person)

    def count_text(self, text: str) -> int:
        return len(self.runtime().prompting.encode_text(text)) if text else 0

    def default_params(self) -> GenerationParams:
        """The sampling of the preset that answers (or is awaited), or the general defaults."""
        return self._switch.params()

    def runtime(self) -> Runtime:
        """What answers now, for commands that measure it. Raises when nothing is loaded."""
        runtime = self._switch.runtime
        if runtime is None:
            raise self._switch.not_ready()
        return runtime

    # sampling sets ----------------------------------------------------------------------------------------------------

    def sampling_sets(self) -> dict[str, GenerationParams]:
        return self._sets.all()

    def save_sampling_set(self, name: str, params: GenerationParams) -> None:
        self._sets.save(name, params)

    def delete_sampling_set(self, name: str) -> None:
        self._sets.delete(name)

    # numbers for whoever watches --------------------------------------------------------------------------------------

    def metrics(self) -> list[Family | Distribution]:
        """What is now, and what happened since the server started."""
        return self._records.families(self.status(), self._switch.totals())

    def _start(self, ask: Ask) -> Generation:
        try:
            return self._switch.start(ask)
        except UserError as error:
            self._records.refused(error)
            raise

    # ends -------------------------------------------------------------------------------------------------------------

    def drain(self) -> None:
        """Take no new requests, and wait for those that were asked for, as long as the settings say."""
        self._switch.drain(self.settings.drain_seconds)

    def close(self) -> None:
        """Stop all replies and let the model go."""
        self._switch.close()
        self._speeds.close()

    def _is_busy(self) -> bool:
        switch = self._switch
        runtime = switch.runtime
        return bool(switch.names) or (runtime is not None and runtime.worker.running + runtime.worker.waiting > 0)

    def _unless_loaded(self, preset: Preset, report: Progress) -> Prepared | None:
        """None where exactly this answers already: the same keys, and files that have not changed since."""
        prepared = self.prepare(preset, report)
        runtime = self._switch.runtime
        return None if runtime is not None and prepared.same(runtime.prepared) else prepared
