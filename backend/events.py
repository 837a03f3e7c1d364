"""What flows up from the engine to people and programs. Frozen values, no behaviour beyond arithmetic on themselves."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "cancelled", "error"]
Phase = Literal["queued", "prefill", "decode", "done"]
Fits = Literal["now", "after-unload", "no"]  # beside what is loaded, in its place, not at all


@dataclass(frozen=True)
class Stats:
    """Where one request stands. Times in seconds on a monotonic clock, counts in tokens."""

    phase: Phase = "queued"
    people_ahead: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0  # prompt tokens whose keys and values were found in the cache
    evaluated_tokens: int = 0  # prompt tokens the model has read for this request so far
    completion_tokens: int = 0
    seconds_to_first_token: float | None = None
    decode_seconds: float = 0.0  # from the first token to the latest
    context: int = 0  # tokens that fit in the context
    shifted_tokens: int = 0  # of the middle, not read any more: the context was full while the reply was written
    drafted_tokens: int = 0  # guesses of coming tokens that were evaluated
    accepted_tokens: int = 0  # of these, the right ones: each saved a step

    @property
    def tokens_per_second(self) -> float | None:
        """Decode speed; the first token belongs to the prefill. None until it means something."""
        if self.completion_tokens < 2 or self.decode_seconds <= 0:
            return None
        return (self.completion_tokens - 1) / self.decode_seconds

    @property
    def used_tokens(self) -> int:
        """Of the context."""
        return self.prompt_tokens + self.completion_tokens - self.shifted_tokens


@dataclass(frozen=True)
class PromptScore:
    """What the model thought of one token of a prompt: natural log, rank (1: the likeliest), the likeliest tokens."""

    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Chunk:
    """A piece of a reply: text that is safe to show, and how things stand.

    `ids` and `logprobs` (natural log of the untempered model distribution, one per id) cover the same tokens; a token
    whose bytes are not yet safe to show may come in an earlier chunk than its text. The last chunk has a finish_reason.
    """

    text: str = ""
    finish_reason: FinishReason | None = None
    stats: Stats = field(default_factory=Stats)
    ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] = ()  # of each id, where asked for: the likeliest tokens
    error: Exception | None = None


@dataclass(frozen=True)
class LoadProgress:
    """How far a download or a load has come. `total` 0 means unknown; bytes unless `unit` says otherwise."""

    stage: str  # in words for a person, e.g. "Downloading the starter model", "Loading starter"
    done: int = 0
    total: int = 0
    unit: str = "B"
    seconds_left: float | None = None  # estimated by the service from how it went so far

    @property
    def fraction(self) -> float | None:
        return min(1.0, self.done / self.total) if self.total > 0 else None


@dataclass(frozen=True)
class Measured:
    """What a preset did on this machine. None and 0: not measured."""

    tokens_per_second: float | None = None
    peak_ram_bytes: int = 0
    peak_vram_bytes: int = 0
    perplexity: float | None = None
    kl: float | None = None  # mean KL divergence from the reference preset, nats


@dataclass(frozen=True)
class PresetInfo:
    """One row of the Presets tab."""

    name: str
    title: str
    model: str
    needs: str  # in words and units, e.g. "about 0.2 GB of memory"
    loaded: bool = False
    error: str | None = None  # why this preset cannot be read; such a row cannot be loaded
    note: str = ""  # e.g. that its model is not here yet, and this is planned from its published shape
    fits: Fits | None = None
    why_not: str = ""  # where it does not fit: what it needs and what is free
    ram_bytes: int = 0  # predicted; 0: not known
    vram_bytes: int = 0
    tokens_per_second: float | None = None  # predicted, decode
    bound_by: str = ""  # what limits that speed, e.g. "ram bandwidth"
    measured: Measured | None = None


@dataclass(frozen=True)
class Status:
    """What the service holds now."""

    state: Literal["empty", "loading", "ready", "failed", "stopped"]
    preset: str | None = None  # the preset that answers now
    title: str = ""
    model: str = ""  # id shown to programs
    context: int = 0
    weight_bytes: int = 0
    kv_bytes: int = 0
    process_bytes: int = 0  # resident memory of this process
    running: int = 0
    waiting: int = 0  # requests for the engine, and those that wait for a model while another one is loaded
    device: str = ""  # where it computes, e.g. "cpu", "cuda:0"
    predicted_bytes: int = 0  # what the plan said before loading: weights and a full KV cache
    kv_used_bytes: int = 0  # of kv_bytes: what holds keys and values now
    free_bytes: int = 0  # memory of the device that is free
    cache_tokens: int = 0  # tokens that the KV cache holds for all chats together
    cache_free_tokens: int = 0  # of these, what new text may take without pushing a running reply out
    cache_blocks_in_use: int = 0  # held by running requests
    cache_blocks_cached: int = 0  # that nobody holds, kept for whoever begins like this
    cache_blocks_free: int = 0  # that hold nothing
    cache_blocks_host: int = 0  # in the host tier
    loading: LoadProgress | None = None  # set while another preset is on its way
    loading_preset: str | None = None
    next_presets: tuple[str, ...] = ()  # loads that wait for their turn, in order
    error: str | None = None  # why the last load failed
