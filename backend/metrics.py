"""What happened since the server started, in numbers for whoever watches it. No text format: that is the API's.

`Records` is fed by engines as requests go on and end; what rooms count for themselves (`Totals`) is kept when the model
they belong to is unloaded, so that a counter never falls.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from backend.errors import UserError
from backend.events import FinishReason, Stats, Status

Kind = Literal["counter", "gauge"]
Totals = Mapping[str, int]  # name of a counter of COUNTERS -> what a loaded model has counted

WAITS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)  # seconds, upper ends
GAPS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)

# What loaded models count, under the names of `Totals`.
COUNTERS = {
    "steps": "Passes through the model.",
    "model_tokens": "Tokens that went through the model, with those read again and guesses that were wrong.",
    "preemptions": "Running requests that gave their blocks to others and read again later.",
    "speculation_passes": "Steps of a sequence that drew from its logits.",
    "speculation_drafted_tokens": "Guessed tokens that were evaluated.",
    "speculation_accepted_tokens": "Guessed tokens that were right.",
    "cache_evicted_blocks": "Blocks that left the cache for others.",
    "cache_host_stored_blocks": "Evicted blocks that went to the host tier.",
    "cache_host_restored_blocks": "Blocks that came back from the host tier.",
    "cache_host_dropped_blocks": "Blocks that left the host tier for good.",
}


@dataclass(frozen=True)
class Family:
    """One metric: a value for each set of labels, in the same order as `labels`."""

    name: str
    help: str
    kind: Kind
    labels: tuple[str, ...]
    values: Mapping[tuple[str, ...], float]


@dataclass(frozen=True)
class Distribution:
    """A histogram: how many values are not above each upper end, the last one being all; and their sum."""

    name: str
    help: str
    ends: Sequence[float]
    counts: Sequence[int]
    sum: float


class Histogram:
    """Counts values by size. Not thread-safe."""

    def __init__(self, ends: Sequence[float]) -> None:
        self._ends, self._counts, self._sum = ends, [0] * (len(ends) + 1), 0.0

    def add(self, value: float) -> None:
        self._counts[bisect_left(self._ends, value)] += 1
        self._sum += value

    def shown(self, name: str, help: str) -> Distribution:
        return Distribution(name, help, self._ends, tuple(accumulate(self._counts)), self._sum)


class Records:
    """Requests since the start of the server. Thread-safe; every call is a few operations on plain numbers."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ended: Counter[str] = Counter()  # by finish reason
        self._errors: Counter[str] = Counter()  # by error code
        self._tokens: Counter[str] = Counter()
        self._retired: Counter[str] = Counter()
        self._duration, self._first = Histogram(WAITS), Histogram(WAITS)
        self._gap = Histogram(GAPS)

    def gap(self, seconds: float) -> None:
        """A reply's next token came so long after the one before."""
        with self._lock:
            self._gap.add(seconds)

    def ended(self, stats: Stats, seconds: float, reason: FinishReason, error: Exception | None) -> None:
        """A request is over, `seconds` after it was handed to an engine."""
        with self._lock:
            self._ended[reason] += 1
            if error is not None:
                self._errors[_code(error)] += 1
            self._tokens["prompt"] += stats.prompt_tokens
            self._tokens["cached"] += stats.cached_tokens
            self._tokens["evaluated"] += stats.evaluated_tokens
            self._tokens["generated"] += stats.completion_tokens
            self._duration.add(seconds)
            if stats.seconds_to_first_token is not None:
                self._first.add(stats.seconds_to_first_token)

    def refused(self, error: Exception) -> None:
        """A request that no engine has taken."""
        with self._lock:
            self._ended["refused"] += 1
            self._errors[_code(error)] += 1

    def retire(self, totals: Totals) -> None:
        """A model is unloaded, having counted this."""
        with self._lock:
            self._retired.update(totals)

    def families(self, status: Status, loaded: Iterable[Totals]) -> list[Family | Distribution]:
        """Everything, with what is now and what the loaded models have counted so far."""
        with self._lock:
            totals = self._retired.copy()
            for each in loaded:
                totals.update(each)
            return [*_gauges(status), *self._requests(), *(_count(name, totals[name]) for name in COUNTERS)]

    def _requests(self) -> list[Family | Distribution]:
        tokens = self._tokens
        return [
            Family("requests", "Requests that are over.", "counter", ("reason",), _by(self._ended)),
            Family("request_errors", "Requests that ended with an error.", "counter", ("code",), _by(self._errors)),
            _single("prompt_tokens", "Tokens of prompts, of requests that are over.", tokens["prompt"]),
            _single("prompt_tokens_cached", "Of these, found in the cache.", tokens["cached"]),
            _single("prompt_tokens_evaluated", "Of these, read by the model, also again.", tokens["evaluated"]),
            _single("generated_tokens", "Tokens of replies, of requests that are over.", tokens["generated"]),
            self._duration.shown("request_duration_seconds", "From arrival to the end of a request."),
            self._first.shown("time_to_first_token_seconds", "From arrival to the first token of a reply."),
            self._gap.shown("inter_token_seconds", "Between two tokens of a reply."),
        ]


def _gauges(status: Status) -> list[Family]:
    bytes_of: dict[tuple[str, ...], float] = {
        ("weights",): status.weight_bytes,
        ("kv",): status.kv_bytes,
        ("kv_used",): status.kv_used_bytes,
        ("process",): status.process_bytes,
        ("free",): status.free_bytes,
    }
    cache: dict[tuple[str, ...], float] = {
        ("in_use",): status.cache_blocks_in_use,
        ("cached",): status.cache_blocks_cached,
        ("free",): status.cache_blocks_free,
        ("host",): status.cache_blocks_host,
    }
    loaded: dict[tuple[str, ...], float] = {}
    if status.preset is not None:
        loaded[status.preset, status.model, status.device] = 1
    return [
        Family("up", "Whether a model can answer.", "gauge", (), {(): int(status.state == "ready")}),
        Family("requests_running", "Requests that are being answered.", "gauge", (), {(): status.running}),
        Family("requests_waiting", "Requests that wait for a place.", "gauge", (), {(): status.waiting}),
        Family("preset_info", "The loaded preset.", "gauge", ("preset", "model", "device"), loaded),
        Family("context_tokens", "What fits into one chat.", "gauge", (), {(): status.context}),
        Family("cache_tokens", "What fits into the KV cache.", "gauge", (), {(): status.cache_tokens}),
        Family(
            "cache_blocks",
            "Blocks of the KV cache: held by running requests, kept for later ones, empty, in the host tier.",
            "gauge", ("state",), cache,
        ),
        Family("memory_bytes", "Memory by what has it.", "gauge", ("of",), bytes_of),
    ]  # fmt: skip


def _single(name: str, help: str, value: int) -> Family:
    return Family(name, help, "counter", (), {(): value})


def _count(name: str, value: int) -> Family:
    return _single(name, COUNTERS[name], value)


def _by(counts: Counter[str]) -> dict[tuple[str, ...], float]:
    return {(name,): count for name, count in counts.items()}


def _code(error: Exception) -> str:
    return (error.code or error.kind) if isinstance(error, UserError) else "internal_error"
