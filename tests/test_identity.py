"""The same reply, whatever happens beside it: alone, among others, after a cache hit, after its blocks were given away,
after they came back from the host tier, with guesses and without.

On float32 weights with torch's own products (the reference) and on the starter's compiled step.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from backend.params import GenerationParams
from backend.runtime import Runtime
from tests.guesses import Told
from tests.real import read, starter, tiny_runtime
from tests.tiny import TinyModel, write_tiny

PROMPTS, TOGETHER, REPLY = 50, 8, 20


def prompts(vocabulary: int, count: int = PROMPTS, length: int = 60) -> list[list[int]]:
    """Of different lengths, with beginnings in common, and passages that come again: something to guess."""
    dice = random.Random(11)
    preface = [dice.randrange(3, vocabulary) for _ in range(20)]
    found = []
    for number in range(count):
        passage = [dice.randrange(3, vocabulary) for _ in range(dice.randrange(2, 9))]
        tail = (passage * 30)[: dice.randrange(1, length - 20)]
        found.append((preface if number % 2 else []) + tail)
    return found


def params(number: int) -> GenerationParams:
    """Every other reply is greedy, the others are drawn with a seed."""
    drawn = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": number}
    return GenerationParams.from_mapping({"max_tokens": REPLY, **(drawn if number % 2 else {"temperature": 0.0})})


def together(runtime: Runtime, asked: list[list[int]], size: int = TOGETHER) -> list[list[int]]:
    """The replies' ids, `size` of them at a time."""
    found = []
    for first in range(0, len(asked), size):
        part = list(enumerate(asked))[first : first + size]
        found += [read(reply)[1] for reply in [runtime.start(ids, params(number)) for number, ids in part]]
    assert runtime.blocks.in_use == 0
    return found


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("identity") / "tiny.gguf", TinyModel(context=128, scale=0.3))


@pytest.fixture(scope="module")
def alone(path: Path) -> list[list[int]]:
    """What each says by itself: no cache, no guesses, nobody else."""
    runtime = tiny_runtime(path, weights="f32", speculation="off")
    assert not runtime.runner.in_one_call, "the reference is torch's own"
    found = [
        read(runtime.start(ids, params(number), use_cache=False))[1]
        for number, ids in enumerate(prompts(runtime_size(runtime)))
    ]
    runtime.close(drain=False)
    return found


def runtime_size(runtime: Runtime) -> int:
    return int(runtime.checkpoint.config.vocab_size)


@pytest.fixture(params=["plain", "guesses"])
def options(request: pytest.FixtureRequest) -> dict[str, str]:
    return {"weights": "f32", "speculation": "off" if request.param == "plain" else "auto"}


def small(path: Path, options: dict[str, str], alone: list[list[int]], **more: object) -> Iterator[Runtime]:
    runtime = tiny_runtime(path, **options, **more)
    if options["speculation"] == "auto":
        asked = enumerate(prompts(runtime_size(runtime)))
        runtime._engine.speculation = Told({(tuple(ids), params(number)): alone[number] for number, ids in asked})
    yield runtime
    assert options["speculation"] == "off" or runtime._engine.counts.accepted > 100, (
        "there were guesses that were right"
    )
    runtime.close(drain=False)


@pytest.fixture
def roomy(path: Path, options: dict[str, str], alone: list[list[int]]) -> Iterator[Runtime]:
    yield from small(path, options, alone, kv_tokens=8192)


@pytest.fixture
def tight(path: Path, options: dict[str, str], alone: list[list[int]]) -> Iterator[Runtime]:
    yield from small(path, options, alone, kv_tokens=160, cache_ram=0)


@pytest.fixture
def hosted(path: Path, options: dict[str, str], alone: list[list[int]]) -> Iterator[Runtime]:
    yield from small(path, options, alone, kv_tokens=160, cache_ram=64 << 20)


def test_among_others_and_after_a_cache_hit(roomy: Runtime, alone: list[list[int]]) -> None:
    asked = prompts(runtime_size(roomy))
    assert together(roomy, asked) == alone
    read_before = roomy.runner.tokens_evaluated
    replies = [read(roomy.start(ids, params(number))) for number, ids in enumerate(asked)]
    assert [ids for _, ids, _ in replies] == alone
    assert sum(last.stats.cached_tokens for _, _, last in replies) == sum(len(ids) - 1 for ids in asked)
    assert roomy.runner.tokens_evaluated > read_before


def test_after_their_blocks_were_given_away(tight: Runtime, alone: list[list[int]]) -> None:
    assert together(tight, prompts(runtime_size(tight))) == alone
    assert tight._engine.scheduler.counts.preemptions > 5


def test_after_their_blocks_came_back_from_the_host(hosted: Runtime, alone: list[list[int]]) -> None:
    asked = prompts(runtime_size(hosted))
    assert together(hosted, asked) == alone
    before = hosted.blocks.counts.restored
    assert together(hosted, asked, size=1) == alone
    assert hosted.blocks.counts.restored > before + 10


def test_on_the_starters_compiled_step() -> None:
    runtime = starter("original")
    if not runtime.runner.in_one_call:
        pytest.skip("not run: there is no C compiler")
    runtime.runner.be_uniform()
    asked, speculation = prompts(40000, 8, length=90), runtime._engine.speculation
    try:
        runtime._engine.speculation = None
        expected = [read(runtime.start(ids, params(n), use_cache=False))[1] for n, ids in enumerate(asked)]
        assert together(runtime, asked) == expected
        said = {(tuple(ids), params(n)): expected[n] for n, ids in enumerate(asked)}
        runtime._engine.speculation, accepted = Told(said), runtime._engine.counts.accepted  # type: ignore[assignment]
        assert together(runtime, asked) == expected
        assert together(runtime, asked, size=1) == expected
        assert runtime._engine.counts.accepted > accepted + 50
    finally:
        runtime._engine.speculation = speculation


def test_a_reply_that_is_read_again_is_computed_as_a_reply(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where prompts are not: what nobody has kept of a reply comes back with the same bits."""
    runtime = starter("original")
    if not runtime.runner.in_one_call:
        pytest.skip("not run: there is no C compiler")
    engine = runtime._engine
    monkeypatch.setattr(engine, "speculation", None)
    monkeypatch.setattr(runtime.runner._compiled._described, "uniform", 0)
    ask = GenerationParams(max_tokens=300, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=5, ignore_eos=True)
    # Whole blocks of a prompt, which both read in one piece.
    prompt = [(7919 * place) % 40000 + 1000 for place in range(64)]
    expected = read(runtime.start(prompt, ask, use_cache=False))[1]
    parts, preempted = [], []
    describe, schedule = runtime.runner._flat, engine.scheduler.schedule

    def noted(work):  # type: ignore[no-untyped-def]
        flat = describe(work)
        parts.extend(flat[1])
        return flat

    def gives_up(**how: bool):  # type: ignore[no-untyped-def]
        for request in engine.scheduler.running:
            if request.completion_tokens in (50, 170) and request.completion_tokens not in preempted:
                preempted.append(request.completion_tokens)
                engine.scheduler._preempt(request)
        return schedule(**how)

    monkeypatch.setattr(runtime.runner, "_flat", noted)
    monkeypatch.setattr(engine.scheduler, "schedule", gives_up)
    assert read(runtime.start(prompt, ask, use_cache=False))[1] == expected
    assert preempted == [50, 170]
    read_again = [part for part in parts if part.count > 1]
    assert [(part.start, part.count) for part in read_again if part.prompt] == [(0, 64)] * 3
    assert sum(part.count for part in read_again if not part.prompt) == 50 + 170
    assert all(part.start >= 64 for part in read_again if not part.prompt)
