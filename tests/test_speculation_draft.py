"""A smaller model that guesses: its cache, what is made of its guesses, and the preset that names it."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from backend.cache.blocks import BlockPool
from backend.drafting import check_vocabulary
from backend.engine.engine import Engine
from backend.engine.scheduler import Work
from backend.engine.speculation import LAST_PROBE, Speculation
from backend.engine.speculation_draft import PIECE, DraftModel
from backend.errors import PresetError
from backend.params import GenerationParams
from backend.presets import DraftPreset, PresetFolder
from backend.runtime import Runtime
from backend.service import Service
from backend.settings import Settings
from tests.real import read
from tests.test_sampling_engine import PIECES
from tests.test_speculation import Given
from tests.test_speculation_engine import BLOCK, FAMILIES, MODEL, PROMPT, alone, ask, outcome, run
from tests.tiny import TinyModel, write_tiny
from tests.tokencache import Model, TokenCache, scattered

CHEAP = Given(1.0, 1.02)


def sharp(model: Model) -> Model:
    """The same choices, made with more confidence."""
    return lambda ids: model(ids) * 4


class Pair:
    """An engine whose guesses come of a smaller model, and what watches over both caches."""

    def __init__(self, small: Model, blocks: int = 64, small_blocks: int = 64, cost: Any = CHEAP) -> None:
        self.small = TokenCache(small, len(PIECES), small_blocks, BLOCK)
        self.small_pool = BlockPool(small_blocks, BLOCK)
        self.draft = DraftModel(self.small, self.small_pool, 256)  # type: ignore[arg-type]
        self.engine = Engine(
            TokenCache(MODEL, len(PIECES), blocks, BLOCK),  # type: ignore[arg-type]
            BlockPool(blocks, BLOCK),
            speculation=Speculation(cost, drafter=self.draft),
        )

    def run(self) -> None:
        run(self.engine)
        assert self.small_pool.in_use == 0
        assert self.draft._twins == {}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("small", [MODEL, sharp(MODEL), sharp(scattered(len(PIECES), reach=1, scale=2.0))],
                         ids=["the same model", "the same, sharper", "another"])  # fmt: skip
def test_the_tokens_do_not_depend_on_the_smaller_model(family: str, small: Model) -> None:
    pair = Pair(small)
    request = ask(pair.engine, **FAMILIES[family])
    pair.run()
    assert outcome(request) == alone(**FAMILIES[family])
    assert request.drafted > 0


def test_a_model_that_says_the_same_saves_most_steps() -> None:
    pair = Pair(sharp(MODEL))
    request = ask(pair.engine, temperature=0, ignore_eos=True, max_tokens=90)
    pair.run()
    assert request.accepted > 0.7 * request.drafted
    assert pair.engine.counts.passes < 30


def test_many_at_once_with_little_room() -> None:
    prompts = [(*PROMPT, n) for n in range(1, 7)]
    expected = [alone(prompt=prompt, temperature=0) for prompt in prompts]
    for blocks, small_blocks in ((200, 200), (24, 200), (200, 30)):
        pair = Pair(sharp(MODEL), blocks, small_blocks)
        requests = [ask(pair.engine, prompt, temperature=0) for prompt in prompts]
        pair.run()
        assert [outcome(request) for request in requests] == expected
        assert pair.engine.counts.accepted > 0


def test_what_it_has_read_is_found_again() -> None:
    pair = Pair(sharp(MODEL))
    request = ask(pair.engine, temperature=0, ignore_eos=True, max_tokens=30)
    pair.run()
    evaluated = pair.small.tokens_evaluated
    ask(pair.engine, [*request.ids, 8], temperature=0, ignore_eos=True, max_tokens=10)
    pair.run()
    assert pair.small.tokens_evaluated - evaluated < 30, "not the first turn once more"


def test_a_long_prompt_is_read_in_pieces() -> None:
    long = tuple(random.Random(2).choices(range(1, 9), k=2 * PIECE - 30))
    pair = Pair(sharp(MODEL), 200, 200)
    request = ask(pair.engine, long, temperature=0, ignore_eos=True, max_tokens=20)
    largest = 0
    while not pair.engine.idle:
        before = pair.small.tokens_evaluated
        pair.engine.step()
        largest = max(largest, pair.small.tokens_evaluated - before)
    assert PIECE <= largest <= PIECE + 16
    assert outcome(request) == alone(prompt=long, temperature=0, ignore_eos=True, max_tokens=20)
    assert request.accepted > 0


def test_one_that_is_always_wrong_is_left_alone() -> None:
    def wrong(ids: Sequence[int]) -> torch.Tensor:
        return -4 * MODEL(ids)

    pair = Pair(wrong, 400, 400, cost=Given(1.0, 1.3))
    for n in range(8):
        ask(pair.engine, (1, 2, n % 4 + 1, n + 1), seed=n, max_tokens=200, ignore_eos=True, temperature=1.5)
        pair.run()
    assert pair.small.steps < 0.2 * pair.engine.runner.steps
    assert pair.small.steps < LAST_PROBE


def fail_by_nan(logits: torch.Tensor) -> torch.Tensor:
    return logits * float("nan")


def fail_by_memory(logits: torch.Tensor) -> torch.Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory")


def fail(logits: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("anything")


@pytest.mark.parametrize("trouble", [fail_by_nan, fail_by_memory, fail])
def test_one_that_fails_costs_nobody_a_reply(trouble: Callable[[torch.Tensor], torch.Tensor]) -> None:
    pair = Pair(sharp(MODEL))
    compute, steps = pair.small.run, [0]

    def failing(work: Sequence[Work]) -> torch.Tensor:
        steps[0] += 1
        return trouble(compute(work)) if steps[0] == 5 else compute(work)

    pair.small.run = failing  # type: ignore[method-assign]
    asked = [ask(pair.engine, temperature=0, ignore_eos=True) for _ in range(2)]
    pair.run()
    for each in asked:
        assert outcome(each) == alone(temperature=0, ignore_eos=True)
    assert steps == [5], "it is left alone for a while"
    assert pair.small_pool.cached == 0, "what it has read is not to be found again"
    pair.engine.speculation._recovering = 0  # type: ignore[union-attr]
    again = ask(pair.engine, (3, 1, 2, 2), temperature=0, ignore_eos=True)
    pair.run()
    assert outcome(again) == alone(prompt=(3, 1, 2, 2), temperature=0, ignore_eos=True)
    assert steps[0] > 5


# presets ----------------------------------------------------------------------------------------------------------


def folder(path: Path, **presets: str) -> PresetFolder:
    for name, text in presets.items():
        (path / f"{name}.yaml").write_text(text)
    return PresetFolder(path)


def test_the_preset_names_who_guesses(tmp_path: Path) -> None:
    presets = folder(tmp_path, large="model: a\nspeculation: {draft: small}\n", small="model: b\n")
    assert presets.read("large").speculation == DraftPreset("small")
    for wrong, why in (
        ("{draft: smal}", "draft 'smal' is no preset here; did you mean 'small'"),
        ("{draft: bad}", "draft 'bad' is itself"),
        ("{drat: small}", "expected one of auto, off or {draft: PRESET}"),
        ("[small]", "expected one of auto, off or {draft: PRESET}"),
        ("3", "expected one of auto, off or {draft: PRESET}"),
    ):
        with pytest.raises(PresetError) as caught:
            folder(tmp_path, bad=f"model: a\nspeculation: {wrong}\n").read("bad")
        assert why in caught.value.message


def test_a_draft_preset_from_the_file_to_the_reply(tmp_path: Path) -> None:
    """Two models of random weights with one vocabulary; the smaller one is loaded, counted, asked and closed."""
    write_tiny(tmp_path / "large.gguf", TinyModel(scale=0.3))
    write_tiny(tmp_path / "small.gguf", TinyModel(scale=0.3, n_layers=1))
    (tmp_path / "presets").mkdir()
    common = "weights: f32\ncontext: 128\nprompt_format: alpaca\ncache_ram: off\n"
    folder(
        tmp_path / "presets",
        large=f"model: {tmp_path / 'large.gguf'}\nspeculation: {{draft: small}}\n{common}",
        small=f"model: {tmp_path / 'small.gguf'}\n{common}",
        off=f"model: {tmp_path / 'large.gguf'}\nspeculation: off\n{common}",
    )
    service = Service(Settings(presets_dir=tmp_path / "presets", models_dir=tmp_path, data_dir=tmp_path))
    try:
        preset = service.read_preset("large")
        prepared, plain = service.prepare(preset), service.prepare(service.read_preset("off"))
        small = prepared.plan.draft
        assert small is not None
        assert prepared.plan.extra_ram_bytes == plain.plan.extra_ram_bytes + small.extra_ram_bytes
        assert prepared.same(service.prepare(preset))
        runtimes = [Runtime(each, 4) for each in (prepared, plain)]
        assert runtimes[0].held().ram > runtimes[1].held().ram
        speculation = runtimes[0].worker._engine.speculation
        assert speculation is not None
        speculation.cost = CHEAP
        said = []
        for runtime in runtimes:
            prompt = runtime.prompting.encode_text("hello world")
            said.append(read(runtime.start(prompt, GenerationParams(max_tokens=60, temperature=0))))
        assert said[0][1] == said[1][1]
        assert said[0][2].stats.drafted_tokens > 0
        assert runtimes[0]._draft is not None
        assert runtimes[0]._draft.model._runner.steps > 0
        rows = {row.name: row for row in service.presets()}
        assert rows["large"].ram_bytes > rows["off"].ram_bytes
        for runtime in runtimes:
            runtime.close(drain=False)
    finally:
        service.close()


def test_another_vocabulary_is_refused() -> None:
    class Spelling:
        def __init__(self, *pieces: bytes) -> None:
            self.pieces, self.vocab_size = pieces, len(pieces)

        def token_bytes(self, token_id: int) -> bytes:
            return self.pieces[token_id]

    check_vocabulary("p", Spelling(b"a", b"b"), "q", Spelling(b"a", b"b"))  # type: ignore[arg-type]
    with pytest.raises(PresetError, match="'q' has a vocabulary of 1 tokens, expected the 2 of this model"):
        check_vocabulary("p", Spelling(b"a", b"b"), "q", Spelling(b"a"))  # type: ignore[arg-type]
    with pytest.raises(PresetError, match="token 1 of the draft preset 'q' is b'c', expected b'b'"):
        check_vocabulary("p", Spelling(b"a", b"b"), "q", Spelling(b"a", b"c"))  # type: ignore[arg-type]
