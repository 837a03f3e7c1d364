"""A service without a model, for tests of the page and of the HTTP routes: same door, scripted replies."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from backend.errors import NotReadyError, PresetError, UserError
from backend.events import LoadProgress, PresetInfo, Stats, Status
from backend.generation import Generation
from backend.params import GenerationParams
from backend.text.messages import Message


class FakeRequest:
    def __init__(self, id: str, prompt_tokens: int) -> None:
        self.id = id
        self.cancelled = threading.Event()
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
        self.requests: list[FakeRequest] = []
        self.asked: list[object] = []
        self.params: list[GenerationParams] = []
        self.sets: dict[str, GenerationParams] = {}
        self._numbers = itertools.count(1)
        self._status = Status(
            state="ready", preset="starter", title="SmolLM2 135M, as shipped", model="SmolLM2-135M-Instruct",
            context=2048, weight_bytes=100_000_000, kv_bytes=50_000_000, process_bytes=900_000_000,
        )  # fmt: skip

    def presets(self) -> list[PresetInfo]:
        rows = [
            ("starter", "SmolLM2 135M, as shipped", "about 0.2 GB of memory"),
            ("starter-bf16", "SmolLM2 135M, bf16", "about 0.4 GB of memory"),
            ("starter-f32", "SmolLM2 135M, f32", "about 0.7 GB of memory"),
        ]
        return [PresetInfo(n, t, "starter", needs, loaded=n == self._status.preset) for n, t, needs in rows]

    def load(self, name: str, progress: Callable[[LoadProgress], None] | None = None) -> None:
        if self.fail_load:
            raise self.fail_load
        titles = {info.name: info.title for info in self.presets()}
        if name not in titles:
            raise PresetError(f"there is no preset '{name}'")
        for step in range(1, 6):
            time.sleep(self.load_seconds / 5)
            if progress:
                progress(LoadProgress(f"Loading {name}", step * 20, 100))
        self._status = replace(self._status, preset=name, title=titles[name])

    def status(self) -> Status:
        running = sum(1 for request in self.requests if request.stats().phase != "done")
        return replace(self._status, running=running)

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
        return sum(len(message.content.split()) + 4 for message in messages)

    def count_text(self, text: str) -> int:
        return len(text.split())

    def chat(self, messages: Sequence[Message], params: GenerationParams) -> Generation:
        return self._start(tuple(messages), messages[-1].content, self.count_chat(messages), params)

    def complete(self, prompt: str | Sequence[int], params: GenerationParams) -> Generation:
        return self._start(prompt, str(prompt), len(str(prompt).split()), params)

    def close(self) -> None:
        for request in self.requests:
            request.cancelled.set()

    def _start(self, asked: object, last: str, prompt_tokens: int, params: GenerationParams) -> Generation:
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
        threading.Thread(target=self._speak, args=(generation, request, len(words), limit), daemon=True).start()
        return generation

    def _speak(self, generation: Generation, request: FakeRequest, count: int, limit: int) -> None:
        request.update(phase="prefill")
        begin = time.monotonic()
        reason = "stop"
        if request.cancelled.wait(self.prefill_delay):
            count, reason = 0, "cancelled"
        first = time.monotonic()
        for index in range(count):
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
            if generation.on_token(index, None):
                break
        request.update(phase="done")
        generation.on_finish(reason)  # type: ignore[arg-type]
