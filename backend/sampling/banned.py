"""Texts that a reply must not say, found in the bytes of its tokens, also where they go over the borders of tokens.

Tokens whose text may become a banned one are held back until it is clear that they do not: nothing that was shown is
ever taken back. Capital and small letters A to Z are the same. No torch, no engine: what to do about a find is the
sampler's business.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass
class _Said:
    """One token that is held back."""

    token: int
    text: bytes  # in small letters
    since: int  # the first token that matters after this one: where a banned text may begin, numbers from the start


class BannedTexts:
    """The end of one reply, as far as it may still become a banned text, or may after some tokens were taken back."""

    def __init__(self, texts: Sequence[str], token_bytes: Callable[[int], bytes]) -> None:
        self._banned = tuple(text.encode().lower() for text in texts)
        self._token_bytes = token_bytes
        self._held: list[_Said] = []
        self._shown = 0  # tokens before the held ones

    @property
    def held(self) -> int:
        """How many of the latest tokens are held back."""
        return len(self._held)

    def begins(self, token: int) -> int | None:
        """How many tokens before this one a banned text begins that it completes; None when it completes none."""
        pieces = [*(said.text for said in self._held), self._token_bytes(token).lower()]
        if not self._contains(b"".join(pieces)):
            return None
        back = 0
        while not self._contains(b"".join(pieces[len(pieces) - 1 - back :])):
            back += 1
        return back

    def push(self, token: int) -> None:
        """The token is said; `begins` has found nothing."""
        piece = self._token_bytes(token).lower()
        text = b"".join(said.text for said in self._held) + piece
        self._held.append(_Said(token, piece, 0))
        waiting, place = self._possible_length(text), len(self._held)
        while waiting > 0:
            place -= 1
            waiting -= len(self._held[place].text)
        since = self._held[-1].since = self._shown + place
        # Whatever is held may be taken back, and then what mattered at that place matters again.
        for place in range(len(self._held) - 1, -1, -1):
            if self._shown + place + 1 < since:
                break
            since = min(since, self._held[place].since)
        del self._held[: since - self._shown]
        self._shown = since

    def rewind(self, tokens: int) -> int:
        """Take the last tokens back, which are among the held ones; return the first of them."""
        start = len(self._held) - tokens
        first = self._held[start].token
        del self._held[start:]
        return first

    def _contains(self, text: bytes) -> bool:
        return any(banned in text for banned in self._banned)

    def _possible_length(self, text: bytes) -> int:
        """Bytes at the end of the text that are the beginning of a banned one."""
        longest = 0
        for banned in self._banned:
            for length in range(min(len(banned) - 1, len(text)), longest, -1):
                if text.endswith(banned[:length]):
                    longest = length
                    break
        return longest
