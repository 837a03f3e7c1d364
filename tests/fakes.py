"""A service without a model, for tests of the page and of the HTTP routes: same door, scripted replies."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from backend.errors import BusyError, LoadCancelled, NotReadyError, PresetError, UserError
from backend.events import LoadProgress, Measured, PresetInfo, PromptScore, Stats, Status
from backend.generation import Generation
from backend.metrics import Distribution, Family, Records
from backend.params import GenerationParams
from backend.text.messages import Message


class FakeRequest:
    def __init__(self, id: str, prompt_tokens: int) -> None:
        self.id = id
        self.cancelled = threading.Event()
        self.top_logprobs: int | None = None
        self.prompt_scores: list[PromptScore] = []
        self._stats = Stats(prompt_tokens=prompt_tokens, context=2048)

    def stats(self) -> Stats:
        return self._stats

    def update(self, **changes: object) -> None:
        self._stats = replace(self._stats, **changes)  # type: ignore[arg-type]


class FakeService:
    """Answers with `reply(messages or prompt)`, one word per token, `delay` seconds apart, from a thread of its own."""

    def __init__(self, delay: float = 0.01, prefill_delay: float = 0.0) -> None:
        self.delay, self.prefill_delay = delay, prefill_delay
        self.reply: Callable[[object], str] = lambda asked: f"You said: {asked}"
        self.fail_next: UserError | None = None
        self.fail_load: UserError | None = None
        self.load_seconds = 0.2
        # Where a test looks at what is in the middle, that waits for the test, however slow the machine is.
        self.hold_load: threading.Event | None = None  # a load stops in its middle until this is set
        self.hold_prefill: threading.Event | None = None  # in place of prefill_delay
        self.hold_at: tuple[int, threading.Event] | None = None  # a reply stops before this token
        self.measured: list[Measured | None] | None = None  # in place of the rows' own
        self.further: list[PresetInfo] = []
        self.gap = False  # whether a load first unloads what answers
        self._loads, self._cancelled = threading.Lock(), False
        self.requests: list[FakeRequest] = []
        self.asked: list[object] = []
        self.params: list[GenerationParams] = []
        self.people: list[str] = []
        self.count_chat_asked: list[tuple[Message, ...]] = []
        self.left_out = 0  # messages that are not read where that is allowed
        self.sets: dict[str, GenerationParams] = {}
        self._numbers = itertools.count(1)
        self._status = Status(
            state="ready", preset="starter", title="SmolLM2 135M, as shipped", model="SmolLM2-135M-Instruct",
            context=2048, weight_bytes=100_000_000, kv_bytes=50_000_000, process_bytes=900_000_000,
        )  # fmt: skip

    def presets(self) -> list[PresetInfo]:
        rows = [
            ("starter", "SmolLM2 135M, as shipped", 200_000_000, 52.0, None),
            ("starter-bf16", "SmolLM2 135M, bf16", 400_000_000, 30.0, None),
            ("starter-f32", "SmolLM2 135M, f32", 700_000_000, 15.0, None),
        ]
        if self.measured is not None:
            rows = [(*row[:4], measured) for row, measured in zip(rows, self.measured)]
        found = [
            PresetInfo(
                name, title, "starter", f"about {ram / 1e9} GB of memory", name == self._status.preset, fits="now",
                ram_bytes=ram, tokens_per_second=speed, bound_by="ram bandwidth", measured=measured,
            )
            for name, title, ram, speed, measured in rows
        ]  # fmt: skip
        return [*found, *self.further]

    def load(self, name: str, progress: Callable[[LoadProgress], None] | None = None, *, wait: bool = True) -> None:
        if self.fail_load:
            raise self.fail_load
        titles = {info.name: info.title for info in self.presets()}
        if name not in titles:
            raise PresetError(f"there is no preset '{name}'")
        if not wait and self._loads.locked():
            raise BusyError("another preset is being loaded")
        if self._loads.locked() and progress:
            progress(LoadProgress(f"another preset is being loaded by someone; yours ('{name}') is next"))
        with self._loads:
            before, self._cancelled = self._status, False
            try:
                for step in range(1, 6):
                    now = LoadProgress(f"Loading {name}", step * 20_000_000, 100_000_000, seconds_left=5 - step)
                    gap = replace(before, state="loading", preset=None, title="", model="") if self.gap else before
                    self._status = replace(gap, loading=now, loading_preset=name)
                    if progress:
                        progress(now)
                    time.sleep(self.load_seconds / 5)
                    while step == 3 and self.hold_load and not self._cancelled and not self.hold_load.wait(0.02):
                        pass
                    if self._cancelled:
                        raise LoadCancelled(f"loading '{name}' was cancelled")
                before = replace(before, state="ready", preset=name, title=titles[name])
            finally:
                self._status = before

    def cancel_load(self, name: str | None = None) -> bool:
        self._cancelled = True
        return self._loads.locked()

    def measurements(self) -> dict[str, Measured]:
        return {info.name: info.measured for info in self.presets() if info.measured}

    def status(self) -> Status:
        running = sum(1 for request in self.requests if request.stats().phase != "done")
        return replace(self._status, running=running)

    def metrics(self) -> list[Family | Distribution]:
        return Records().families(self.status(), [])

    def set_status(self, status: Status) -> None:
        self._status = status

    def default_params(self) -> GenerationParams:
        return GenerationParams()

    def sampling_sets(self) -> dict[str, GenerationParams]:
        return dict(self.sets)

    def save_sampling_set(self, name: str, params: GenerationParams) -> None:
        self.sets[name] = params

    def delete_sampling_set(self, name: str) -> None:
        self.sets.pop(name, None)

    def count_chat(self, messages: Sequence[Message]) -> int:
        self.count_chat_asked.append(tuple(messages))
        return sum(len(message.content.split()) + 4 for message in messages)

    def count_text(self, text: str) -> int:
        return len(text.split())

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
        self.people.append(person)
        words = self.count_chat(messages)
        generation = self._start(tuple(messages), messages[-1].content, words, params, top_logprobs)
        generation.left_out = self.left_out if trim else 0
        return generation

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
        self.people.append(person)
        return self._start(prompt, str(prompt), len(str(prompt).split()), params, top_logprobs)

    def close(self) -> None:
        for request in self.requests:
            request.cancelled.set()

    def _start(
        self, asked: object, last: str, prompt_tokens: int, params: GenerationParams, top_logprobs: int | None
    ) -> Generation:
        if self._status.state != "ready":
            raise NotReadyError("no model is loaded yet")
        if self.fail_next:
            error, self.fail_next = self.fail_next, None
            raise error
        self.asked.append(asked)
        self.params.append(params)
        text = self.reply(last)
        words = [word if i == 0 else " " + word for i, word in enumerate(text.split(" "))]
        generation = Generation(lambda i: words[i].encode(), params.stop, tuple(range(prompt_tokens)))
        request = FakeRequest(f"fake-{next(self._numbers)}", prompt_tokens)
        self.requests.append(request)
        generation.attach(request, request.cancelled.set)
        limit = params.max_tokens or len(words)
        request.top_logprobs = top_logprobs
        threading.Thread(target=self._speak, args=(generation, request, len(words), limit), daemon=True).start()
        return generation

    def _speak(self, generation: Generation, request: FakeRequest, count: int, limit: int) -> None:
        request.update(phase="prefill")
        begin = time.monotonic()
        reason = "stop"
        held = self.hold_prefill
        while held is not None and not held.wait(0.02) and not request.cancelled.is_set():
            pass
        if request.cancelled.wait(0 if held is not None else self.prefill_delay):
            count, reason = 0, "cancelled"
        first = time.monotonic()
        for index in range(count):
            while self.hold_at and index >= self.hold_at[0] and not self.hold_at[1].wait(0.02):
                if request.cancelled.is_set():
                    break
            if request.cancelled.wait(self.delay):
                reason = "cancelled"
                break
            if index >= limit:
                reason = "length"
                break
            request.update(
                phase="decode", completion_tokens=index + 1, evaluated_tokens=request.stats().prompt_tokens,
                seconds_to_first_token=first - begin, decode_seconds=time.monotonic() - first,
            )  # fmt: skip
            asked = request.top_logprobs
            top = tuple((index - other, -1.0 - other) for other in range(min(index + 1, asked or 0)))
            if generation.on_token(index, None if asked is None else -0.5 * index, top=top):
                break
        request.update(phase="done")
        generation.on_finish(reason)  # type: ignore[arg-type]
