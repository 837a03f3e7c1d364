"""A prompt that was read before, to the end, is not evaluated again: its reply is drawn from the logits of then."""

from __future__ import annotations

import pytest
import torch

from backend.engine import ends
from backend.engine.ends import Ends
from backend.engine.request import Request
from backend.params import GenerationParams
from backend.runtime import Runtime
from backend.text.messages import Message
from tests.real import read, starter
from tests.stepping import Nobody

DRAWN = GenerationParams(temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, seed=7, max_tokens=20)


@pytest.fixture
def runtime() -> Runtime:
    runtime = starter("original")
    runtime.blocks.clear()
    return runtime


def prompt_of(runtime: Runtime, about: str) -> list[int]:
    text = f"Tell me about {about}, and about what else there is to say of such things in general. " * 3
    return runtime.prompting.encode_chat([Message("user", text)])


def test_regenerate_evaluates_none_of_the_prompt(runtime: Runtime) -> None:
    """Also where the last token alone would be rounded otherwise than in its prompt (AMX): the reply is the same."""
    ids = prompt_of(runtime, "the sea")
    assert len(ids) > 40
    text, first, _ = read(runtime.start(ids, DRAWN))
    for params, same in ((DRAWN, True), (GenerationParams(seed=8, max_tokens=20), False)):
        before = runtime.runner.tokens_evaluated
        again, reply, last = read(runtime.start(ids, params))
        assert (last.stats.evaluated_tokens, last.stats.cached_tokens) == (0, len(ids))
        guessed = last.stats.drafted_tokens - last.stats.accepted_tokens
        assert runtime.runner.tokens_evaluated - before == len(reply) - 1 + guessed
        assert not same or (again, reply) == (text, first)
    assert runtime.blocks.in_use == 0


def test_at_once_too_but_for_the_block_that_the_first_goes_on_in(runtime: Runtime) -> None:
    ids = prompt_of(runtime, "mountains")
    whole = ids[: len(ids) // 32 * 32]
    read(runtime.start(whole, GenerationParams(max_tokens=1)))
    replies = [read(each) for each in [runtime.start(whole, DRAWN) for _ in range(3)]]
    assert [last.stats.evaluated_tokens for _, _, last in replies] == [0, 0, 0]
    assert replies[0][:2] == replies[1][:2] == replies[2][:2]


def test_what_it_is_not_for(runtime: Runtime) -> None:
    ids = prompt_of(runtime, "rivers")
    read(runtime.start(ids, GenerationParams(max_tokens=4)))
    once = {"evaluated_tokens": len(ids), "cached_tokens": 0}

    def of(generation) -> dict[str, int]:  # type: ignore[no-untyped-def]
        stats = read(generation)[2].stats
        return {name: getattr(stats, name) for name in once}

    assert of(runtime.start(ids, GenerationParams(max_tokens=4), use_cache=False)) == once
    assert of(runtime.start(ids, GenerationParams(max_tokens=4), person="key:somebody else")) == once
    runtime.blocks.clear()  # what was read is gone: its end alone is of no use
    assert of(runtime.start(ids, GenerationParams(max_tokens=4))) == once
    assert of(runtime.start(ids[:-1], GenerationParams(max_tokens=4))) == {
        "evaluated_tokens": 1,
        "cached_tokens": len(ids) - 2,
    }, "another end"


def test_only_the_latest_are_kept_and_each_is_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ends, "MOST", 2)
    kept = Ends()
    asked = [
        Request((number, 5), GenerationParams(), frozenset(), Nobody(), 64)  # type: ignore[arg-type]
        for number in range(3)
    ]
    row = torch.arange(4.0)
    for request in (asked[0], asked[1], asked[0], asked[2]):
        kept.remember(request, row)
    row[0] = 9
    assert kept.after(asked[1]) is None
    for request in (asked[0], asked[2]):
        found = kept.after(request)
        assert found is not None
        assert found.tolist() == [0, 1, 2, 3]
    stranger = Request((0, 5), GenerationParams(), frozenset(), Nobody(), 64, salt=b"x")  # type: ignore[arg-type]
    assert kept.after(stranger) is None, "it is not a prompt of this one's people"
    asked[0].ids.append(1)
    assert kept.after(asked[0]) is None, "it has said something"
    asked[2].score_prompt = True
    assert kept.after(asked[2]) is None, "it wants logits of every token"
    kept.clear()
    assert kept.after(Request((2, 5), GenerationParams(), frozenset(), Nobody(), 64)) is None  # type: ignore[arg-type]
