"""A plot of tokens/s against memory as SVG: few points, each with its name. No script, in the page's colours.

Gradio's own plot fails in the browser when it is taken away again, and brings a library for what is a dozen circles.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from backend.events import PresetInfo

WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 52, 16, 34, 44  # of the area where points are
LETTER = 9.5  # average width of a letter of a label, on a narrow page, where they are larger


def plot(presets: Sequence[PresetInfo]) -> str:
    """What was measured on this machine; empty where nothing was."""
    points = [
        ((each.peak_ram_bytes + each.peak_vram_bytes) / 1e9, each.tokens_per_second, info.title or info.name)
        for info in presets
        if (each := info.measured) is not None and each.tokens_per_second and each.peak_ram_bytes + each.peak_vram_bytes
    ]
    if not points:
        return ""
    memory, speed = ticks(max(x for x, _, _ in points)), ticks(max(y for _, y, _ in points))
    across, up = _Scale(memory[-1], LEFT, WIDTH - RIGHT), _Scale(speed[-1], HEIGHT - BOTTOM, TOP)
    lines = [_across(up.at(value), f"{value:g}") for value in speed]
    lines += [_text(across.at(value), HEIGHT - BOTTOM + 18, f"{value:g}", "middle") for value in memory]
    lines.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, "memory, GB", "middle"))
    lines.append(_text(0, 10, "tokens/s", "start"))
    marks = "".join(_mark(across.at(x), up.at(y), x, y, name) for x, y, name in sorted(points))
    return (
        '<figure class="plot"><figcaption>Measured on this machine: speed against memory</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="group" aria-label="Tokens per second against memory">'
        f"{''.join(lines)}{marks}</svg></figure>"
    )


def ticks(most: float) -> list[float]:
    """Round numbers from 0 to at least `most`, about five of them."""
    rough = most / 4
    power = 10 ** math.floor(math.log10(rough))
    width = next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= rough)
    return [round(n * width, 10) for n in range(math.ceil(most / width) + 1)]


class _Scale:
    """Values from 0 to `most` -> places from `start` to `end`."""

    def __init__(self, most: float, start: float, end: float) -> None:
        self._most, self._start, self._end = most, start, end

    def at(self, value: float) -> float:
        return self._start + (self._end - self._start) * value / self._most


def _mark(x: float, y: float, memory: float, speed: float, name: str) -> str:
    words = f"{name}: {speed:.1f} tokens/s, {memory:.1f} GB"
    beyond = x + 10 + LETTER * len(name) > WIDTH
    label = _text(x - 10 if beyond else x + 10, y + 4, name, "end" if beyond else "start", "name")
    circle = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5"><title>{escape(words)}</title></circle>'
    return f'<g role="img" aria-label="{escape(words, quote=True)}">{circle}{label}</g>'


def _across(y: float, words: str) -> str:
    line = f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
    return line + _text(LEFT - 8, y + 4, words, "end")


def _text(x: float, y: float, words: str, anchor: str, kind: str = "tick") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'
