"""A step for which memory does not suffice: smaller pieces first, then one request less, and the others go on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch

from backend.engine.request import Request
from backend.engine.scheduler import Work
from backend.errors import OutOfMemoryError
from backend.memory import free_bytes, give_back, is_allocation_failure, without_frames
from backend.units import show_bytes

SMALLEST_PIECE = 16  # tokens of a prompt at a time, when memory is short

log = logging.getLogger(__name__)


def run_step(
    run: Callable[[Sequence[Work]], torch.Tensor], work: list[Work], end: Callable[[Request, Exception], None]
) -> tuple[list[Work], torch.Tensor]:
    """`run(work)`, and what was evaluated in the end: less than `work` when memory ran out on the way.

    Drafts are left out first, then long prompts are read in smaller pieces. When that does not help, the request whose
    work is largest is ended (`end`), since it needs most. Nothing has advanced before `run` returns, so a step can be
    repeated.
    """
    piece = max((item.tokens for item in work), default=0)
    while work:
        try:
            return work, run(work)
        except Exception as error:
            if not is_allocation_failure(error):
                raise
            without_frames(error)
        give_back()
        if any(item.drafts for item in work):
            work = [Work(item.request, item.tokens) for item in work]
            continue
        if piece > SMALLEST_PIECE:
            piece = max(SMALLEST_PIECE, piece // 2)
            log.warning("out of memory in a step: reading at most %d tokens at a time", piece)
            work = [Work(item.request, min(item.tokens, piece)) for item in work]
            continue
        largest = max(work, key=lambda item: (item.tokens, len(item.request.ids)))
        work = [item for item in work if item.request not in largest.request.together()]
        log.warning("out of memory in a step: request %s is ended", largest.request.id)
        free = free_bytes()
        message = f"memory ran out while this reply was computed, {show_bytes(free)} are free"
        end(largest.request, OutOfMemoryError(f"{message}; shorten the chat or load a smaller preset", free_bytes=free))
    return [], torch.empty(0)
