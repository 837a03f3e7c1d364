"""Random schedules, with a made-up model: people come, stop, are preempted, rewound and guessed for; replies have
partners, forget their middle, keep to a speed limit; prompts are scored; blocks are shared, evicted and brought back;
steps fail. After every step the books of the blocks are checked, in the end what each reply says.

The model's next logits depend on the tokens that are really stored in the blocks of a sequence, so a block that is not
what the index says shows in the text.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from backend.cache.blocks import BlockCopy, BlockPool, BlockStore, Move
from backend.cache.tree import NOWHERE, Node, Root
from backend.engine.admission import MAX_RUNNING
from backend.engine.engine import Engine
from backend.engine.pairs import add_partner
from backend.engine.request import Request, middle
from backend.engine.scheduler import Work
from backend.engine.speculation import Speculation
from backend.engine.speculation_draft import DraftModel
from backend.errors import ContextLengthError
from backend.params import GenerationParams
from backend.sampling.guidance import guided
from backend.sampling.sampler import Sampler

BLOCK, VOCABULARY, CONTEXT = 4, 12, 40
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

# What may be asked beside the plain things, and how many tokens at most the reply has then.
KINDS: dict[str, tuple[dict[str, object], list[int]]] = {
    "plain": ({}, [1, 4, 9]),
    "shift": ({"context_shift": True}, [9, 30, 60]),
    "guided": ({"guidance_scale": 1.5}, [1, 4, 9]),
    "scored": ({}, [1, 4, 9]),
    "only the prompt": ({}, [1]),
    "at a speed": ({"max_tokens_per_second": 5.0}, [1, 4, 9]),
}


def logits_after(tokens: Sequence[int]) -> torch.Tensor:
    """The made-up model: float32 (vocabulary,), a different row for almost every beginning, often the same choice."""
    return ROWS[hash(tuple(tokens[-2:])) % 31] + ROWS[hash(tuple(tokens)) % len(ROWS)] / 8


@cache
def params_of(sampled: int, kind: str, max_tokens: int, seed: int, keep: int) -> GenerationParams:
    asked = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "max_tokens": max_tokens, "seed": seed}
    if kind == "shift":
        asked["keep_tokens"] = keep
    return GenerationParams.from_mapping({**asked, **PARAMS[sampled], **KINDS[kind][0]})


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
        self.set_aside = 0  # pieces of prompts
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
        expect(going.places == self._places(work), "a piece writes to blocks that it had")
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

    token, guess = 1.0, 0.001

    def of(self, size: int) -> float:
        return 1.0 + size / 1000

    def observe(self, size: int, seconds: float) -> None: ...

    def observe_draw(self, seconds: float) -> None: ...

    def observe_guess(self, seconds: float) -> None: ...


def alone(asked: Request, stop_after: int | None) -> list[int]:
    """What a reply says without any engine: drawn from the true logits, one after the other."""
    params, said = asked.params, list[int]()
    request = Request(asked.prompt, params, asked.end_ids, Reader(None), asked.context)  # type: ignore[arg-type]
    sampler = Sampler(params, asked.prompt, request.uniform, end_ids=request.end_ids, token_bytes=letter)
    ids, negative = request.ids, list(asked.partner.prompt) if asked.partner is not None else None
    while len(ids) < request.max_length or request.shifts:
        if len(ids) >= request.max_length:
            first, count = middle(request, sampler.held)
            del ids[first : first + count]
            request.shifted += count
        logits = logits_after(ids)
        if negative is not None:
            logits = guided(logits, logits_after(negative), params.guidance_scale)
        drawn = sampler.next(logits)
        for each in (ids, said, negative):
            if each is None:
                continue
            if drawn.token is None:
                del each[len(each) - drawn.rewind :]
            else:
                each.append(drawn.token)
        if drawn.token in asked.end_ids:
            break
    return said[:stop_after]


class Schedule:
    """One random course of events."""

    def __init__(self, seed: int) -> None:
        self.dice = dice = random.Random(seed)
        self.pool = BlockPool(dice.choice([12, 14, 20, 40]), BLOCK, Tier(dice.choice([2, 9])) if seed % 2 else None)
        self.memory = Memory(self.pool.n_blocks, dice)
        self.now, self.counts = 0.0, Counter[str]()
        self.twins = BlockPool(dice.choice([6, 20, 60]), BLOCK)  # of the model that guesses
        drafter = DraftModel(Memory(self.twins.n_blocks, dice), self.twins, CONTEXT) if seed % 5 < 2 else None  # type: ignore[arg-type]
        speculation = Speculation(Cheap(), drafter=drafter) if seed % 3 else None  # type: ignore[arg-type]
        budget, apart = dice.choice([5, 16, 64]), dice.random() < 0.5
        self.engine = Engine(self.memory, self.pool, lambda _: None, budget, speculation, apart=apart)  # type: ignore[arg-type]
        self.requests: list[Request] = []
        self.sick = False  # steps fail in this one
        self.documents = [[dice.randrange(1, VOCABULARY) for _ in range(30)] for _ in range(2)]

    def submit(self) -> None:
        dice = self.dice
        document, kind = dice.choice(self.documents), dice.choice(["plain", *KINDS])
        prompt = document[: dice.randrange(1, 28)] + [
            dice.randrange(1, VOCABULARY) for _ in range(dice.choice([0, 1, 5]))
        ]
        if self.requests and dice.random() < 0.15:
            prompt = list(dice.choice(self.requests).prompt)  # asked again
        sampled, most, seed = dice.randrange(len(PARAMS)), dice.choice(KINDS[kind][1]), dice.randrange(4)
        request = Request(
            tuple(prompt), params_of(sampled, kind, most, seed, dice.choice([-1, 0, 3, 20])),
            frozenset() if kind == "shift" else frozenset({END}),
            Reader(dice.choice([None, None, 3])), CONTEXT, token_bytes=letter, use_cache=dice.random() < 0.9,
            salt=dice.choice([b"", b"", b"x"]), person=dice.choice("aaab"), score_prompt=kind == "scored",
            only_prompt=kind == "only the prompt", clock=lambda: self.now,
        )  # type: ignore[arg-type]  # fmt: skip
        if kind == "guided":
            try:
                add_partner(request, dice.choice([prompt[-1:], document[:9]]), self.pool.n_blocks, BLOCK)
            except ContextLengthError:
                return
        self.counts[kind] += 1
        self.requests.append(request)
        self.engine.submit(request)

    def step(self) -> None:
        cancelled = [request for request in self.requests if request.cancelled]
        piece = self.engine._piece
        self.now += 0.05
        self.engine.step()
        if piece is not None and piece is not self.engine._piece and piece._going.rounds:
            self.counts["given up"] += 1
        for request in cancelled:
            assert request.lease is None, "a stopped reply has given its blocks back within one step"
            assert request.phase == "done"
        self.check_books()

    def check_books(self) -> None:
        """Every block and every slot of the host tier is in one place, and is held by those who say so."""
        running = self.engine.scheduler.running
        nodes = [node for root in self.pool._tree._roots.values() for node in root.below()[1:]]
        blocks = [node.block for node in nodes if node.block != NOWHERE]
        blocks += [block for request in running if request.lease for block in request.lease._owned]
        free = [block for block in range(self.pool.n_blocks) if block in self.pool._places.free]
        expect(sorted(blocks + free) == list(range(self.pool.n_blocks)), "a block is lost or has two owners")
        slots = [node.slot for node in nodes if node.slot != NOWHERE] + list(self.pool._places._slots)
        expect(sorted(slots) == list(range(self.pool._places._slot_count)), "a slot of the host tier is lost")
        pins = Counter[Node](node for request in running if request.lease for node in request.lease._path)
        for node in nodes:
            expect((node.block == NOWHERE) != (node.slot == NOWHERE), "what is known is in one place")
            expect(node.pins == pins[node], "pinned by those who use it")
            inside = isinstance(node.parent, Root) or node.parent.block != NOWHERE
            expect(node.block == NOWHERE or inside, "what comes before a block in the pool is there too")
        idle = sum(node.block != NOWHERE and not node.pins for node in nodes)
        expect(self.pool._places.idle == idle, "blocks that nobody uses are counted")

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
        assert self.pool.in_use == self.twins.in_use == 0
        assert self.pool.free + self.pool.cached == self.pool.n_blocks, "a block is lost"
        for request in self.requests:
            reader = request.listener
            assert isinstance(reader, Reader)
            said = [] if request.only_prompt else alone(request, reader._stop_after)
            if reader.reason in ("cancelled", "error"):
                assert request.cancelled or self.sick
                # Cut off where a banned text might have begun: the reply shows that beginning as it was.
                sure = reader.ids[: len(reader.ids) - (2 if request.params.banned_strings else 0)]
                assert sure == said[: len(sure)]
                continue
            assert reader.ids == said
            if request.score_prompt:
                self.check_scores(request)

    def check_scores(self, request: Request) -> None:
        """Log probabilities of the prompt's tokens, each after those before it."""
        assert len(request.prompt_scores) == len(request.prompt) - 1
        for place, score in enumerate(request.prompt_scores, 1):
            logits = logits_after(request.prompt[:place]).double()
            wanted = (logits - logits.logsumexp(0))[request.prompt[place]]
            assert abs(score.logprob - float(wanted)) < 1e-5
