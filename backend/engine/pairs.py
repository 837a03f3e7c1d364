"""Guided replies: two sequences, one of which reads the negative prompt, and whose logits are drawn from together.

The two need not end their prompts in the same step; whichever is first keeps its logits until the other has its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from backend.cache.blocks import Lease
from backend.engine.request import Request
from backend.errors import ContextLengthError


@dataclass(frozen=True)
class _Logits:
    """What one of two has, and of which of its tokens, computed in which blocks."""

    lease: Lease | None
    length: int
    logits: torch.Tensor


class Pairs:
    """Logits that wait for those of the other sequence. Belongs to the engine thread."""

    def __init__(self) -> None:
        self._waiting: dict[Request, _Logits] = {}

    def join(self, request: Request, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Logits float32 (vocab,) of one of two; both, the leader's first, when the other's are here as well.

        What was computed before the two gave up their blocks does not count: they read again, and come again.
        """
        # A copy, since the step's own tensor may be used again.
        self._waiting[request] = _Logits(request.lease, len(request.ids), logits.clone())
        own, other = (self._of(each) for each in request.together())
        if own is None or other is None:
            return None
        self.forget(request)
        return own, other

    def _of(self, request: Request) -> torch.Tensor | None:
        found = self._waiting.get(request)
        if found is None or found.lease is not request.lease or found.length != len(request.ids):
            return None
        return found.logits

    def forget(self, request: Request) -> None:
        """The reply is over, or goes back."""
        for each in request.together():
            self._waiting.pop(each, None)


def add_partner(request: Request, negative: Sequence[int], blocks: int, block_size: int) -> None:
    """Give a request that was not submitted yet a partner that reads these ids, and room in the cache for both.

    `blocks` of `block_size` tokens are all there are; the reply ends where they end. Raises ContextLengthError when the
    prompts leave no room for a reply.
    """
    own, other = len(request.prompt), len(negative)
    room = min(request.context - max(own, other), (blocks * block_size - own - other) // 2)
    while room > 0 and -(-(own + room) // block_size) - (-(other + room) // block_size) > blocks:
        room -= 1
    if room < 1:
        raise ContextLengthError(
            f"guidance reads the prompt, {own} tokens, and the negative prompt, {other} tokens, side by side; the "
            f"context holds {request.context} and the cache {blocks * block_size} for both, so there is no room for a "
            "reply",
            n_prompt_tokens=own + other,
            n_ctx=request.context,
        )
    request.context = own + room
    request.partner = Request(
        prompt=tuple(negative),
        params=request.params,
        end_ids=request.end_ids,
        listener=request.listener,
        context=other + room,
        use_cache=request.use_cache,
        salt=request.salt,
        person=request.person,
        clock=request.clock,
    )
    request.partner.leader = request
