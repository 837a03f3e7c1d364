"""What a chat's replies were drawn as, where their text alone would be other tokens.

A chat comes back as text, and a sampled reply may have been drawn as other tokens than its text is cut into: "ex" and
"am" where the vocabulary has "exam". Read as text, everything after that place would be evaluated anew, though the
model has said it itself a moment ago. So replies whose text is cut otherwise are remembered: when the same text stands
in the same place of a chat again, between the same control tokens, it is the tokens that were drawn.

Plain Python, no torch. Nothing is shared between people whose caches are not (`salt`).
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from backend.engine.request import Listener
from backend.events import FinishReason
from backend.tokenizer.base import Tokenizer
from backend.tokenizer.segments import Segment

MOST = 500_000  # tokens that are remembered, of all chats together; the latest stay
WAITING = 256  # replies that nobody has gone on from yet

Key = tuple[bytes, tuple[int, ...], tuple[int, ...]]  # salt, what stands before the text, the text's own tokens


@dataclass(frozen=True)
class _Reply:
    salt: bytes
    prompt: Sequence[int]
    ids: Sequence[int]


class Said:
    """Of one loaded model. May be used from any thread."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._spelling = {token: text for text, token in tokenizer.control_tokens().items()}
        self._lock = threading.Lock()
        self._new: deque[_Reply] = deque(maxlen=WAITING)
        self._known: OrderedDict[Key, tuple[int, ...]] = OrderedDict()  # -> the tokens that were drawn
        self._size = 0  # tokens in there

    def listening(self, listener: Listener, prompt: Sequence[int], salt: bytes) -> Listener:
        """The same listener; what it hears as the reply to this prompt is remembered."""
        controls = self._controls(prompt)
        return _Listening(listener, self, prompt[controls[-2:][0] :] if controls else (), salt)

    def add(self, prompt: Sequence[int], ids: Sequence[int], salt: bytes) -> None:
        """A reply is over. Only written down: the engine must not wait until its text is cut into tokens again."""
        self._new.append(_Reply(salt, prompt, ids))

    def as_said(self, ids: Sequence[int], salt: bytes) -> list[int]:
        """The ids of a chat's prompt, with replies as they were drawn."""
        with self._lock:
            while self._new:
                self._learn(self._new.popleft())
            found: list[int] = []
            done = 0
            for before, start, end in self._texts(ids) if self._known else ():
                key = salt, tuple(ids[before:start]), tuple(ids[start:end])
                drawn = self._known.get(key)
                if drawn is None or end == len(ids):  # the last text is where a reply begins
                    continue
                self._known.move_to_end(key)
                found += ids[done:start]
                found += drawn
                done = end
            return [*found, *ids[done:]]

    def _learn(self, reply: _Reply) -> None:
        controls = self._controls(reply.prompt)
        if not controls or any(token in self._spelling for token in reply.ids):
            return
        last, before = controls[-1], controls[-2:][0]
        drawn = (*reply.prompt[last + 1 :], *reply.ids)
        try:
            text = b"".join(map(self._tokenizer.token_bytes, drawn)).decode()
        except UnicodeDecodeError:  # it ended within a character
            return
        start = Segment(self._spelling[reply.prompt[last]], control=True)
        read = tuple(self._tokenizer.encode_segments([start, Segment(text)])[1:])
        if read == drawn:
            return
        key = reply.salt, tuple(reply.prompt[before : last + 1]), read
        self._size += _size(key, drawn) - _size(key, self._known.pop(key, ()))
        self._known[key] = drawn
        while self._size > MOST and len(self._known) > 1:
            self._size -= _size(*self._known.popitem(last=False))

    def _controls(self, ids: Sequence[int]) -> list[int]:
        """Places of control tokens."""
        return [place for place, token in enumerate(ids) if token in self._spelling]

    def _texts(self, ids: Sequence[int]) -> Iterator[tuple[int, int, int]]:
        """Of each text after a control token: where the control token before that one is, where the text begins, and
        where it ends."""
        controls = self._controls(ids)
        for before, place, end in zip([*controls[:1], *controls], controls, [*controls[1:], len(ids)], strict=False):
            if place + 1 < end:
                yield before, place + 1, end


class _Listening:
    """Hands on what it hears."""

    def __init__(self, listener: Listener, said: Said, prompt: Sequence[int], salt: bytes) -> None:
        self._listener, self._said, self._prompt, self._salt = listener, said, prompt, salt
        self._ids: list[int] = []

    def on_token(self, token_id: int, logprob: float | None, *, visible: bool = True, top: Any = ()) -> bool:
        if visible:
            self._ids.append(token_id)
        return self._listener.on_token(token_id, logprob, visible=visible, top=top)

    def on_finish(self, reason: FinishReason, error: Exception | None = None) -> None:
        if error is None:
            self._said.add(self._prompt, self._ids, self._salt)
        self._listener.on_finish(reason, error)


def _size(key: Key, drawn: Sequence[int]) -> int:
    _, before, read = key
    return len(before) + len(read) + len(drawn) if drawn else 0
