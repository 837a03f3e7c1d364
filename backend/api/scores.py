"""Log probabilities on their way out: what the engine says of each token, in the words of the two endpoints.

The values are natural logarithms under the model's own distribution, before temperature, penalties and rules.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from backend.events import Chunk, PromptScore

Body = dict[str, Any]


@dataclass(frozen=True)
class Scored:
    """One token of a reply. `offset`: letters of the reply before it. The first of a prompt has no log probability."""

    text: bytes
    logprob: float | None
    top: tuple[tuple[bytes, float], ...]
    offset: int


class Scores:
    """The tokens of one reply, chunk by chunk. Tokens without text, as the end of a reply, are left out.

    With `echo` its prompt comes before, and no token is left out: a client that knows the prompt's ids counts them off.
    """

    def __init__(self, token_bytes: Callable[[int], bytes], top: int, *, every: bool = False) -> None:
        """`top`: how many of the likeliest tokens are wanted. `every`: also tokens without text."""
        self._token_bytes, self._top, self._every = token_bytes, top, every
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._letters = 0

    def take(self, chunk: Chunk) -> tuple[Scored, ...]:
        """The scored tokens of the next chunk."""
        tokens = zip(chunk.ids, chunk.logprobs, chunk.top_logprobs, strict=False)
        return tuple(self._scored(*each) for each in tokens if self._every or self._token_bytes(each[0]))

    def echo(self, prompt: Sequence[int], scores: Sequence[PromptScore], text: str) -> tuple[Scored, ...]:
        """The prompt's tokens, before any of the reply's; `text` is what is said of it."""
        found = [self._scored(prompt[0], None, ())]
        found += [self._scored(token, score.logprob, score.top) for token, score in zip(prompt[1:], scores)]
        more = self._letters - len(text)  # e.g. the space that a vocabulary puts before every text
        self._letters = len(text)
        return tuple(replace(each, offset=max(0, each.offset - more)) for each in found)

    def _scored(self, token: int, logprob: float | None, top: Sequence[tuple[int, float]]) -> Scored:
        text, offset = self._token_bytes(token), self._letters
        self._letters += len(self._decoder.decode(text))
        likeliest = tuple((self._token_bytes(other), value) for other, value in top[: self._top])
        return Scored(text, logprob, likeliest, offset)


def prompt_logprobs(
    prompt: Sequence[int], scores: Sequence[PromptScore], top: int, token_bytes: Callable[[int], bytes]
) -> list[Body | None]:
    """vLLM's `prompt_logprobs`: nothing for the first token, then the `top` likeliest and the prompt's own one."""

    def told(token: int, value: float, rank: int) -> Body:
        return {"logprob": value, "rank": rank, "decoded_token": _word(token_bytes(token))}

    found: list[Body | None] = [None]
    for token, score in zip(prompt[1:], scores):
        own = {str(token): told(token, score.logprob, score.rank)}
        likeliest = {str(other): told(other, value, rank) for rank, (other, value) in enumerate(score.top[:top], 1)}
        found.append(own | likeliest)
    return found


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
    tops: list[dict[str, float] | None] = []
    for token in tokens:
        if token.logprob is None:
            tops.append(None)
            continue
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


def _spelt(text: bytes, logprob: float | None) -> Body:
    return {"token": _word(text), "logprob": logprob, "bytes": list(text)}


def _word(text: bytes) -> str:
    return text.decode("utf-8", "replace")
