"""Every sentence and number of the page that depends on values. Pure functions from values to plain text."""

from __future__ import annotations

from backend.events import LoadProgress, PresetInfo, Stats, Status

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


def load_details(progress: LoadProgress | None) -> str:
    """'38 of 98 MB · about 12 s left'."""
    if progress is None or not progress.total:
        return ""
    if progress.unit == "B":
        large = progress.total >= 1_000_000_000
        numbers = [f"{n / 1e9:.1f}" if large else f"{round(n / 1e6)}" for n in (progress.done, progress.total)]
        parts = [f"{numbers[0]} of {numbers[1]} {'GB' if large else 'MB'}"]
    else:
        parts = [f"{thousands(progress.done)} of {thousands(progress.total)} {progress.unit}"]
    if progress.seconds_left is not None:
        parts.append(f"about {duration(progress.seconds_left)} left")
    return " · ".join(parts)


def duration(seconds: float) -> str:
    """'12 s', '3 min', '2 h': as much as an estimate knows."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{round(seconds / 3600)} h"


def ending(reason: str | None) -> str:
    """Why a reply is shorter than it might be; empty when it simply ended."""
    return {"cancelled": "stopped", "length": "reached the reply length", "error": "broken off"}.get(reason or "", "")


def footer(stats: Stats, reason: str | None, left_out: int = 0) -> str:
    """The quiet line that stays under a finished reply."""
    return " · ".join(part for part in (ending(reason), unread(left_out), forgotten(stats), speed(stats)) if part)


def unread(messages: int) -> str:
    """'without 2 earlier messages': what a reply was made without, under it."""
    return f"without {_messages(messages)}" if messages else ""


def forgotten(stats: Stats) -> str:
    """What was left out of the middle while a reply was written."""
    count = stats.shifted_tokens
    return f"went on without {thousands(count)} tokens of the middle" if count else ""


def cut(messages: int, context: int) -> str:
    """The line in a chat above which nothing is read any more."""
    if not messages:
        return ""
    verb = "is" if messages == 1 else "are"
    return f"{_messages(messages)} {verb} not read any more: the context holds {thousands(context)} tokens"


def _messages(count: int) -> str:
    return "1 earlier message" if count == 1 else f"{thousands(count)} earlier messages"


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


# presets -------------------------------------------------------------------------------------------------------------


def needs(info: PresetInfo) -> list[str]:
    """What a preset takes: memory, and that of the GPU."""
    if not info.ram_bytes:
        return [info.needs]
    if info.vram_bytes:
        return [f"{memory(info.vram_bytes)} VRAM", f"and {memory(info.ram_bytes)} of memory"]
    return [memory(info.ram_bytes)]


def speeds(info: PresetInfo) -> list[str]:
    """Measured where it was, and predicted with the limit that binds."""
    found = info.measured.tokens_per_second if info.measured else None
    guess = info.tokens_per_second
    if found is not None:
        return [rate(found), "measured" if guess is None else f"measured; {rate(guess)} predicted"]
    if guess is None:  # the machine is measured in the background, while nobody is answered
        return ["not measured yet"]
    return [rate(guess), f"predicted, {info.bound_by}" if info.bound_by else "predicted"]


def rate(tokens_per_second: float) -> str:
    """'41.8 tokens/s'; slower than one in ten seconds is said in time."""
    if tokens_per_second >= 0.095:
        return f"{tokens_per_second:.1f} tokens/s"
    return f"{duration(1 / tokens_per_second)} a token" if tokens_per_second > 0 else "0 tokens/s"


def quality(info: PresetInfo) -> list[str]:
    """Perplexity, and how far from the reference, where it was measured."""
    found = info.measured
    if found is None or found.perplexity is None:
        return [""]
    return [f"{found.perplexity:.2f}", "" if found.kl is None else f"KL {found.kl:.4f}"]


def fitting(info: PresetInfo) -> str:
    """Whether a preset fits, in words."""
    return {"now": "now", "after-unload": "in place of the loaded one", "no": "no"}.get(info.fits or "", "")


def holding(status: Status) -> list[tuple[str, str]]:
    """What is loaded in numbers: measured against predicted, and what is left."""
    if status.state != "ready":
        return []
    lines = [("Loaded", " · ".join(part for part in (status.title or status.preset or "", status.device) if part))]
    parts = [f"weights {memory(status.weight_bytes)}"] if status.weight_bytes else []
    if status.kv_bytes:
        parts.append(f"cache {memory(status.kv_used_bytes)} of {memory(status.kv_bytes)} in use")
    predicted = f", {memory(status.predicted_bytes)} at most were predicted" if status.predicted_bytes else ""
    parts.append(f"whole process {memory(status.process_bytes)}{predicted}")
    lines.append(("Memory", " · ".join(parts)))
    room = [f"{memory(status.free_bytes)} free"] if status.free_bytes else []
    if status.cache_tokens:
        free = f"{thousands(status.cache_free_tokens)} of {thousands(status.cache_tokens)}"
        room.append(f"the cache has room for {free} tokens, a chat for {thousands(status.context)}")
    if room:
        lines.append(("Room", " · ".join(room)))
    return lines
