"""Small pieces of HTML that more than one tab shows. Every text in them is escaped here, and nowhere else."""

from __future__ import annotations

from html import escape

from backend.events import LoadProgress, Status
from ui import wording

MATH = [
    {"left": "$$", "right": "$$", "display": True},
    {"left": "\\[", "right": "\\]", "display": True},
    {"left": "\\(", "right": "\\)", "display": False},
]


def state_line(*, busy: bool, empty: bool = False, words: str = "", numbers: str = "") -> str:
    """The line under a reply. Its data attributes also steer, through CSS, whether Send or Stop is shown."""
    return (
        f'<div class="state" data-busy="{int(busy)}" data-empty="{int(empty)}">'
        f'<span class="words">{escape(words)}</span><span class="numbers">{escape(numbers)}</span></div>'
    )


def meter(used: int, context: int) -> str:
    """The context meter: numbers, then words that a narrow page may leave out."""
    if context <= 0:
        return ""
    numbers, _, words = wording.meter(used, context).partition(" tokens · ")
    full = " full" if used > 0.9 * context else ""
    share = min(100, round(100 * used / context))
    return (
        f'<div class="meter{full}"><span class="bar" aria-hidden="true"><i style="width:{share}%"></i></span>'
        f'<span>{escape(numbers)}</span><span class="unit"> tokens</span>'
        f'<span class="left"> · {escape(words)}</span></div>'
    )


def cut(left_out: int, context: int) -> str:
    """The line above the first turn that is still read. Drawn by a rule, so that the turns stay what they are."""
    words = wording.cut(left_out, context)
    if not words:
        return ""
    row = f"#messages .message-row:nth-child({left_out + 1} of .message-row)"
    return f'<style>{row} {{flex-wrap: wrap}} {row}::before {{content: "{words}"}}</style><p>{escape(words)}</p>'


def notice(text: str | None) -> str:
    """One sentence about what went wrong; nothing when nothing did."""
    return f'<p class="notice" role="alert">{escape(text)}</p>' if text else ""


def remark(text: str | None) -> str:
    """The same about something that went as it was asked to."""
    return f'<p class="remark" role="status">{escape(text)}</p>' if text else ""


def progress_bar(progress: LoadProgress | None, preset: str | None) -> str:
    """How far a load has come, as a bar and in words."""
    words = wording.loading(progress, preset)
    share = progress.fraction if progress else None
    value = "" if share is None else f' aria-valuenow="{round(100 * share)}"'
    width = "" if share is None else f' style="width:{100 * share:.1f}%"'
    kind = "" if share is not None else " unknown"
    details = wording.load_details(progress)
    more = f'<span class="soft">{escape(details)}</span>' if details else ""
    return (
        f'<div class="loading"><span>{escape(words)}</span>{more}<div class="track{kind}" role="progressbar" '
        f'aria-label="{escape(words)}" aria-valuemin="0" aria-valuemax="100"{value}><i{width}></i></div></div>'
    )


def chip(status: Status) -> str:
    """What answers now, in the header: state dot, name, memory."""
    state = "loading" if status.loading is not None else status.state
    name, memory = wording.holder(status), wording.held_memory(status)
    if status.loading is not None:
        name = wording.loading(status.loading, status.loading_preset)
    number = f'<span class="memory">{escape(memory)}</span>' if memory else ""
    title = f"{name}. {wording.memory_details(status)}. Press to choose another preset."
    return (
        f'<button type="button" class="chip" data-go="Presets" title="{escape(title)}">'
        f'<span class="dot {state}" aria-hidden="true"></span><span class="name">{escape(name)}</span>{number}'
        f'<span class="more" aria-hidden="true">▾</span></button>'
    )
