"""Guidance with a negative prompt: the words of transformers' generate, and the same words however the engine runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from backend.cache.blocks import BlockPool
from backend.engine.engine import Engine
from backend.engine.pairs import add_partner
from backend.engine.request import Request
from backend.errors import ContextLengthError, NumericalError, ParameterError
from backend.params import GenerationParams
from backend.runtime import Runtime
from backend.sampling.guidance import guided
from backend.text.messages import Message
from tests.oracle import reference_model
from tests.real import read, tiny_runtime
from tests.test_sampling import with_params
from tests.test_sampling_engine import END, PIECES, ModelOfIds, Reader, finished, logits_after
from tests.tiny import TinyModel, write_tiny

NEGATIVE = (7, 8, 8, 1, 2)


def guided_request(engine: Engine, prompt: tuple[int, ...] = (1, 2, 3), **values: Any) -> Request:
    params = with_params(**{"max_tokens": 30, "guidance_scale": 1.8} | values)
    options: dict[str, Any] = {"want_logprobs": True, "token_bytes": PIECES.__getitem__}
    request = Request(prompt, params, frozenset({END}), Reader(), 256, **options)  # type: ignore[arg-type]
    add_partner(request, NEGATIVE, engine.blocks.n_blocks, engine.blocks.block_size)
    engine.submit(request)
    return request


def engine_of(blocks: int = 64, model: Any = None) -> Engine:
    return Engine(model or ModelOfIds(), BlockPool(blocks, 4))


def by_hand(prompt: tuple[int, ...], scale: float, count: int) -> list[int]:
    """Greedy, in float64, both prompts read whole for each token."""
    ids: list[int] = []
    while len(ids) < count:
        own, other = (torch.log_softmax(logits_after([*start, *ids]).double(), 0) for start in (prompt, NEGATIVE))
        ids.append(int((other + scale * (own - other)).argmax()))
        if ids[-1] == END:
            break
    return ids


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.5, 3.0])
def test_a_reply_is_the_one_by_hand(scale: float) -> None:
    engine = engine_of()
    reader = finished(engine, guided_request(engine, temperature=0, guidance_scale=scale))
    assert reader.ids == by_hand((1, 2, 3), scale, 30)
    assert engine.blocks.in_use == 0
    for place, token in enumerate(reader.ids):
        expected = torch.log_softmax(logits_after([1, 2, 3, *reader.ids[:place]]), 0)[token]
        assert reader.logprobs[place] == pytest.approx(float(expected), abs=1e-5), "the model's own, unguided"


def test_what_is_impossible_stays_so() -> None:
    logits, negative = torch.tensor([1.0, float("-inf"), 2.0, 0.0]), torch.tensor([0.5, float("-inf"), 1.0, 3.0])
    mixed = guided(logits, negative, 2.0)
    assert mixed[1] == float("-inf")
    assert torch.isfinite(mixed[[0, 2, 3]]).all()
    torch.testing.assert_close(guided(logits, negative, 1.0)[[0, 2, 3]], torch.log_softmax(logits, 0)[[0, 2, 3]])


VALUES: dict[str, Any] = {"seed": 4, "top_k": 8, "repetition_penalty": 1.2, "banned_strings": ["abc", "ca"]}


def test_the_same_beside_others_and_when_blocks_run_out() -> None:
    engine = engine_of()
    expected = finished(engine, guided_request(engine, **VALUES)).ids
    assert expected != finished(engine, guided_request(engine, **VALUES | {"seed": 5})).ids
    # 20 blocks of 4: a pair needs up to 18, so they push each other out again and again
    engine = engine_of(blocks=20)
    requests = [guided_request(engine, **VALUES)]
    requests += [guided_request(engine, (1, 2, n), **VALUES | {"seed": n}) for n in (4, 5)]
    plain = Request((1, 2, 9), with_params(max_tokens=30, seed=1), frozenset({END}), Reader(), 256)  # type: ignore[arg-type]
    engine.submit(plain)
    steps = 0
    while not engine.idle:
        engine.step()
        steps += 1
        assert steps < 2000
        running = engine.scheduler.running
        assert all(each in running for request in running for each in request.together()), "both or none"
    assert requests[0].listener.ids == expected  # type: ignore[attr-defined]
    assert engine.scheduler.counts.preemptions > 0
    assert engine.blocks.in_use == 0
    assert not engine._pairs._waiting


def test_stop_frees_both() -> None:
    engine = engine_of()
    request = guided_request(engine, max_tokens=0, ignore_eos=True)
    for _ in range(9):
        engine.step()
    assert engine.blocks.in_use > 0
    request.cancel()
    engine.step()
    assert engine.blocks.in_use == 0
    assert engine.idle
    reader = request.listener
    assert isinstance(reader, Reader)
    assert reader.reason == "cancelled"


def test_a_number_that_is_none_in_the_negative_half_ends_the_reply() -> None:
    class Sick(ModelOfIds):
        def run(self, work: Any) -> torch.Tensor:
            rows = super().run(work)
            at = [item.request for item in work if item.gives_logits]
            for row, request in enumerate(at):
                if request.leader is not None and len(request.ids) > 8:
                    rows[row, 3] = float("nan")
            return rows

    engine = engine_of(model=Sick())
    request, other = guided_request(engine), Request((5,), with_params(max_tokens=9), frozenset(), Reader(), 256)  # type: ignore[arg-type]
    engine.submit(other)
    reader = finished(engine, request)
    assert isinstance(reader.error, NumericalError)
    assert other.listener.reason == "length"  # type: ignore[attr-defined]
    assert engine.blocks.in_use == 0


def test_room_for_both() -> None:
    engine = engine_of(blocks=10)
    request = guided_request(engine, prompt=(1, 2, 3), max_tokens=0, ignore_eos=True)
    finished(engine, request)
    assert request.completion_tokens == 15, "3 + 15 and 5 + 15 tokens are 5 blocks each"
    with pytest.raises(ContextLengthError, match="side by side"):
        guided_request(engine, prompt=tuple([1] * 36))


# on a model -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return write_tiny(tmp_path_factory.mktemp("guided") / "tiny.gguf", TinyModel(scale=0.3))


@pytest.fixture(scope="module")
def runtime(path: Any) -> Iterator[Runtime]:
    running = tiny_runtime(path, context=256, weights="f32")
    yield running
    running.close(drain=False)


@pytest.mark.parametrize("negative", ["a dull world", ""])
def test_the_words_are_those_of_transformers(runtime: Runtime, path: Any, negative: str) -> None:
    params = GenerationParams(temperature=0.0, max_tokens=24, guidance_scale=1.7, negative_prompt=negative)
    params = GenerationParams.from_mapping({"ignore_eos": True}, params)
    text, ids, last = read(runtime.start_text("hello world in the", params))
    prompt = torch.tensor([runtime.prompting.encode_text("hello world in the")])
    given = {"negative_prompt_ids": torch.tensor([runtime.prompting.encode_text(negative)])} if negative else {}
    model = reference_model(path)
    theirs = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=24, guidance_scale=1.7,
        eos_token_id=None, pad_token_id=0, suppress_tokens=sorted(runtime.prompting.end_ids), **given,
    )  # fmt: skip
    assert ids == theirs[0, prompt.shape[1] :].tolist()
    assert last.stats.completion_tokens == 24


def test_in_a_chat_it_is_another_system_prompt(runtime: Runtime) -> None:
    chat = [Message("system", "be kind"), Message("user", "hello")]
    base = {"temperature": 0, "max_tokens": 20, "guidance_scale": 2.0}
    found = read(runtime.start_chat(chat, GenerationParams.from_mapping(base | {"negative_prompt": "be rude"})))[1]
    ids = runtime.prompting.encode_chat(chat)
    other = runtime.prompting.encode_chat([Message("system", "be rude"), chat[1]])
    expected = read(runtime.start(ids, GenerationParams.from_mapping(base), negative=other))[1]
    assert found == expected
    assert found != read(runtime.start_chat(chat, GenerationParams(temperature=0.0, max_tokens=20)))[1]


def test_the_cache_serves_both(runtime: Runtime) -> None:
    params = GenerationParams(temperature=0.0, max_tokens=6, guidance_scale=1.5, negative_prompt="one two three four")
    first = read(runtime.start_text("the world in hello there", params))
    evaluated = runtime.runner.tokens_evaluated
    again = read(runtime.start_text("the world in hello there", params))
    assert again[1] == first[1]
    assert runtime.runner.tokens_evaluated - evaluated <= 2 * 6, "no prompt is read twice"


def test_what_does_not_go_together(runtime: Runtime) -> None:
    with pytest.raises(ParameterError, match="not together with guidance_scale"):
        runtime.start_text("hello", GenerationParams(guidance_scale=1.5, context_shift=True))


def test_on_packed_weights_beside_others_in_a_small_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Real keys and values, changing places all the time: guided, shifting and scored replies as alone."""
    path = write_tiny(tmp_path_factory.mktemp("packed") / "tiny.gguf", TinyModel(weights="Q4_1", scale=0.3))
    roomy = tiny_runtime(path, context=128, kv_tokens=4096)
    tight = tiny_runtime(path, context=128, kv_tokens=256)
    for each in (roomy, tight):
        each.runner.be_uniform()
    try:
        base = {"temperature": 1.0, "max_tokens": 50, "ignore_eos": True}
        kinds: list[dict[str, Any]] = [
            {"guidance_scale": 1.6, "negative_prompt": "in the world"},
            {"context_shift": True, "max_tokens": 150},
            {},
        ]
        asked = [
            (f"hello world {number % 2} the", GenerationParams.from_mapping(base | kind | {"seed": number}), not kind)
            for number, kind in enumerate(kinds * 3)
        ]
        alone = []
        for text, params, scored in asked:
            generation = roomy.start_text(text, params, score_prompt=scored)
            alone.append((read(generation)[1], list(generation.prompt_scores)))
        together = [tight.start_text(text, params, score_prompt=scored) for text, params, scored in asked]
        found = [(read(generation)[1], list(generation.prompt_scores)) for generation in together]
        assert found == alone
        assert tight.worker._engine.scheduler.counts.preemptions > 0
        assert tight.blocks.in_use == 0
    finally:
        roomy.close(drain=False)
        tight.close(drain=False)
