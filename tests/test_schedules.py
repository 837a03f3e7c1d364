"""Random schedules: people come, stop, are preempted, rewound and guessed for; blocks are shared, evicted and brought
back; steps fail. Whatever happens, a reply says what it would have said alone, and no block is lost or written by two.

The model is made up: its next logits depend on the tokens that are really stored in the blocks of a sequence, so a
block that is not what the index says shows in the text.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
import torch

from backend.cache.blocks import BlockCopy, BlockPool, BlockStore, Move
from backend.engine.admission import MAX_RUNNING
from backend.engine.engine import Engine
from backend.engine.request import Request
from backend.engine.scheduler import Work
from backend.engine.speculation import Speculation
from backend.params import GenerationParams
from backend.sampling.sampler import Sampler

BLOCK, VOCABULARY, SCHEDULES = 4, 12, 1000
END = 0  # the token that ends a reply
ROWS = torch.tensor(np.random.default_rng(5).normal(scale=3.0, size=(509, VOCABULARY)), dtype=torch.float32)
PARAMS = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.8, "repetition_penalty": 1.3},
    {"temperature": 1.0, "mirostat": 2},
    {"temperature": 0.0, "banned_strings": ("bc", "dea")},
    {"temperature": 1.0, "banned_strings": ("cd", "g")},
]


def logits_after(tokens: Sequence[int]) -> torch.Tensor:
    """The made-up model: float32 (vocabulary,), a different row for almost every beginning, often the same choice."""
    return ROWS[hash(tuple(tokens[-2:])) % 31] + ROWS[hash(tuple(tokens)) % len(ROWS)] / 8


@cache
def params_of(kind: int, max_tokens: int, seed: int) -> GenerationParams:
    plain = {"top_p": 1.0, "top_k": 0, "min_p": 0.0}
    return GenerationParams.from_mapping({**plain, **PARAMS[kind], "max_tokens": max_tokens, "seed": seed})


def letter(token: int) -> bytes:
    return bytes([96 + token])


class BrokenError(BaseException):
    """What the engine must not take for a step that failed."""


def expect(true: bool, words: str) -> None:
    if not true:
        raise BrokenError(words)


class Reader:
    def __init__(self, stop_after: int | None) -> None:
        self.ids: list[int] = []
        self.reason: str | None = None
        self._stop_after = stop_after

    def on_token(self, token_id: int, logprob: float | None, *, visible: bool = True, top: object = ()) -> bool:
        assert self.reason is None
        self.ids.append(token_id)
        return len(self.ids) == self._stop_after

    def on_finish(self, reason: str, error: Exception | None = None) -> None:
        assert self.reason is None, "told once"
        self.reason = reason


@dataclass
class Aside:
    """A step that is computed in so many rounds."""

    work: list[Work]
    places: list[tuple[int, int, int]]
    rounds: int


class Memory:
    """Stands for the runner and the keys and values: each slot of the pool holds the token stored there."""

    def __init__(self, n_blocks: int, dice: random.Random) -> None:
        self.slots: list[tuple[int, int] | None] = [None] * (n_blocks * BLOCK)  # (position, token)
        self.host: dict[int, list[tuple[int, int] | None]] = {}
        self.fail = self.poison = False
        self.set_aside = self.given_up = 0  # pieces of prompts
        self._dice = dice

    def copy_blocks(self, moves: Sequence[Move]) -> None:
        for move in moves:
            if isinstance(move, BlockCopy):
                source, target = move.source * BLOCK, move.target * BLOCK
                self.slots[target : target + move.tokens] = self.slots[source : source + move.tokens]
            elif isinstance(move, BlockStore):
                self.host[move.slot] = self.slots[move.block * BLOCK : (move.block + 1) * BLOCK]
            else:
                self.slots[move.block * BLOCK : (move.block + 1) * BLOCK] = self.host[move.slot]

    def run(self, work: Sequence[Work]) -> torch.Tensor:
        result = self.go_on(Aside(list(work), self._places(work), 1), 0.0)
        assert result is not None
        return result

    def piece_tokens(self, seconds: float) -> int:
        return self._dice.randrange(1, 200)

    def begin(self, work: Sequence[Work]) -> Aside:
        self.set_aside += 1
        return Aside(list(work), self._places(work), self._dice.randrange(1, 9))

    def go_on(self, going: Aside, seconds: float) -> torch.Tensor | None:
        """Every time all of it is written, to where it was when it began, as some layers would be."""
        work = going.work
        assert len({item.request for item in work}) == len(work) <= MAX_RUNNING
        if self.fail:
            self.fail = False
            raise RuntimeError("a step failed")
        for slot, place, token in going.places:
            self.slots[slot] = (place, token)
        going.rounds -= 1
        if going.rounds:
            return None
        rows = []
        for item in work:
            request, start = item.request, item.request.computed
            ids = [*request.ids[start : start + item.tokens], *item.drafts]
            for place in range(len(ids) - item.logit_rows, len(ids)):
                rows.append(logits_after(self._read(request, start + place + 1)))
        result = torch.stack(rows) if rows else torch.empty(0, VOCABULARY)
        if self.poison and len(result):
            self.poison = False
            result[self._dice.randrange(len(result))] = float("nan")
        return result

    def _places(self, work: Sequence[Work]) -> list[tuple[int, int, int]]:
        """(slot, place in the sequence, token) of all that is evaluated."""
        found = []
        for item in work:
            request, start = item.request, item.request.computed
            ids = [*request.ids[start : start + item.tokens], *item.drafts]
            found += [(self._slot(request, start + n), start + n, token) for n, token in enumerate(ids)]
        expect(len({slot for slot, _, _ in found}) == len(found), "two sequences write to one place")
        return found

    def _slot(self, request: Request, place: int) -> int:
        assert request.lease is not None
        return request.lease.blocks[place // BLOCK] * BLOCK + place % BLOCK

    def _read(self, request: Request, length: int) -> list[int]:
        found = [self.slots[self._slot(request, place)] for place in range(length)]
        right = all(each is not None and each[0] == place for place, each in enumerate(found))
        expect(right, "a block holds what does not belong there")
        return [each[1] for each in found if each is not None]


class Tier:
    """Room for a few evicted blocks."""

    def __init__(self, most: int) -> None:
        self.most, self.slots = most, 0

    def grow(self) -> int:
        self.slots = min(self.most, self.slots + 3)
        return self.slots


class Cheap:
    """Guesses always pay."""

    token = 1.0

    def of(self, size: int) -> float:
        return 1.0 + size / 1000

    def observe(self, size: int, seconds: float) -> None: ...

    def observe_draw(self, seconds: float) -> None: ...


def alone(prompt: Sequence[int], params: GenerationParams, stop_after: int | None) -> list[int]:
    """What a reply says without any engine: drawn from the true logits, one after the other."""
    request = Request(tuple(prompt), params, frozenset({END}), Reader(None), 40)  # type: ignore[arg-type]
    sampler = Sampler(params, prompt, request.uniform, end_ids=request.end_ids, token_bytes=letter)
    ids = list(prompt)
    while len(ids) < request.max_length:
        drawn = sampler.next(logits_after(ids))
        if drawn.token is None:
            del ids[len(ids) - drawn.rewind :]
            continue
        ids.append(drawn.token)
        if drawn.token == END:
            break
    return ids[len(prompt) :][:stop_after]


class Schedule:
    """One random course of events."""

    def __init__(self, seed: int) -> None:
        self.dice = dice = random.Random(seed)
        self.pool = BlockPool(dice.choice([12, 14, 20, 40]), BLOCK, Tier(dice.choice([2, 9])) if seed % 2 else None)
        self.memory = Memory(self.pool.n_blocks, dice)
        speculation = Speculation(Cheap()) if seed % 3 else None
        budget = dice.choice([5, 16, 64])
        apart = dice.random() < 0.5
        self.engine = Engine(self.memory, self.pool, lambda _: None, budget, speculation, apart=apart)  # type: ignore[arg-type]
        self.requests: list[Request] = []
        self.sick = False  # steps fail in this one
        self.documents = [[dice.randrange(1, VOCABULARY) for _ in range(30)] for _ in range(2)]

    def submit(self) -> None:
        dice = self.dice
        document = dice.choice(self.documents)
        prompt = document[: dice.randrange(1, 28)] + [
            dice.randrange(1, VOCABULARY) for _ in range(dice.choice([0, 1, 5]))
        ]
        params = params_of(dice.randrange(len(PARAMS)), dice.choice([1, 4, 9]), dice.randrange(4))
        reader = Reader(dice.choice([None, None, 3]))
        request = Request(
            tuple(prompt), params, frozenset({END}), reader, 40, token_bytes=letter, use_cache=dice.random() < 0.9,
            salt=dice.choice([b"", b"", b"x"]), person=dice.choice("aaab"),
        )  # type: ignore[arg-type]  # fmt: skip
        self.requests.append(request)
        self.engine.submit(request)

    def step(self) -> None:
        cancelled = [request for request in self.requests if request.cancelled]
        piece = self.engine._piece
        self.engine.step()
        if piece is not None and piece is not self.engine._piece and piece._going.rounds:
            self.memory.given_up += 1
        for request in cancelled:
            assert request.lease is None, "a stopped reply has given its blocks back within one step"
            assert request.phase == "done"

    def run(self) -> None:
        dice = self.dice
        for _ in range(dice.randrange(3, 7)):
            for _ in range(dice.choice([0, 1, 1, 2, 6])):
                self.submit()
            if self.requests and dice.random() < 0.3:
                dice.choice(self.requests).cancel()
            if dice.random() < 0.04:
                self.memory.fail = self.sick = True
            if dice.random() < 0.04:
                self.memory.poison = self.sick = True
            for _ in range(dice.randrange(5)):
                self.step()
        for _ in range(2000):
            if self.engine.idle:
                break
            self.step()
        self.check()

    def check(self) -> None:
        assert self.engine.idle, "it does not come to an end"
        assert self.pool.in_use == 0
        assert self.pool.free + self.pool.cached == self.pool.n_blocks, "a block is lost"
        for request in self.requests:
            reader = request.listener
            assert isinstance(reader, Reader)
            said = alone(request.prompt, request.params, reader._stop_after)
            if reader.reason in ("cancelled", "error"):
                assert request.cancelled or self.sick
                # Cut off where a banned text might have begun: the reply shows that beginning as it was.
                sure = reader.ids[: len(reader.ids) - (2 if request.params.banned_strings else 0)]
                assert sure == said[: len(sure)]
            else:
                assert reader.ids == said


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Steps fail here on purpose, and each would be told with its trace. More threads than one only wait here."""
    logging.disable(logging.CRITICAL)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("part", range(4))
def test_random_schedules_say_what_each_says_alone_and_lose_no_block(part: int) -> None:
    preemptions = found = accepted = restored = rewound = set_aside = given_up = 0
    for seed in range(part * SCHEDULES // 4, (part + 1) * SCHEDULES // 4):
        schedule = Schedule(seed)
        try:
            schedule.run()
        except (AssertionError, BrokenError) as error:
            raise AssertionError(f"schedule {seed}: {error}") from error
        preemptions += schedule.engine.scheduler.counts.preemptions
        accepted += schedule.engine.counts.accepted
        found += sum(request.cached for request in schedule.requests)
        restored += schedule.pool.counts.restored
        set_aside += schedule.memory.set_aside
        given_up += schedule.memory.given_up
        rewound += sum(bool(request.params.banned_strings) for request in schedule.requests)
    often = preemptions, found, accepted, restored, rewound, set_aside
    assert min(*often, 2 * given_up) > 20, "each of these has happened often"
