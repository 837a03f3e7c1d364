"""Log probabilities on their way out: what the engine says of each token, in the words of the two endpoints.

The values are natural logarithms under the model's own distribution, before temperature, penalties and rules.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from backend.events import Chunk

Body = dict[str, Any]


@dataclass(frozen=True)
class Scored:
    """One token of a reply. `offset`: letters of the reply before it."""

    text: bytes
    logprob: float
    top: tuple[tuple[bytes, float], ...]
    offset: int


class Scores:
    """The tokens of one reply, chunk by chunk. Tokens without text, as the end of a reply, are left out."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._letters = 0

    def take(self, chunk: Chunk, token_bytes: Callable[[int], bytes]) -> tuple[Scored, ...]:
        """The scored tokens of the next chunk."""
        found = []
        for token, logprob, top in zip(chunk.ids, chunk.logprobs, chunk.top_logprobs, strict=False):
            text = token_bytes(token)
            if text:
                likeliest = tuple((token_bytes(other), value) for other, value in top)
                found.append(Scored(text, logprob, likeliest, self._letters))
                self._letters += len(self._decoder.decode(text))
        return tuple(found)


def chat_logprobs(tokens: Sequence[Scored] | None) -> Body | None:
    """`choices[].logprobs` of a chat."""
    if tokens is None:
        return None
    content = [
        _spelt(token.text, token.logprob) | {"top_logprobs": [_spelt(text, value) for text, value in token.top]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def text_logprobs(tokens: Sequence[Scored] | None) -> Body | None:
    """`choices[].logprobs` of a completion. The chosen token is always among `top_logprobs`."""
    if tokens is None:
        return None
    tops = []
    for token in tokens:
        top: dict[str, float] = {}
        for text, value in (*token.top, (token.text, token.logprob)):
            top.setdefault(_word(text), value)
        tops.append(top)
    return {
        "tokens": [_word(token.text) for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": tops,
        "text_offset": [token.offset for token in tokens],
    }


def _spelt(text: bytes, logprob: float) -> Body:
    return {"token": _word(text), "logprob": logprob, "bytes": list(text)}


def _word(text: bytes) -> str:
    return text.decode("utf-8", "replace")
