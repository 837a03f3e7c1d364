"""A piece of prompts on its way through the layers: a part of it after each step of those who write.

A piece of a prompt costs much that does not depend on its length: small pieces between steps of a reply would read the
weights, and the text before, again and again. Here a piece is long, and is set aside in the middle instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from backend.cache.blocks import Lease
from backend.engine.request import Request
from backend.engine.scheduler import Work


class Runner(Protocol):
    """Steps that can be set aside: `runner.Runner` on the CPU."""

    def piece_tokens(self, seconds: float) -> int: ...

    def begin(self, work: Sequence[Work]) -> Any: ...

    def go_on(self, going: Any, seconds: float) -> torch.Tensor | None: ...


class Piece:
    """Work whose requests keep their blocks, or it is given up: `valid` before each `go_on`."""

    def __init__(self, runner: Runner, work: Sequence[Work]) -> None:
        self.work = list(work)
        self._runner = runner
        self._as_they_were = [_state(item.request) for item in work]
        self._going = runner.begin(work)

    def valid(self, running: Sequence[Request]) -> bool:
        """Whether nobody of it has ended or had to give up its blocks."""
        return all(
            item.request in running and _state(item.request) == state
            for item, state in zip(self.work, self._as_they_were, strict=True)
        )

    def go_on(self, seconds: float) -> torch.Tensor | None:
        """Some more of it. Returns logits as `Runner.run` when the piece is read, else None."""
        return self._runner.go_on(self._going, seconds)


def _state(request: Request) -> tuple[Lease | None, int, int]:
    return request.lease, request.computed, len(request.ids)
