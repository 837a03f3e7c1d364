"""Random schedules of all that can happen: a reply says what it would have said alone, and no block is lost or shared
by mistake. What happens in them, and what is checked after each step, is in schedules.py."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator

import pytest
import torch

from tests.schedules import KINDS, BrokenError, Schedule

SCHEDULES = 1000


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Steps fail here on purpose, and each would be told with its trace. More threads than one only wait here."""
    logging.disable(logging.CRITICAL)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("part", range(4))
def test_random_schedules_say_what_each_says_alone_and_lose_no_block(part: int) -> None:
    often = Counter[str]()
    for seed in range(part * SCHEDULES // 4, (part + 1) * SCHEDULES // 4):
        schedule = Schedule(seed)
        try:
            schedule.run()
        except (AssertionError, BrokenError) as error:
            raise AssertionError(f"schedule {seed}: {error}") from error
        scheduler = schedule.engine.scheduler
        often += schedule.counts
        often += Counter(
            {
                "preemptions": scheduler.counts.preemptions,
                "guesses that were right": schedule.engine.counts.accepted,
                "found in the cache": sum(request.cached for request in schedule.requests),
                "came back from the host": schedule.pool.counts.restored,
                "read before to the end": sum(request.cached == len(request.prompt) for request in schedule.requests),
                "set aside": schedule.memory.set_aside,
                "forgot the middle": sum(request.shifted > 0 for request in schedule.requests),
                "banned texts": sum(bool(request.params.banned_strings) for request in schedule.requests),
            }
        )
    assert often.keys() >= {*KINDS, "given up"}
    assert min(often.values()) > 20, f"each of these has happened often: {often}"
