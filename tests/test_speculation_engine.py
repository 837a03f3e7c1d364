"""With guesses and without: the same tokens, for every sampler and rule, and a cache without a trace of wrong ones."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from backend.cache.blocks import BlockPool, Lease
from backend.engine.engine import Engine
from backend.engine.request import Request
from backend.engine.scheduler import Work
from backend.engine.speculation import Speculation
from backend.errors import NumericalError
from backend.params import GenerationParams
from backend.sampling.grammar import Grammars
from backend.sampling.sampler import Sampler
from tests.test_sampling import with_params
from tests.test_sampling_engine import END, PIECES, Reader
from tests.test_speculation import FREE, Given
from tests.tokencache import TokenCache, scattered

MODEL = scattered(len(PIECES), reach=2, scale=2.0)
PROMPT = (1, 2, 3, 8, 1, 2, 3)
BLOCK = 4
# One of each family; all of them draw from what the one before has left.
FAMILIES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "temperature": {"temperature": 0.8},
    "top_k": {"top_k": 4},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.1},
    "typical_p": {"typical_p": 0.8},
    "top_n_sigma": {"top_n_sigma": 1.2},
    "tfs": {"tfs": 0.9},
    "top_a": {"top_a": 0.3},
    "epsilon": {"epsilon_cutoff": 0.05},
    "eta": {"eta_cutoff": 0.1},
    "xtc": {"xtc_probability": 0.5, "xtc_threshold": 0.1},
    "dynamic temperature": {"dynatemp_low": 0.5, "dynatemp_high": 1.5},
    "smoothing": {"smoothing_factor": 0.4, "smoothing_curve": 1.5},
    "mirostat 1": {"mirostat": 1, "mirostat_tau": 2.0},
    "mirostat 2": {"mirostat": 2, "mirostat_tau": 2.0},
    "repetition": {"repetition_penalty": 1.3, "repetition_range": 12},
    "frequency and presence": {"frequency_penalty": 0.3, "presence_penalty": 0.2},
    "no repeated ngram": {"no_repeat_ngram": 4},
    "dry": {"dry_multiplier": 0.5, "dry_allowed_length": 3},
    "bias": {"logit_bias": {4: 1.5, 5: -100}},
    "banned": {"banned_strings": ["abca", "b c", "cab"]},
    "greedy and banned": {"temperature": 0, "banned_strings": ["bca", "aab", "c a"]},
    "ends": {"min_tokens": 12, "stop_token_ids": [9]},
}


Replies = dict[tuple[int, ...], list[int]]  # by prompt


class Guessing(Speculation):
    """Guesses that are right for a while and then wrong: what a reply says is known beforehand."""

    def __init__(self, replies: Replies, seed: int = 0) -> None:
        super().__init__(FREE)
        self._replies, self._random = replies, random.Random(seed)

    def add_drafts(self, work: Sequence[Work], room: Any, slower: float = 1.0) -> list[Work]:
        return [self._with_drafts(item, room) if item.draws and item.tokens == 1 else item for item in work]

    def _with_drafts(self, item: Work, room: Any) -> Work:
        request = item.request
        said, right = self._replies[request.prompt], self._random.randrange(5)
        done = request.completion_tokens
        tokens = said[done : done + right] + [self._random.randrange(len(PIECES)) for _ in range(3)]
        width = room(request, max(0, min(len(tokens), request.max_length - len(request.ids) - 1)))
        return Work(request, item.tokens, tuple(tokens[:width]))


def new_engine(speculation: Speculation | None, blocks: int = 64) -> Engine:
    return Engine(
        TokenCache(MODEL, len(PIECES), blocks, BLOCK),  # type: ignore[arg-type]
        BlockPool(blocks, BLOCK),
        speculation=speculation,
    )


def ask(engine: Engine, prompt: Sequence[int] = PROMPT, reader: Reader | None = None, **values: Any) -> Request:
    options: dict[str, Any] = {"want_logprobs": True, "top_logprobs": 2, "token_bytes": PIECES.__getitem__}
    if "matcher" in values:
        options["matcher"] = values.pop("matcher")
    params = with_params(**{"max_tokens": 60, "seed": 3} | values)
    request = Request(tuple(prompt), params, frozenset({END}), reader or Reader(), 256, **options)
    engine.submit(request)
    return request


def run(engine: Engine) -> None:
    for _ in range(5000):
        if engine.idle:
            break
        engine.step()
    assert engine.idle
    assert engine.blocks.in_use == 0


def outcome(request: Request) -> tuple[Any, ...]:
    reader = request.listener
    assert isinstance(reader, Reader)
    logprobs = None if None in reader.logprobs else [round(float(value or 0), 4) for value in reader.logprobs]
    return reader.ids, reader.reason, logprobs, reader.visible, request.ids


def alone(speculation: Speculation | None = None, **values: Any) -> tuple[Any, ...]:
    engine = new_engine(speculation)
    request = ask(engine, **values)
    run(engine)
    return outcome(request)


EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)


@EVERY_FAMILY
def test_the_same_tokens_with_guesses_that_are_right_and_wrong(family: str) -> None:
    accepted = drafted = 0
    for seed in range(4):
        values = {**FAMILIES[family], "seed": seed}
        expected = alone(**values)
        engine = new_engine(Guessing({PROMPT: expected[0]}, seed))
        request = ask(engine, **values)
        run(engine)
        assert outcome(request) == expected
        accepted, drafted = accepted + request.accepted, drafted + request.drafted
        assert engine.counts.drafted == request.drafted
        assert engine.counts.accepted == request.accepted
        steps = engine.runner.steps
        assert steps >= len(expected[0]) - request.accepted
    assert 0 < accepted < drafted


@EVERY_FAMILY
def test_the_same_tokens_with_guesses_from_the_text(family: str) -> None:
    values = FAMILIES[family]
    assert alone(Speculation(FREE), **values) == alone(**values)
    assert alone(Speculation(), **values) == alone(**values)


def test_a_repeating_text_takes_few_steps() -> None:
    speculation = Speculation(FREE)
    engine = new_engine(speculation)
    request = ask(engine, temperature=0, max_tokens=100, ignore_eos=True)
    run(engine)
    assert engine.counts.passes < 30
    assert request.stats().accepted_tokens == request.accepted == engine.counts.accepted > 70
    assert engine.counts.drawn == 100 == engine.counts.passes + engine.counts.accepted
    assert request.stats().drafted_tokens == engine.counts.drafted


def test_a_reply_ends_where_it_ends() -> None:
    """In the middle of right guesses: by length, an end token, a stop string."""
    said = alone(temperature=0, ignore_eos=True)[0]
    for length in (1, 2, 3, 7, 8):
        expected = alone(temperature=0, ignore_eos=True, max_tokens=length)
        assert expected[:2] == (said[:length], "length")
        assert alone(Guessing({PROMPT: said}), temperature=0, ignore_eos=True, max_tokens=length) == expected
    assert said[5] not in said[:5] or said[6] not in said[:6]
    place = 5 if said[5] not in said[:5] else 6
    expected = alone(temperature=0, ignore_eos=False, stop_token_ids=[said[place]])
    assert expected[:2] == (said[: place + 1], "stop")
    assert alone(Guessing({PROMPT: said}), temperature=0, stop_token_ids=[said[place]]) == expected
    text = b"".join(PIECES[token] for token in said[:9])
    stops = []
    for speculation in (None, Guessing({PROMPT: said})):
        engine = new_engine(speculation)
        request = ask(engine, reader=Reader(stop_at=text[-3:]), temperature=0, ignore_eos=True)
        run(engine)
        stops.append(outcome(request))
    assert stops[0] == stops[1]
    assert stops[0][1] == "stop"


class Spelling:
    """What a grammar needs of a tokenizer."""

    vocab_size = len(PIECES)
    bos_id: int | None = None

    def encode(self, text: str) -> list[int]:
        return [PIECES.index(bytes([byte])) for byte in text.encode()]

    def control_tokens(self) -> dict[str, int]:
        return {"<end>": END}

    def token_bytes(self, token_id: int) -> bytes:
        return PIECES[token_id]


@pytest.mark.parametrize("more", [{}, {"temperature": 0}, {"banned_strings": ["bb", "ca "]}], ids=repr)
def test_a_grammar(more: dict[str, Any]) -> None:
    grammars = Grammars(Spelling(), frozenset({END}))
    regex = GenerationParams.from_mapping({"regex": "((ab|b|ca) ?){5,12}"})
    for seed in range(4):
        values = {**more, "seed": seed}
        expected = alone(matcher=grammars.matcher(regex), **values)
        replies: Replies = {PROMPT: expected[0]}
        assert alone(Guessing(replies, seed), matcher=grammars.matcher(regex), **values) == expected
        assert alone(Speculation(FREE), matcher=grammars.matcher(regex), **values) == expected


class Watched(BlockPool):
    """Remembers which tokens were ever said to be in the blocks of a sequence."""

    def __init__(self, n_blocks: int) -> None:
        super().__init__(n_blocks, BLOCK)
        self.committed: list[tuple[int, ...]] = []

    def commit(self, lease: Lease, ids: Sequence[int]) -> None:
        self.committed.append(tuple(ids))
        super().commit(lease, ids)


@pytest.mark.parametrize("blocks", [200, 26], ids=["much room", "they push each other out"])
def test_many_at_once_and_no_trace_of_wrong_guesses(blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """`TokenCache` asserts in every step that the blocks hold nothing but the sequence's own tokens."""
    monkeypatch.setattr("backend.engine.speculation.UNUSED", 10**9)
    prompts = [(*PROMPT, n) for n in range(1, 9)]
    families = [name for name in FAMILIES if "banned" not in name]  # those take back what was committed
    chosen = [FAMILIES[families[(3 * n) % len(families)]] for n in range(len(prompts))]
    expected = [alone(prompt=p, **values) for p, values in zip(prompts, chosen, strict=True)]
    replies: Replies = {prompt: result[0] for prompt, result in zip(prompts, expected, strict=True)}
    for speculation in (Guessing(replies), Speculation(FREE), Speculation(Given(1.0, 1.1, 1.2, 1.3, 2.0))):
        engine = Engine(
            TokenCache(MODEL, len(PIECES), blocks, BLOCK),  # type: ignore[arg-type]
            Watched(blocks),
            speculation=speculation,
        )
        requests = [ask(engine, prompt, **values) for prompt, values in zip(prompts, chosen, strict=True)]
        run(engine)
        assert [outcome(request) for request in requests] == expected
        assert 0 < engine.counts.accepted < engine.counts.drafted
        assert (engine.scheduler.counts.preemptions > 0) == (blocks == 26)
        assert isinstance(engine.blocks, Watched)
        texts = [tuple(request.ids) for request in requests]
        for ids in engine.blocks.committed:
            assert any(text[: len(ids)] == ids for text in texts)


def test_beside_a_prompt_that_is_being_read() -> None:
    long = tuple(random.Random(1).choices(range(1, 9), k=600))
    expected = [alone(temperature=0, ignore_eos=True), alone(prompt=long[:100], temperature=0)]
    engine = new_engine(Speculation(FREE), blocks=300)
    first = ask(engine, temperature=0, ignore_eos=True)
    for _ in range(4):
        engine.step()
    second = ask(engine, long[:100], temperature=0)
    run(engine)
    assert [outcome(first), outcome(second)] == expected


def test_the_next_turn_finds_everything_but_what_was_wrong() -> None:
    engine = new_engine(Speculation(FREE))
    request = ask(engine, temperature=0, max_tokens=41, ignore_eos=True)
    run(engine)
    turn = ask(engine, [*request.ids, 8, 8], temperature=0)
    run(engine)
    assert turn.stats().cached_tokens == len(request.ids) - 1, "the last token was drawn, and never evaluated"
    assert outcome(turn) == alone(prompt=turn.prompt, temperature=0)


def test_a_cancelled_reply_and_one_that_fails() -> None:
    class Sick(TokenCache):
        def run(self, work: Sequence[Work]) -> torch.Tensor:
            logits = super().run(work)
            logits[1:] = float("nan")
            return logits

    engine = Engine(
        Sick(MODEL, len(PIECES), 64, BLOCK),  # type: ignore[arg-type]
        BlockPool(64, BLOCK),
        speculation=Speculation(FREE),
    )
    request = ask(engine, temperature=0, ignore_eos=True)
    run(engine)
    reader = request.listener
    assert isinstance(reader, Reader)
    assert isinstance(reader.error, NumericalError)
    expected = alone(temperature=0, ignore_eos=True)[0]
    assert 0 < len(reader.ids) < len(expected), "a wrong guess before a sick row is no trouble, a right one is"
    assert reader.ids == expected[: len(reader.ids)]
    engine = new_engine(Speculation(FREE))
    other = ask(engine, temperature=0, ignore_eos=True, max_tokens=200)
    while not engine.counts.accepted:
        engine.step()
    other.cancel()
    engine.step()
    assert engine.idle
    assert engine.blocks.in_use == 0
    assert engine.speculation is not None
    assert engine.speculation._guessers == {}


def test_where_nothing_repeats_next_to_nothing_is_evaluated() -> None:
    """An adversary: matches of two tokens after which something else comes every time."""
    prompt = [token for n in range(120) for token in (1, 2, 11 + n)]
    said = [token for n in range(80) for token in (1, 2, 200 + n)]

    def model(ids: Sequence[int]) -> torch.Tensor:
        logits = torch.zeros(300)
        logits[said[len(ids) - len(prompt)]] = 9.0
        return logits

    counts = []
    for cost in (Given(1.0, 1.2), Given(1.0, 2.0)):
        engine = Engine(
            TokenCache(model, 300, 200, BLOCK),  # type: ignore[arg-type]
            BlockPool(200, BLOCK),
            speculation=Speculation(cost),
        )
        request = Request(
            tuple(prompt),
            with_params(max_tokens=240, temperature=0),
            frozenset(),
            Reader(),
            900,  # type: ignore[arg-type]
        )
        engine.submit(request)
        run(engine)
        assert request.ids[len(prompt) :] == said
        counts.append((request.drafted - request.accepted, request.accepted))
    assert counts[0][0] <= 240 * 0.5
    assert counts[0][1] >= 70, "1 is followed by 2, and that was learned"
    assert counts[1][0] <= 3
    assert counts[1][1] <= 3


# distributions ----------------------------------------------------------------------------------------------------

DRAWN, REPLIES = 4, 250


def chi_square(a: Counter[Any], b: Counter[Any]) -> tuple[float, int]:
    """Of two samples of the same size, rare outcomes together; and its degrees of freedom, one too many at most."""
    pairs = [(a[key], b[key]) for key in a | b if a[key] + b[key] >= 10]
    rest = sum(a.values()) - sum(x for x, _ in pairs), sum(b.values()) - sum(y for _, y in pairs)
    pairs += [rest] if sum(rest) else []
    return sum((x - y) ** 2 / (x + y) for x, y in pairs), len(pairs) - 1


def surprising(a: Counter[Any], b: Counter[Any]) -> bool:
    """Whether two samples of one distribution would hardly ever differ so much: five standard deviations of chi square,
    whose mean is its degrees of freedom and whose variance is twice that."""
    value, freedom = chi_square(a, b)
    return value > freedom + 5 * (2 * max(freedom, 1)) ** 0.5


def by_engine(engine: Engine, seeds: range, **values: Any) -> Counter[Any]:
    said: Counter[Any] = Counter()
    for seed in seeds:
        request = ask(engine, seed=seed, max_tokens=DRAWN, ignore_eos=True, **values)
        run(engine)
        count(said, request.ids)
    return said


def by_itself(seeds: range, **values: Any) -> Counter[Any]:
    """The slow twin: the sampler alone, which knows no engine and no guesses."""
    said: Counter[Any] = Counter()
    for seed in seeds:
        params = with_params(**{**values, "seed": seed, "ignore_eos": True})
        stream = Request(PROMPT, params, frozenset({END}), Reader(), 256).uniform  # type: ignore[arg-type]
        sampler = Sampler(params, PROMPT, stream, end_ids=frozenset({END}), token_bytes=PIECES.__getitem__)
        ids = list(PROMPT)
        while len(ids) < len(PROMPT) + DRAWN:
            drawn = sampler.next(MODEL(ids))
            ids = [*ids, drawn.token] if drawn.token is not None else ids[: len(ids) - drawn.rewind]
        count(said, ids)
    return said


def count(said: Counter[Any], ids: Sequence[int]) -> None:
    """The first two tokens together, and the two after them."""
    reply = tuple(ids[len(PROMPT) :])
    said["first", reply[:2]] += 1
    said["later", reply[2:]] += 1


@pytest.mark.parametrize("family", [name for name in FAMILIES if "greedy" not in name])
def test_distributions_are_the_same(family: str) -> None:
    engine = new_engine(Speculation(FREE), blocks=400)
    said = by_engine(engine, range(REPLIES), **FAMILIES[family])
    assert engine.counts.accepted > 30
    assert not surprising(said, by_itself(range(REPLIES, 2 * REPLIES), **FAMILIES[family]))


def test_other_distributions_would_be_told_apart() -> None:
    said = by_itself(range(REPLIES), temperature=0.8)
    assert surprising(said, by_itself(range(REPLIES, 2 * REPLIES), temperature=1.3))
    assert surprising(said, by_itself(range(REPLIES, 2 * REPLIES), temperature=0.8, top_k=2))
