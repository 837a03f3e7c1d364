"""Token bytes in, text that is safe to show out.

Two things may not be shown yet: the first bytes of a character whose rest comes with the next token, and text that may
turn out to be the beginning of a stop string. Both wait here. No tokenizer and no engine: bytes and strings only.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class TextStream:
    """Incremental UTF-8 decoding with stop strings.

    The concatenation of everything returned by `push` and `flush` does not depend on how the bytes were cut into
    tokens: it is the whole text up to where a stop string first begins. Bytes that are no UTF-8 become U+FFFD, as
    `bytes.decode(errors="replace")` would make them. With `trim_start` the spaces before the first other character are
    left out, also where a stop string is looked for.
    """

    def __init__(self, stop: Sequence[str] = (), *, trim_start: bool = False) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stop = tuple(text for text in stop if text)
        self._held = ""
        self._trimming = trim_start
        self.stopped = False  # a stop string was met; nothing more will come out

    def push(self, piece: bytes) -> str:
        """Take one token's bytes and return the text that can be shown now. After a stop string: nothing."""
        return self._advance(self._decoder.decode(piece))

    def flush(self) -> str:
        """The generation is over: return what was still held back."""
        text = self._advance(self._decoder.decode(b"", final=True))
        cut = self._first_stop()
        self.stopped = self.stopped or cut is not None
        held, self._held = self._held[:cut], ""
        return text + held

    def _advance(self, text: str) -> str:
        if self.stopped:
            return ""
        if self._trimming:
            text = text.lstrip(" ")
            self._trimming = not text
        if not self._stop:
            return text
        self._held += text
        cut = self._first_stop()
        split = len(self._held) - self._possible_stop_length()
        # A longer stop string that began before the one that is complete may still become complete: then it counts.
        if cut is not None and cut <= split:
            self.stopped = True
            shown, self._held = self._held[:cut], ""
            return shown
        shown, self._held = self._held[:split], self._held[split:]
        return shown

    def _first_stop(self) -> int | None:
        """Where the earliest stop string starts, or None."""
        found = [at for at in (self._held.find(text) for text in self._stop) if at >= 0]
        return min(found) if found else None

    def _possible_stop_length(self) -> int:
        """Length of the longest end of the held text that is the beginning of some stop string."""
        longest = 0
        for text in self._stop:
            for length in range(min(len(text) - 1, len(self._held)), longest, -1):
                if self._held.endswith(text[:length]):
                    longest = length
                    break
        return longest
