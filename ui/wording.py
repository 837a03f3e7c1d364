"""Every sentence and number of the page that depends on values. Pure functions from values to plain text."""

from __future__ import annotations

from dataclasses import replace

from backend.events import LoadProgress, Stats, Status

WORDS_PER_TOKEN = 0.75  # English prose; "about" in the sentence says that it is a rule of thumb


def thousands(number: int) -> str:
    """1234 -> '1,234'."""
    return f"{number:,}"


def memory(count: int) -> str:
    """Bytes in the unit a person reads, decimal as on the box: '0.9 GB', '87 MB'."""
    if count >= 100_000_000:
        return f"{count / 1e9:.1f} GB"
    return f"{max(0, round(count / 1e6))} MB"


def meter(used: int, context: int) -> str:
    """How full the context is, in numbers and in words."""
    if context <= 0:
        return ""
    left = max(0, context - used)
    words = int(left * WORDS_PER_TOKEN)
    if words >= 100:
        words = words // 50 * 50
    rest = f"about {thousands(words)} words left" if words else "no room left"
    return f"{thousands(used)} / {thousands(context)} tokens · {rest}"


def speed(stats: Stats) -> str:
    """The speed line under a reply: '41.8 tokens/s · 0.21 s to first · 16 tokens'."""
    parts = []
    rate = stats.tokens_per_second
    if rate is not None:
        parts.append(f"{rate:.1f} tokens/s")
    if stats.seconds_to_first_token is not None:
        parts.append(f"{stats.seconds_to_first_token:.2f} s to first")
    if stats.completion_tokens:
        parts.append("1 token" if stats.completion_tokens == 1 else f"{thousands(stats.completion_tokens)} tokens")
    return " · ".join(parts)


def phase(stats: Stats) -> str:
    """What is going on before the first token; 'Writing' after it."""
    if stats.phase == "queued":
        if stats.people_ahead == 1:
            return "1 person before you"
        if stats.people_ahead > 1:
            return f"{stats.people_ahead} people before you"
        return "Waiting for the model"
    if stats.phase == "prefill":
        return reading(stats)
    if stats.completion_tokens:
        return "Writing"
    return "Starting"


def reading(stats: Stats) -> str:
    """Prefill in words: what is in the cache already needs no reading."""
    todo = stats.prompt_tokens - stats.cached_tokens
    noun = "token" if todo == 1 else "tokens"
    if todo <= 0:
        return "Reading"
    done = min(todo, max(0, stats.evaluated_tokens))
    share = f", {100 * done // todo}%" if done else ""
    return f"Reading {thousands(todo)} {noun}{share}"


def loading(progress: LoadProgress | None, preset: str | None = None) -> str:
    """'Loading starter, 38%'."""
    stage = progress.stage if progress else (f"Loading {preset}" if preset else "Loading the model")
    if progress is None or progress.fraction is None:
        return stage
    return f"{stage}, {int(100 * progress.fraction)}%"


def ending(reason: str | None) -> str:
    """Why a reply is shorter than it might be; empty when it simply ended."""
    return {"cancelled": "stopped", "length": "reached the reply length", "error": "broken off"}.get(reason or "", "")


def footer(stats: Stats, reason: str | None) -> str:
    """The quiet line that stays under a finished reply."""
    return " · ".join(part for part in (ending(reason), speed(stats)) if part)


def holder(status: Status) -> str:
    """What answers now, for the chip in the header."""
    if status.state == "loading":
        return loading(status.loading, status.loading_preset)
    if status.state == "ready":
        return status.title or status.preset or "Ready"
    return "Engine stopped" if status.state == "stopped" else "No model loaded"


def held_memory(status: Status) -> str:
    """Memory of what is loaded, split where the service knows: the model's own, and the whole process."""
    if status.state != "ready":
        return ""
    return memory(status.weight_bytes + status.kv_bytes) if status.weight_bytes else memory(status.process_bytes)


def memory_details(status: Status) -> str:
    """The longer text behind the chip's memory number."""
    parts = [(status.weight_bytes, "weights"), (status.kv_bytes, "KV cache"), (status.process_bytes, "whole process")]
    return ", ".join(f"{name} {memory(count)}" for count, name in parts if count)


def answers(status: Status) -> str:
    """The welcome line: which model answers."""
    if status.state == "ready":
        return f"{status.title or status.preset} answers, on this machine only."
    if status.state == "loading":
        return f"{loading(status.loading, status.loading_preset)}. You can type already; it answers when it is ready."
    if status.error:
        return status.error
    return "No model is loaded yet. Pick one under Presets."


def with_loading(status: Status, progress: LoadProgress, preset: str) -> Status:
    """The same status while a preset is on its way, for a load that this page itself has started."""
    return replace(status, loading=progress, loading_preset=preset)
