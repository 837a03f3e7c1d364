"""The tokens of one request as an array that grows, and where a DRY breaker ends in their text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray


class History:
    """Prompt and reply so far. `breakers` are found in the text, so also across the borders of tokens."""

    def __init__(
        self, prompt: Sequence[int], breakers: Sequence[str] = (), token_bytes: Callable[[int], bytes] | None = None
    ) -> None:
        self.prompt_tokens = len(prompt)
        self.rewinds = 0  # how often tokens were taken back
        self._ids = np.zeros(max(64, 2 * len(prompt)), dtype=np.int64)
        self._breaks = np.zeros(len(self._ids), dtype=bool)
        self._count = 0
        self._breakers = tuple(text.encode() for text in breakers) if token_bytes else ()
        self._reach = max((len(text) for text in self._breakers), default=1) - 1  # bytes before a token that matter
        self._token_bytes = token_bytes
        self._tails: list[bytes] = []  # per token: the end of the text before the next one
        for token in prompt:
            self.append(token)

    def __len__(self) -> int:
        return self._count

    @property
    def ids(self) -> NDArray[np.int64]:
        """A view, good until the next change."""
        return self._ids[: self._count]

    @property
    def breaks(self) -> NDArray[np.bool_]:
        return self._breaks[: self._count]

    def append(self, token: int) -> None:
        if self._count == len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
            self._breaks = np.concatenate([self._breaks, np.zeros_like(self._breaks)])
        self._ids[self._count] = token
        if self._breakers and self._token_bytes is not None:
            text = (self._tails[-1] if self._tails else b"") + self._token_bytes(token)
            self._breaks[self._count] = any(breaker in text for breaker in self._breakers)
            # a breaker that is complete must not be found again in the next token's text
            self._tails.append(b"" if self._breaks[self._count] else text[max(0, len(text) - self._reach) :])
        self._count += 1

    def rewind(self, tokens: int) -> None:
        """Forget the last tokens."""
        self.rewinds += 1
        self._count -= tokens
        del self._tails[self._count :]

    def latest(self, count: int) -> NDArray[np.int64]:
        """The latest `count` ids; 0 means all."""
        return self.ids[-count:] if count else self.ids

    def reply(self, count: int) -> NDArray[np.int64]:
        """Those among the latest `count` ids (0: all) that are of the reply."""
        start = max(self.prompt_tokens, self._count - count if count else 0)
        return self.ids[start:]
