"""What a request's sampler remembers, seen through the engine: rules, banned texts, ends, seeds, pace, Mirostat."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from backend.cache.blocks import BlockPool
from backend.engine.engine import Engine
from backend.engine.request import Request
from backend.errors import ParameterError, SamplingError
from backend.params import GenerationParams
from backend.sampling.banned import BannedTexts
from backend.sampling.sampler import MOST_REWINDS, Sampler
from tests.real import read, tiny_runtime
from tests.test_sampling import row, with_params

PIECES = [b"", b"a", b"b", b"c", b"A", b"ab", b"bc", b"ca", b" ", b"\xc3", b"\xa4"]
END = 0


def logits_after(ids: Sequence[int]) -> torch.Tensor:
    """A model without weights: any function of the ids will do. The end is unlikely, so that replies get long."""
    random = np.random.default_rng(zlib.crc32(bytes(ids)))
    values = torch.tensor(random.standard_normal(len(PIECES)), dtype=torch.float32)
    values[END] -= 2
    return values


class ModelOfIds:
    """Takes the runner's place."""

    def __init__(self) -> None:
        self.steps = 0

    def copy_blocks(self, orders: Any) -> None: ...

    def run(self, work: Any) -> torch.Tensor:
        self.steps += 1
        rows = [logits_after(item.request.ids) for item in work if item.gives_logits]
        return torch.stack(rows) if rows else torch.zeros(0, len(PIECES))


class Reader:
    """A listener that keeps everything."""

    def __init__(self, stop_at: bytes = b"") -> None:
        self.ids: list[int] = []
        self.logprobs: list[float | None] = []
        self.tops: list[tuple[tuple[int, float], ...]] = []
        self.visible: list[bool] = []
        self.reason: str | None = None
        self.error: Exception | None = None
        self._stop_at = stop_at

    def on_token(self, token_id: int, logprob: float | None, *, visible: bool = True, top: Any = ()) -> bool:
        assert self.reason is None, "nothing comes after the end"
        self.ids.append(token_id)
        self.logprobs.append(logprob)
        self.tops.append(top)
        self.visible.append(visible)
        return bool(self._stop_at) and self._stop_at in self.text

    def on_finish(self, reason: str, error: Exception | None = None) -> None:
        self.reason, self.error = reason, error

    @property
    def text(self) -> bytes:
        return b"".join(PIECES[token] for token in self.ids)


def ask(engine: Engine, prompt: tuple[int, ...] = (1, 2, 3), reader: Reader | None = None, **values: Any) -> Request:
    params = with_params(**{"max_tokens": 40} | values)
    options: dict[str, Any] = {"want_logprobs": True, "top_logprobs": 3, "token_bytes": PIECES.__getitem__}
    request = Request(prompt, params, frozenset({END}), reader or Reader(), 256, **options)  # type: ignore[arg-type]
    engine.submit(request)
    return request


def new_engine(blocks: int = 64) -> Engine:
    return Engine(ModelOfIds(), BlockPool(blocks, 4))  # type: ignore[arg-type]


def finished(engine: Engine, *requests: Request) -> Reader:
    for _ in range(5000):
        if engine.idle:
            break
        engine.step()
    assert engine.idle
    reader = requests[0].listener
    assert isinstance(reader, Reader)
    return reader


def alone(**values: Any) -> Reader:
    engine = new_engine()
    return finished(engine, ask(engine, **values))


# banned texts -----------------------------------------------------------------------------------------------------


def without_banned(prompt: tuple[int, ...], banned: list[bytes], count: int) -> list[int]:
    """The slow twin: the whole text again at every token, nothing held back, no engine. Greedy."""
    ids: list[int] = []
    refused: dict[int, set[int]] = {}
    while len(ids) < count:
        logits = logits_after([*prompt, *ids])
        logits[list(refused.get(len(ids), ()))] = float("-inf")
        token = int(logits.argmax())
        said = [*ids, token]

        def bad(start: int, said: list[int] = said) -> bool:
            text = b"".join(PIECES[t] for t in said[start:]).lower()
            return any(text_.lower() in text for text_ in banned)

        if not bad(0):
            ids = said
            if token == END:
                break
            continue
        start = max(i for i in range(len(said)) if bad(i))
        if start == len(ids) or len(refused.get(start, ())) >= MOST_REWINDS:
            refused.setdefault(len(ids), set()).add(token)
        else:
            refused = {place: tokens for place, tokens in refused.items() if place <= start}
            refused.setdefault(start, set()).add(said[start])
            ids = said[:start]
    return ids


BANNED = [["abc"], ["b", "A c"], ["ca", "bca", "aa"], ["ä"], ["c" * 30], ["aabbcc", "bc"]]


@pytest.mark.parametrize("texts", BANNED, ids=repr)
@pytest.mark.parametrize("start", range(8))
def test_banned_texts_are_what_the_twin_says(texts: list[str], start: int) -> None:
    banned = [text.encode() for text in texts]
    reader = alone(prompt=(start, 5, 5), banned_strings=texts, temperature=0)
    assert reader.ids == without_banned((start, 5, 5), banned, 40)
    assert not any(text.lower() in reader.text.lower() for text in banned)


@pytest.mark.parametrize("texts", BANNED[:3], ids=repr)
def test_banned_texts_alone_and_beside_others(texts: list[str]) -> None:
    values = {"banned_strings": texts, "seed": 5, "repetition_penalty": 1.2, "xtc_probability": 0.5, "mirostat": 0}
    expected = alone(**values).ids
    # 13 blocks of 4 for four requests of up to 43 tokens: they also push each other out
    engine = new_engine(blocks=13)
    requests = [ask(engine, prompt=(1, 2, 3), **values), *(ask(engine, prompt=(1, 2, n), seed=n) for n in (4, 5, 6))]
    assert finished(engine, *requests).ids == expected
    assert engine.blocks.in_use == 0


def test_nothing_that_was_shown_is_taken_back() -> None:
    engine = new_engine()
    request = ask(engine, banned_strings=["abca", "cab"], seed=3, max_tokens=100)
    reader = request.listener
    assert isinstance(reader, Reader)
    held, rewinds, length = 0, 0, 0
    while not engine.idle:
        engine.step()
        rewinds += len(request.ids) < length
        length = len(request.ids)
        assert list(request.ids[3 : 3 + len(reader.ids)]) == reader.ids
        held = max(held, length - 3 - len(reader.ids))
    assert rewinds > 0
    assert held >= 2
    assert len(reader.ids) == len(reader.logprobs) == length - 3
    for place, (token, logprob) in enumerate(zip(reader.ids, reader.logprobs, strict=True)):
        expected = torch.log_softmax(logits_after(request.ids[: 3 + place]), 0)[token]
        assert logprob == pytest.approx(float(expected), abs=1e-5), "of the place where it stands now"


def test_held_tokens_come_out_at_the_end() -> None:
    reader = alone(banned_strings=["x" * 40, "aX", "bX", "cX"], max_tokens=7, ignore_eos=True)
    assert len(reader.ids) == 7
    assert reader.reason == "length"
    engine = new_engine()
    request = ask(engine, banned_strings=["aX", "bX", "cX", " X", "\u00e4X", "abX"], max_tokens=0, ignore_eos=True)
    for _ in range(12):
        engine.step()
    request.cancelled = True
    finished(engine, request)
    assert isinstance(request.listener, Reader)
    assert request.listener.reason == "cancelled"
    assert request.listener.ids == request.ids[3:]


def test_a_stop_string_ends_a_reply_that_is_held_back() -> None:
    engine = new_engine()
    request = ask(engine, reader=Reader(stop_at=b"b"), banned_strings=["zzz", "abcabcabc"], seed=1)
    reader = finished(engine, request)
    assert reader.reason == "stop"
    assert b"b" not in reader.text[:-2]


def test_when_everything_is_banned() -> None:
    reader = alone(banned_strings=["a", "b", "c", " "], logit_bias={9: -100, 10: -100, END: -100})
    assert isinstance(reader.error, SamplingError)
    assert reader.reason == "error"
    engine = new_engine()  # and it ends nobody else's
    bad, good = ask(engine, banned_strings=["a", "b", "c", " ", "\u00e4"], ignore_eos=True), ask(engine, seed=1)
    finished(engine, bad, good)
    assert isinstance(good.listener, Reader)
    assert good.listener.reason in ("stop", "length")


def test_banned_texts_one_by_one() -> None:
    texts = BannedTexts(["Ab c", "b c d"], PIECES.__getitem__)
    for token, held in [(4, 1), (2, 2), (8, 3)]:  # "Ab "
        assert texts.begins(token) is None
        texts.push(token)
        assert texts.held == held
    assert texts.begins(3) == 3
    assert texts.begins(1) is None
    assert texts.begins(7) == 3, "a banned text may end in the middle of a token"
    assert texts.rewind(3) == 4
    assert texts.held == 0


# ends and biases --------------------------------------------------------------------------------------------------


def lengths(**values: Any) -> list[int]:
    return [len(alone(seed=seed, max_tokens=60, **values).ids) for seed in range(25)]


def test_the_shortest_reply() -> None:
    assert min(lengths()) < 12
    assert min(lengths(min_tokens=12)) >= 13  # twelve, and the end
    assert any(12 < length < 60 for length in lengths(min_tokens=12))


def test_a_reply_that_never_ends_by_itself() -> None:
    assert set(lengths(ignore_eos=True)) == {60}


def test_stop_tokens() -> None:
    for seed in range(10):
        reader = alone(seed=seed, stop_token_ids=[5, 6])
        if reader.reason == "stop":
            assert reader.ids[-1] in (5, 6, END)
            assert reader.visible == [True] * (len(reader.ids) - 1) + [False]
        assert not {5, 6, END} & set(reader.ids[:-1])
        first = alone(seed=seed, stop_token_ids=[5, 6], min_tokens=9)
        assert len(first.ids) > 9
        assert not {5, 6, END} & set(first.ids[:9])


def test_logit_bias() -> None:
    assert set(alone(logit_bias={7: 100}, ignore_eos=True).ids) == {7}
    assert 7 not in alone(logit_bias={7: -100}, max_tokens=200, ignore_eos=True).ids
    logits = row()
    sampler = Sampler(with_params(logit_bias={3: 1.5, 4: -2, 10**6: 5}), [], lambda: 0.5)
    expected = logits.clone()
    expected[3] += 1.5
    expected[4] -= 2
    torch.testing.assert_close(sampler._ruled(logits), expected)


def test_ids_outside_of_the_vocabulary(tiny_path) -> None:
    runtime = tiny_runtime(tiny_path(), context=64)
    try:
        for values in ({"logit_bias": {"999999": 1}}, {"stop_token_ids": [10**6]}):
            with pytest.raises(ParameterError, match="expected ids from 0 to") as caught:
                runtime.start([5], GenerationParams.from_mapping(values))
            assert caught.value.param in values
    finally:
        runtime.close(drain=False)


def test_log_probabilities_are_the_models_own() -> None:
    reader = alone(seed=2, temperature=2.0, logit_bias={4: 9}, repetition_penalty=2.0)
    for place, token in enumerate(reader.ids):
        expected = torch.log_softmax(logits_after([1, 2, 3, *reader.ids[:place]]), 0)
        assert reader.logprobs[place] == pytest.approx(float(expected[token]), abs=1e-5)
        best = expected.argsort(descending=True)[:3].tolist()
        assert [t for t, _ in reader.tops[place]] == best
        assert [v for _, v in reader.tops[place]] == pytest.approx(expected[best].tolist(), abs=1e-5)


# seeds ------------------------------------------------------------------------------------------------------------

EVERYTHING: dict[str, Any] = {
    "seed": 11, "temperature": 0.9, "top_k": 9, "typical_p": 0.98, "min_p": 0.01, "xtc_probability": 0.5,
    "xtc_threshold": 0.05, "repetition_penalty": 1.1, "frequency_penalty": 0.2, "dry_multiplier": 0.4,
    "banned_strings": ["abc", "ca b"], "logit_bias": {1: 0.5}, "min_tokens": 8, "dynatemp_high": 1.2,
}  # fmt: skip


@pytest.mark.parametrize("more", [{}, {"mirostat": 1}, {"mirostat": 2, "mirostat_tau": 2.0}], ids=repr)
def test_a_seed_gives_the_same_reply_alone_and_in_a_batch(more: dict[str, Any]) -> None:
    values = {**EVERYTHING, **more}
    expected = alone(**values)
    assert expected.ids == alone(**values).ids
    assert expected.ids != alone(**{**values, "seed": 12}).ids
    engine = new_engine(blocks=24)
    requests = [ask(engine, **values), *(ask(engine, (1, 2, n), **{**values, "seed": n}) for n in range(6))]
    assert finished(engine, *requests).ids == expected.ids


# pace -------------------------------------------------------------------------------------------------------------


def test_the_speed_limit() -> None:
    now = [100.0]
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        now[0] += seconds

    engine = Engine(ModelOfIds(), BlockPool(64, 4), sleep)  # type: ignore[arg-type]
    params = with_params(max_tokens=11, max_tokens_per_second=5.0, ignore_eos=True)
    request = Request((1,), params, frozenset({END}), Reader(), 256, clock=lambda: now[0])  # type: ignore[arg-type]
    engine.submit(request)
    finished(engine, request)
    assert now[0] - 100 == pytest.approx(10 / 5.0)
    assert max(slept) <= 0.02, "a Stop must not wait for the next token"
    # beside somebody without a limit there is no rest, and the limit holds as well
    slow, fast = (Request((1,), p, frozenset({END}), Reader(), 256, clock=lambda: now[0])  # type: ignore[arg-type]
                  for p in (params, with_params(max_tokens=50, ignore_eos=True)))  # fmt: skip
    slept.clear()
    engine.submit(slow)
    engine.submit(fast)
    for _ in range(50):
        engine.step()
    assert fast.completion_tokens == 50
    assert slow.completion_tokens == 1
    assert slept == []


# on a real cache --------------------------------------------------------------------------------------------------


def test_rewinds_on_a_real_model(tiny_path) -> None:
    """Tokens that are taken back leave nothing behind in the cache of keys and values."""
    runtime = tiny_runtime(tiny_path(scale=0.3), context=256, weights="f32", speculation="off")
    try:
        pieces = [runtime.tokenizer.token_bytes(token) for token in range(runtime.tokenizer.vocab_size)]
        odd = {token: -100 for token, piece in enumerate(pieces) if not (piece.isascii() and piece.strip())}
        values: dict[str, Any] = {"temperature": 0, "max_tokens": 60, "logit_bias": odd, "repetition_penalty": 1.5}
        prompt = runtime.prompting.encode_text("hello world")
        free = read(runtime.start(prompt, GenerationParams.from_mapping(values)))
        values["banned_strings"] = [
            b"".join(pieces[token] for token in free[1][at : at + 4]).decode() for at in (8, 30)
        ]
        evaluated = runtime.runner.tokens_evaluated
        cached = read(runtime.start(prompt, GenerationParams.from_mapping(values)))
        evaluated = runtime.runner.tokens_evaluated - evaluated
        fresh = read(runtime.start(prompt, GenerationParams.from_mapping(values), use_cache=False))
        assert cached[1] == fresh[1]
        assert cached[1][:8] == free[1][:8]
        assert cached[1] != free[1]
        assert not any(text.lower() in cached[0].lower() for text in values["banned_strings"])
        assert 60 < evaluated < 60 + 40, "what stood before the place is not computed again"
    finally:
        runtime.close(drain=False)
