"""Whose place a waiting request may have, and whether that is enough. Plain Python: decides, changes nothing.

Blocks that several hold are given back only when the last of them gives up, so what somebody's place is worth is asked
of the pool for all who would go, and nobody has to go when it is not enough in the end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from backend.cache.blocks import BlockPool
from backend.engine.request import Request

MAX_RUNNING = 16  # sequences
NO_TOKEN = -1  # equal to none


def wanted_of(request: Request) -> tuple[Sequence[int], int]:
    """What of its ids is looked up in the cache, and for how many tokens it needs room to begin."""
    looked_up = request.use_cache and not request.score_prompt  # what is found there has no logits
    ids: Sequence[int] = request.ids if looked_up else request.ids[:1]
    if request.end_known:
        ids = [*ids, NO_TOKEN]  # the last one is left to evaluate, and this is none
    return ids, min(len(request.ids) + 1, request.max_length)


def who_makes_room(request: Request, running: Sequence[Request], pool: BlockPool) -> list[Request] | None:
    """Who has to give up so that the waiting `request`, with its partner, can run: the latest of people who still have
    more then than its own person would have. Empty where there is room; None where there is none without more.

    `running`: oldest first; the oldest never has to.
    """
    together, victims = request.together(), list[Request]()
    while True:
        left = [each for each in running if not any(each in victim.together() for victim in victims)]
        leases = [each.lease for victim in victims for each in victim.together() if each.lease is not None]
        seats = len(left) + len(together) - MAX_RUNNING
        needed = sum(pool.needed(*_looked_up(each), leaving=leases) for each in together)
        if seats <= 0 and needed <= pool.available_without(leases):
            return victims
        victim = _next_victim(request, left, pool.block_size, seats=seats > 0)
        if victim is None:
            return None
        victims.append(victim)


def latest(running: Sequence[Request]) -> dict[str, Request]:
    """The youngest running request of each person; never the oldest of all."""
    oldest = running[0].together() if running else []
    return {request.person: request for request in running if request not in oldest}


def held_blocks(running: Sequence[Request]) -> Counter[str]:
    """How many blocks each person's sequences have; those that several have count for each."""
    held = Counter[str]()
    for request in running:
        held[request.person] += _blocks(request)
    return held


def _next_victim(request: Request, running: Sequence[Request], block_size: int, *, seats: bool) -> Request | None:
    """`seats`: what is wanting are places among those who run, else blocks. Pairs count as the two that they are."""
    last, together = latest(running), request.together()
    if seats:
        has, needed = Counter(each.person for each in running), len(together)
        given = {person: len(each.together()) for person, each in last.items()}
    else:
        has, needed = held_blocks(running), sum(-(-wanted_of(each)[1] // block_size) for each in together)
        given = {person: sum(map(_blocks, each.together())) for person, each in last.items()}
    own = has[request.person] + needed
    others = [other for other in last if other != request.person and has[other] - given[other] >= own]
    return last[max(others, key=lambda other: has[other])] if others else None


def _looked_up(request: Request) -> tuple[Sequence[int], bytes, int]:
    ids, tokens = wanted_of(request)
    return ids, request.salt, tokens


def _blocks(request: Request) -> int:
    return len(request.lease.blocks) if request.lease is not None else 0
