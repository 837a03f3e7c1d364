"""A reply that goes on when the context is full: what is forgotten, and that nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest

from backend.cache.blocks import BlockPool
from backend.engine.engine import Engine
from backend.engine.request import Request, middle
from backend.engine.speculation import Speculation
from backend.params import GenerationParams
from tests.real import read, tiny_runtime
from tests.test_sampling import with_params
from tests.test_sampling_engine import END, PIECES, ModelOfIds, Reader, finished, logits_after

CONTEXT = 40


def request(engine: Engine, prompt: tuple[int, ...] = (1, 2, 3, 4, 5, 6), **values: Any) -> Request:
    params = with_params(**{"max_tokens": 100, "temperature": 0, "ignore_eos": True, "context_shift": True} | values)
    asked = Request(prompt, params, frozenset({END}), Reader(), CONTEXT, token_bytes=PIECES.__getitem__)  # type: ignore[arg-type]
    engine.submit(asked)
    return asked


def by_hand(prompt: tuple[int, ...], keep: int, count: int) -> list[int]:
    """llama.cpp's rule, token by token: when the context is full, keep the beginning and the later half of the rest."""
    ids, said = list(prompt), []
    while len(said) < count:
        logits = logits_after(ids)
        logits[END] = float("-inf")
        said.append(int(logits.argmax()))
        ids.append(said[-1])
        if len(ids) == CONTEXT and len(said) < count:
            del ids[keep : keep + (len(ids) - keep) // 2]
    return said


@pytest.mark.parametrize("keep", [-1, 0, 2, 1000])
def test_the_middle_is_forgotten(keep: int) -> None:
    engine = Engine(ModelOfIds(), BlockPool(40, 4))  # type: ignore[arg-type]
    asked = request(engine, keep_tokens=keep)
    reader = finished(engine, asked)
    assert reader.ids == by_hand(asked.prompt, {-1: 6, 1000: 30}.get(keep, keep), 100)
    stats = asked.stats()
    assert reader.reason == "length"
    assert stats.completion_tokens == 100
    assert stats.shifted_tokens == 106 - len(asked.ids) > 0
    assert stats.used_tokens == len(asked.ids) <= CONTEXT
    assert engine.blocks.in_use == 0


@pytest.mark.parametrize(("length", "keep"), [(20, 0), (35, -1)])
def test_what_is_left_may_be_as_long_as_the_prompt_and_is_not_the_prompt(length: int, keep: int) -> None:
    """What comes after a whole prompt is remembered: of these, that is to be found which comes after the prompt."""
    engine = Engine(ModelOfIds(), BlockPool(400, 4))  # type: ignore[arg-type]
    prompt = tuple(1 + n % 8 for n in range(length))
    for shifts in (True, True, False):
        asked = request(engine, prompt, keep_tokens=keep, context_shift=shifts)
        count = 100 if shifts else CONTEXT - length
        assert finished(engine, asked).ids == by_hand(prompt, 30 if keep < 0 else keep, 100)[:count]
    assert asked.evaluated == 0


def test_without_it_the_reply_ends_there() -> None:
    for values in ({"context_shift": False}, {"max_tokens": 0}):
        engine = Engine(ModelOfIds(), BlockPool(40, 4))  # type: ignore[arg-type]
        asked = request(engine, **values)
        reader = finished(engine, asked)
        assert (len(asked.ids), reader.reason, asked.shifted) == (CONTEXT, "length", 0)


def test_the_same_beside_others_when_blocks_run_out_and_with_guesses() -> None:
    values: dict[str, Any] = {"temperature": 1, "seed": 3, "banned_strings": ["abca", "bc"], "repetition_penalty": 1.1}
    engine = Engine(ModelOfIds(), BlockPool(40, 4))  # type: ignore[arg-type]
    expected = finished(engine, request(engine, **values)).ids
    assert len(expected) == 100
    engine = Engine(ModelOfIds(), BlockPool(17, 4))  # type: ignore[arg-type]
    requests = [request(engine, **values), *(request(engine, (1, 2, n), **values) for n in (5, 6))]
    assert finished(engine, *requests).ids == expected
    assert engine.scheduler.counts.preemptions > 0


def test_what_is_left_can_always_be_taken_back() -> None:
    engine = Engine(ModelOfIds(), BlockPool(40, 4))  # type: ignore[arg-type]
    asked = request(engine)
    asked.ids = list(range(CONTEXT))
    for held in range(30):
        start, tokens = middle(asked, held)
        assert start == 6
        assert 1 <= tokens <= max(1, CONTEXT - 6 - held)


def test_on_a_model_with_speculation(tiny_path) -> None:
    runtime = tiny_runtime(tiny_path(scale=0.3), context=64, weights="f32")
    try:
        assert isinstance(runtime.worker._engine.speculation, Speculation)
        params = GenerationParams.from_mapping(
            {"max_tokens": 150, "temperature": 0, "ignore_eos": True, "context_shift": True}
        )
        ids = runtime.prompting.encode_text("hello world")
        text, reply, last = read(runtime.start(ids, params))
        assert len(reply) == 150
        assert last.finish_reason == "length"
        assert last.stats.shifted_tokens > 0
        # the slow twin: every window read afresh by a request of its own
        window, said = list(ids), []
        while len(said) < 150:
            part = GenerationParams.from_mapping({"max_tokens": 64 - len(window), "context_shift": False}, params)
            part = GenerationParams.from_mapping({"max_tokens": min(part.max_tokens, 150 - len(said))}, part)
            new = read(runtime.start(window, part, use_cache=False))[1]
            said, window = said + new, window + new
            del window[len(ids) : len(ids) + (len(window) - len(ids)) // 2]
        assert reply == said
    finally:
        runtime.close(drain=False)
