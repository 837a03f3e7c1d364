"""Log probabilities of prompts: those of the model read whole, in any pieces, beside others and after preemption."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from backend.cache.blocks import BlockPool
from backend.engine.engine import Engine
from backend.engine.request import Request
from backend.errors import ContextLengthError, NumericalError
from backend.params import GenerationParams
from backend.runtime import Runtime
from tests.real import all_logits, read, tiny_runtime
from tests.test_sampling import with_params
from tests.test_sampling_engine import END, PIECES, Reader, logits_after
from tests.tiny import TinyModel, write_tiny


class AllRows:
    """Takes the runner's place and gives as many rows as a work asks for."""

    def __init__(self, sick_at: int | None = None) -> None:
        self.sick_at, self.evaluated = sick_at, 0

    def copy_blocks(self, orders: Any) -> None: ...

    def run(self, work: Any) -> torch.Tensor:
        rows = []
        for item in work:
            ids, end = item.request.ids, item.request.computed + item.tokens
            self.evaluated += item.tokens
            for place in range(end - item.logit_rows, end):
                rows.append(logits_after(ids[: place + 1]))
                if place == self.sick_at and item.request.score_prompt:
                    rows[-1][4] = float("nan")
        return torch.stack(rows) if rows else torch.zeros(0, len(PIECES))


def scored(engine: Engine, prompt: tuple[int, ...], **options: Any) -> Request:
    params = with_params(max_tokens=8, temperature=0)
    request = Request(prompt, params, frozenset({END}), Reader(), 256, True, 3, score_prompt=True, **options)  # type: ignore[arg-type]
    engine.submit(request)
    return request


def run(engine: Engine) -> None:
    for _ in range(3000):
        if engine.idle:
            return
        engine.step()
    raise AssertionError("it never ends")


def check(request: Request) -> None:
    """Against float64 by hand."""
    assert len(request.prompt_scores) == len(request.prompt) - 1
    for place, score in enumerate(request.prompt_scores):
        logs = torch.log_softmax(logits_after(request.prompt[: place + 1]).double(), 0)
        token = request.prompt[place + 1]
        assert score.logprob == pytest.approx(float(logs[token]), abs=1e-5)
        order = logs.argsort(descending=True).tolist()
        assert score.rank == 1 + order.index(token)
        assert [token for token, _ in score.top] == order[:3]
        assert [value for _, value in score.top] == pytest.approx(logs[order[:3]].tolist(), abs=1e-5)


PROMPT = tuple(1 + (7 * n * n + n) % 10 for n in range(150))


def test_scores_in_pieces_beside_others_and_after_preemption() -> None:
    for blocks, others in ((64, 0), (64, 3), (44, 3)):
        engine = Engine(AllRows(), BlockPool(blocks, 4), prefill_tokens=32)  # type: ignore[arg-type]
        first = [scored(engine, PROMPT[n:]) for n in range(others + 1)]
        run(engine)
        for request in first:
            check(request)
            assert request.listener.reason == "length"  # type: ignore[attr-defined]
        assert engine.blocks.in_use == 0


def test_what_is_in_the_cache_is_read_again_and_then_shared() -> None:
    model = AllRows()
    engine = Engine(model, BlockPool(64, 4))  # type: ignore[arg-type]
    for evaluated in (150 + 7, 300 + 14):
        request = scored(engine, PROMPT)
        run(engine)
        check(request)
        assert model.evaluated == evaluated
    plain = Request(PROMPT, with_params(max_tokens=1), frozenset(), Reader(), 256)  # type: ignore[arg-type]
    engine.submit(plain)
    run(engine)
    assert plain.cached >= 148


def test_only_the_prompt() -> None:
    engine = Engine(AllRows(), BlockPool(64, 4))  # type: ignore[arg-type]
    for prompt in (PROMPT, (5,)):
        request = scored(engine, prompt, only_prompt=True)
        run(engine)
        check(request)
        reader = request.listener
        assert isinstance(reader, Reader)
        assert (reader.ids, reader.reason) == ([], "length")


def test_a_number_that_is_none_ends_that_request_alone() -> None:
    engine = Engine(AllRows(sick_at=40), BlockPool(128, 4), prefill_tokens=32)  # type: ignore[arg-type]
    sick = scored(engine, PROMPT)
    well = Request(PROMPT[3:], with_params(max_tokens=8), frozenset({END}), Reader(), 256)  # type: ignore[arg-type]
    engine.submit(well)
    run(engine)
    assert isinstance(sick.listener.error, NumericalError)  # type: ignore[attr-defined]
    assert well.listener.error is None  # type: ignore[attr-defined]
    assert engine.blocks.in_use == 0


# on a model -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runtime]:
    path = write_tiny(tmp_path_factory.mktemp("scores") / "tiny.gguf", TinyModel(scale=0.3))
    running = tiny_runtime(path, context=256, weights="f32")
    yield running
    running.close(drain=False)


def test_scores_are_those_of_the_model_read_whole(runtime: Runtime) -> None:
    ids = runtime.prompting.encode_text("hello world, " * 12)
    expected = torch.log_softmax(all_logits(runtime, ids).double(), 1)
    generation = runtime.start(ids, GenerationParams(max_tokens=4), top_logprobs=2, score_prompt=True)
    text, reply, _ = read(generation)
    assert len(reply) <= 4
    found = [score.logprob for score in generation.prompt_scores]
    assert found == pytest.approx([float(expected[n, token]) for n, token in enumerate(ids[1:])], abs=1e-5)
    assert all(len(score.top) == 2 for score in generation.prompt_scores)


def test_a_prompt_that_fills_the_context_can_be_scored(runtime: Runtime) -> None:
    ids = [1 + n % 200 for n in range(256)]
    generation = runtime.start(ids, GenerationParams(), score_prompt=True, only_prompt=True)
    _, reply, last = read(generation)
    assert (reply, last.finish_reason, last.stats.completion_tokens) == ([], "length", 0)
    assert len(generation.prompt_scores) == 255
    with pytest.raises(ContextLengthError):
        runtime.start([*ids, 1], GenerationParams(), score_prompt=True, only_prompt=True)
