"""Cutting a rendered prompt into control tokens and plain text, so that typed text can never become a control token."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

# Code points that Unicode promises never to assign (noncharacters): no text contains them unless to trick us.
_MARKS = [chr(code) for code in range(0xFDD0, 0xFDF0)]


@dataclass(frozen=True)
class Segment:
    text: str
    control: bool = False


class ControlGuard:
    """Breaks the spelling of control tokens in typed text before it goes through a template, and mends it after.

    `guard` puts a mark inside each control token's spelling, and where a text's edge and a neighbour's could make one
    together; after rendering, `split` finds the template's own control tokens (unmarked) and removes the marks from the
    rest, which is plain text.
    """

    def __init__(self, control: Iterable[str], contents: Iterable[str]) -> None:
        spellings = sorted((text for text in control if text), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, spellings))) if spellings else None
        self._starts = tuple({text[:n] for text in spellings for n in range(1, len(text))})
        self._ends = tuple({text[n:] for text in spellings for n in range(1, len(text))})
        taken = "".join(contents)
        unused = [mark for mark in _MARKS if mark not in taken]
        # Somebody who types all 32 noncharacters loses them; nothing else can be done and nobody does.
        self._mark = unused[0] if unused else _MARKS[0]

    def guard(self, text: str) -> str:
        if self._pattern is None:
            return text
        # Two marks: one breaks this spelling, the other keeps a neighbour from completing one.
        marked = self._pattern.sub(lambda found: found[0][:1] + self._mark + found[0][1:] + self._mark, text)
        before = self._mark if marked.startswith(self._ends) else ""
        after = self._mark if marked.endswith(self._starts) else ""
        return before + marked + after

    def split(self, rendered: str) -> list[Segment]:
        segments: list[Segment] = []
        at = 0
        for found in self._pattern.finditer(rendered) if self._pattern else ():
            self._plain(segments, rendered[at : found.start()])
            segments.append(Segment(found[0], control=True))
            at = found.end()
        self._plain(segments, rendered[at:])
        return segments

    def _plain(self, segments: list[Segment], text: str) -> None:
        text = text.replace(self._mark, "")
        if text:
            segments.append(Segment(text))
