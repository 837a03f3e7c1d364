"""Guesses for tests: taken from what will be said, with a wrong one now and then. So there are always some, right and
wrong ones, whatever a model says and however long its steps take."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from backend.engine.request import Request
from backend.engine.scheduler import Work
from backend.params import GenerationParams

Asked = tuple[tuple[int, ...], GenerationParams]


class Told:
    """In place of an engine's `Speculation`."""

    def __init__(self, said: Mapping[Asked, Sequence[int]], most: int = 3, wrong_at: int = 5) -> None:
        """said: the ids of each reply. wrong_at: of every so many tokens of a reply, one is guessed wrongly."""
        self._said, self._most, self._wrong_at = said, most, wrong_at

    def add_drafts(self, work: Sequence[Work], room: Callable[[Request, int], int], slower: float) -> list[Work]:
        return [self._guessed(item, room) for item in work]

    def _guessed(self, item: Work, room: Callable[[Request, int], int]) -> Work:
        request = item.request
        said = self._said.get((request.prompt, request.params), ())
        at, left = request.completion_tokens, request.max_length - len(request.ids) - 1
        right = said[at : at + min(self._most, max(0, left))]
        if not item.draws or not right:
            return item
        guesses = [token + ((at + n + 1) % self._wrong_at == 0) for n, token in enumerate(right)]
        return replace(item, drafts=tuple(guesses[: room(request, len(guesses))]))

    def observe(self, work: Sequence[Work], seconds: float) -> float:
        return 1.0

    def observe_draws(self, draws: int, seconds: float) -> None: ...

    def rewound(self, request: Request) -> None: ...

    def forget(self, request: Request) -> None: ...
