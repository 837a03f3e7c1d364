"""Random crowds of guided, scored, shifting and plain requests in a small cache: all as alone, and no block lost."""

from __future__ import annotations

import random
from typing import Any

import pytest

from backend.cache.blocks import BlockPool
from backend.engine.engine import Engine
from backend.engine.pairs import add_partner
from backend.engine.request import Request
from backend.engine.speculation import Speculation
from tests.test_prompt_scores import AllRows
from tests.test_sampling import with_params
from tests.test_sampling_engine import END, PIECES, Reader

CONTEXT, BLOCK, BLOCKS = 48, 4, 26


class WithDrafts(AllRows):
    """Also gives the rows after guesses."""

    def run(self, work: Any) -> Any:
        wide = [_Wide(item) for item in work]
        for item in work:
            item.request.ids += item.drafts
        try:
            return super().run(wide)
        finally:
            for item in work:
                del item.request.ids[len(item.request.ids) - len(item.drafts) :]


class _Wide:
    """A work whose drafts are part of its tokens."""

    def __init__(self, item: Any) -> None:
        self.request, self.tokens, self.logit_rows = item.request, item.evaluated, item.logit_rows


def new_request(chance: random.Random) -> tuple[dict[str, Any], dict[str, Any]]:
    """(parameters, options) of a request; the same ones give the same reply."""
    kind = chance.choice(["plain", "guided", "shifting", "scored"])
    values: dict[str, Any] = {"max_tokens": chance.randint(1, 30), "seed": chance.randint(0, 3)}
    if chance.random() < 0.3:
        values["banned_strings"] = ["abc", "ca"]
    if kind == "guided":
        values["guidance_scale"] = chance.choice([0.5, 2.0])
    if kind == "shifting":
        values |= {"max_tokens": 70, "context_shift": True, "ignore_eos": True, "keep_tokens": chance.choice([-1, 2])}
    start = chance.choice([(1, 2, 3, 4, 5, 6, 7, 8, 1, 2), (8, 8, 1, 3)])
    prompt = start + tuple(chance.randint(1, 8) for _ in range(chance.randint(1, 12)))
    return values, {"prompt": prompt, "score_prompt": kind == "scored"}


def submitted(engine: Engine, values: dict[str, Any], options: dict[str, Any]) -> Request:
    request = Request(
        params=with_params(**values), end_ids=frozenset({END}), listener=Reader(), context=CONTEXT,  # type: ignore[arg-type]
        token_bytes=PIECES.__getitem__, **options,
    )  # fmt: skip
    if "guidance_scale" in values:
        add_partner(request, (3, 3, 2, 1, 1), BLOCKS, BLOCK)
    engine.submit(request)
    return request


def engine_of(blocks: int) -> Engine:
    return Engine(WithDrafts(), BlockPool(blocks, BLOCK), prefill_tokens=16, speculation=Speculation())  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(40))
def test_as_alone(seed: int) -> None:
    chance = random.Random(seed)
    asked = [new_request(chance) for _ in range(7)]
    engine, running = engine_of(BLOCKS), []
    waiting = list(asked)
    for _ in range(4000):
        if waiting and chance.random() < 0.3:
            running.append(submitted(engine, *waiting.pop()))
        if running and chance.random() < 0.01:
            chance.choice(running).cancel()
        engine.step()
        if not waiting and engine.idle:
            break
    assert engine.idle
    assert engine.blocks.in_use == 0
    assert not engine._pairs._waiting
    assert not engine._drawing
    for request, (values, options) in zip(running, reversed(asked), strict=True):
        alone = engine_of(BLOCKS)
        twin = submitted(alone, values, options)
        while not alone.idle:
            alone.step()
        found, expected = request.listener, twin.listener
        assert isinstance(found, Reader)
        assert isinstance(expected, Reader)
        assert found.error is None
        if request.cancelled and found.reason == "cancelled":
            # Where it was stopped a banned text may have begun: that is shown then, else it would be taken back.
            sure = len(found.ids) - (len("abc") - 1 if request.params.banned_strings else 0)
            assert found.ids[: max(0, sure)] == expected.ids[: max(0, sure)]
            continue
        assert (found.ids, found.reason) == (expected.ids, expected.reason)
        assert request.prompt_scores == twin.prompt_scores
        assert len(request.prompt_scores) == (len(request.prompt) - 1 if options["score_prompt"] else 0)
