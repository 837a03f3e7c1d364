"""Speculation on real models: the same tokens with it and without, through the caches and products that we ship."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from backend.engine import speculation, speculation_guess
from backend.engine.request import Request
from backend.engine.scheduler import Work
from backend.engine.speculation import MOST_ALIKE, MOST_IN_STEP, Speculation
from backend.errors import PresetError
from backend.events import Chunk
from backend.models import ModelFolder
from backend.params import GenerationParams
from backend.presets import PresetFolder
from backend.runtime import Prepared, Runtime
from backend.settings import PROJECT, Settings
from tests.real import read
from tests.stepping import Nobody
from tests.test_speculation import FREE
from tests.tiny import TinyModel, write_tiny

WORDS = "one two three four five six seven eight nine ten"


def loaded(path: Path, **changes: Any) -> Runtime:
    preset = dataclasses.replace(PresetFolder(Settings().presets_dir).read("starter"), name="test", **changes)
    runtime = Runtime(Prepared(preset, path), max_waiting=64)
    runtime.runner.be_uniform()  # prompts are cut in other ways beside others
    return runtime


def always(runtime: Runtime) -> Runtime:
    """Guesses as wide as they come, whatever they cost here: more than anybody would have."""
    most = MOST_IN_STEP if runtime.runner.in_one_call else MOST_ALIKE
    runtime.worker._engine.speculation = Speculation(FREE, most_in_step=most)
    return runtime


def ids_of(runtime: Runtime, prompts: Sequence[Sequence[int]], values: dict[str, Any]) -> tuple[list[list[int]], Chunk]:
    """All at once."""
    params = [GenerationParams.from_mapping({**values, "seed": seed}) for seed in range(len(prompts))]
    replies = [runtime.start(ids, each, use_cache=False) for ids, each in zip(prompts, params, strict=True)]
    found = [read(reply) for reply in replies]
    return [ids for _, ids, _ in found], found[-1][2]


@pytest.fixture(scope="module", params=["tiny f32", "starter"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Runtime, Runtime]]:
    """Without speculation, and with."""
    if request.param == "starter":
        path = ModelFolder(Settings().models_dir).resolve("starter", PROJECT)
        changes: dict[str, Any] = {"context": 512}
    else:
        path = write_tiny(tmp_path_factory.mktemp("tiny") / "tiny.gguf", TinyModel(scale=0.3))
        changes = {"context": 256, "weights": "f32"}
    with pytest.MonkeyPatch.context() as patch:  # every guess that there is, however hopeless
        patch.setattr(speculation, "UNUSED", 10**9)
        patch.setattr(speculation_guess, "HOPELESS", 0.0)
        runtimes = loaded(path, speculation="off", **changes), always(loaded(path, **changes))
        yield runtimes
        for runtime in runtimes:
            runtime.close(drain=False)


SAMPLED: list[dict[str, Any]] = [
    {"temperature": 0, "max_tokens": 40},
    {"temperature": 0.8, "max_tokens": 16},
    {"temperature": 0.7, "max_tokens": 16, "repetition_penalty": 1.1, "mirostat": 2},
    {"temperature": 0, "max_tokens": 16, "banned_strings": [" the", "e "], "min_tokens": 12},
]


@pytest.mark.parametrize("values", SAMPLED, ids=repr)
def test_the_same_ids_alone_and_beside_others(both: tuple[Runtime, Runtime], values: dict[str, Any]) -> None:
    plain, speculating = both
    prompts = [plain.prompting.encode_text(f"{WORDS}, {n} {WORDS} {WORDS[: 9 + 5 * n]}") for n in range(4)]
    expected = [ids_of(plain, [prompt], values)[0][0] for prompt in prompts]
    alone = [ids_of(speculating, [prompt], values)[0][0] for prompt in prompts]
    assert alone == expected
    values_of = [{**values, "seed": 0}] * len(prompts)
    replies = [
        speculating.start(prompt, GenerationParams.from_mapping(each))
        for prompt, each in zip(prompts, values_of, strict=True)
    ]
    assert [read(reply)[1] for reply in replies] == expected
    counts = speculating.worker._engine.counts
    assert 0 < counts.accepted < counts.drafted
    assert plain.worker._engine.counts.drafted == 0


def test_a_reply_says_how_many_guesses_were_right(both: tuple[Runtime, Runtime]) -> None:
    prompt = both[1].prompting.encode_text(f"{WORDS} {WORDS} {WORDS}")
    stats = ids_of(both[1], [prompt], {"temperature": 0, "max_tokens": 40})[1].stats
    assert 0 <= stats.accepted_tokens <= stats.drafted_tokens
    assert stats.drafted_tokens > 0
    assert stats.accepted_tokens < stats.completion_tokens


def test_the_next_turn_reads_only_what_is_new(both: tuple[Runtime, Runtime]) -> None:
    """And what it finds is what it would have computed."""
    plain, speculating = both
    values = {"temperature": 0, "max_tokens": 40, "ignore_eos": True}
    params = GenerationParams.from_mapping(values)
    prompt = plain.prompting.encode_text(f"{WORDS} and {WORDS}")
    said = read(speculating.start(prompt, params))[1]
    more = [*prompt, *said, *prompt[1:9]]
    evaluated = speculating.runner.tokens_evaluated
    _, ids, last = read(speculating.start(more, params))
    assert last.stats.evaluated_tokens == 9, "the last token of the first reply, and the new ones"
    assert last.stats.cached_tokens == len(more) - 9
    drafted = last.stats.drafted_tokens
    assert speculating.runner.tokens_evaluated - evaluated == 9 + drafted + 39 - last.stats.accepted_tokens
    assert ids == read(plain.start(more, params, use_cache=False))[1]


@pytest.mark.parametrize("weights", ["bf16", "f16", "f32", "int4"])
def test_rows_of_guesses_have_the_bits_of_single_tokens(tmp_path: Path, weights: str) -> None:
    """Through torch, for as many tokens as a step with guesses has there; through the compiled step for any number."""
    runtime = loaded(write_tiny(tmp_path / "tiny.gguf", TinyModel(scale=0.3)), context=256, weights=weights)
    try:
        runner, size = runtime.runner, 16 if runtime.runner.in_one_call else MOST_ALIKE
        ids = [3 + (5 * n) % 200 for n in range(90)]
        read_before = 90 - size

        def begun() -> Request:
            request = Request(tuple(ids[: read_before + 1]), GenerationParams(), frozenset(), Nobody(), 256)  # type: ignore[arg-type]
            request.lease = runtime.blocks.acquire(ids[:1], request.id.encode(), len(ids))
            assert request.lease is not None
            for start in range(0, read_before, 30):
                tokens = min(30, read_before - start)
                runner.score(ids[start : start + tokens], start, request.lease.blocks, [0])
            request.computed = read_before
            return request

        together = runner.run([Work(begun(), 1, tuple(ids[read_before + 1 :]))])
        single, rows = begun(), []
        for token in [*ids[read_before + 1 :], 0]:
            rows.append(runner.run([Work(single, 1)])[0].clone())
            single.ids.append(token)
            single.computed += 1
        assert together.shape == (size, runtime.tokenizer.vocab_size)
        if weights == "f32":  # torch's products of float32 differ in the last bits
            torch.testing.assert_close(together, torch.stack(rows), rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(together, torch.stack(rows))
    finally:
        runtime.close(drain=False)


def test_the_preset_says_whether(tmp_path: Path) -> None:
    folder = PresetFolder(tmp_path)
    for value, expected in (("auto", "auto"), ("'off'", "off"), ("off", "off")):
        (tmp_path / "a.yaml").write_text(f"model: starter\nspeculation: {value}\n")
        assert folder.read("a").speculation == expected
    (tmp_path / "a.yaml").write_text("model: starter\nspeculation: of\n")
    with pytest.raises(PresetError, match="speculation is 'of', expected one of auto, off"):
        folder.read("a")
