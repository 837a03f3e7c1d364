"""Who runs in the next step, and with how many tokens. Plain Python: no tensors.

Every running sequence that has its prompt behind it gets one token; those still reading share the step's budget of
prompt tokens, evenly between people and oldest first for each of them. The budget is small while somebody's reply is
being written (`pacing.py`), so nobody's reply waits for somebody's long prompt.

Admission is by free blocks, one person after the other (`fairness.py`). Who would read what another is reading at the
moment waits until it is there. When blocks run out, the person who holds most gives those of their latest request back
and reads again later: its ids, and with its random stream its text, stay the same. The oldest running request never
has to, so there is always one that comes to its end.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import inf

from backend.cache.blocks import BlockPool, Lease
from backend.engine.admission import held_blocks, latest, wanted_of, who_makes_room
from backend.engine.fairness import Served, shares
from backend.engine.pacing import Pacing
from backend.engine.request import Request

PREFILL_TOKENS = 128  # of prompts in one step, all sequences together; so long is what Stop may have to wait for
PASSED_BY = 16  # requests that may begin before one that has no room yet, though it is its turn
TRIES = 4  # requests without room that are passed by in a step: more are not looked at


@dataclass(frozen=True)
class Work:
    """What a step evaluates of one request: `tokens` of its own ids from `request.computed` on, then `drafts`.

    Drafts are guesses of what comes after the last of its ids; there are none before all of its ids are in the step.
    """

    request: Request
    tokens: int
    drafts: tuple[int, ...] = ()

    @property
    def evaluated(self) -> int:
        """Tokens that go through the model."""
        return self.tokens + len(self.drafts)

    @property
    def draws(self) -> bool:
        """Whether the step ends with the last of the request's ids (and drafts), so that a token can be drawn."""
        return self.request.computed + self.tokens == len(self.request.ids)

    @property
    def is_prompt(self) -> bool:
        """Whether it is read from a prompt, of which numbers may depend, by rounding, on how many tokens come at once.
        What was a reply once is computed as it was then, so that it goes on in the same way."""
        return self.evaluated > self.logit_rows and self.request.computed < len(self.request.prompt)

    @property
    def logit_rows(self) -> int:
        """How many of the last tokens of this work give logits."""
        request = self.request
        if request.score_prompt and request.computed < len(request.prompt):
            return self.evaluated
        return 1 + len(self.drafts) if self.draws else 0

    @property
    def gives_logits(self) -> bool:
        return self.logit_rows > 0


@dataclass
class SchedulerCounts:
    """What has happened so far."""

    preemptions: int = 0


class Scheduler:
    def __init__(self, pool: BlockPool, prefill_tokens: int = PREFILL_TOKENS, pacing: Pacing | None = None) -> None:
        """`prefill_tokens`: of prompts in one step; more where a step brings weights from elsewhere, however short.
        `pacing`: makes it fewer while replies are being written."""
        self._pool, self._prefill_tokens, self._pacing = pool, prefill_tokens, pacing
        self.counts = SchedulerCounts()
        self._served = Served()
        self._rewound: set[Request] = set()  # in the middle of a reply: they go on before anybody begins
        self._held: dict[Request, tuple[Request, int]] = {}  # who waits -> who reads the first tokens of it, how many
        self._passed_by: dict[Request, int] = {}  # who had no room when it was its turn -> how many have begun since
        self.knows_end: Callable[[Request], bool] = lambda _: False  # whether logits after its prompt are at hand
        self.waiting: deque[Request] = deque()  # of each person first those that ran before, then as they came
        self.running: list[Request] = []  # oldest first

    def add(self, request: Request) -> None:
        self._served.arrive(request.person)
        self.waiting.append(request)
        self._number_waiting()

    def schedule(self, *, apart: bool = False, reading: bool = False) -> list[Work]:
        """Admit who fits and divide the step. In the result are only requests whose blocks are reserved, fewest tokens
        first. `apart`: those who write and those who read are not in one step, since prompts are read by `piece` while
        somebody writes; `reading`: such a piece is on its way, so nobody else reads."""
        self._admit()
        # Who keeps to a speed limit rests between tokens of the reply, and not while it reads.
        now = [
            request
            for request in self.running
            if _left(request) > 1 or not request.not_before or request.not_before <= request.clock()
        ]
        tokens = dict.fromkeys((request for request in now if _left(request) == 1), 1)
        readers = [request for request in now if _left(request) > 1]
        if not apart or (not tokens and not reading):
            left = sum(map(_left, readers))
            budget = self._pacing.budget(len(tokens), len(readers), left) if self._pacing else self._prefill_tokens
            tokens |= self._pieces(readers, budget)
        return self._reserved(now, tokens)

    def piece(self, tokens: int) -> list[Work]:
        """What is to be read next of prompts, apart from who writes: so many tokens at most."""
        readers = self.readers
        return self._reserved(readers, self._pieces(readers, min(self._prefill_tokens, tokens)))

    @property
    def readers(self) -> list[Request]:
        """Who runs and has its prompt before it."""
        return [request for request in self.running if _left(request) > 1]

    @property
    def ready(self) -> list[Request]:
        """Who has begun and has nothing to evaluate: what comes after its prompt is known."""
        return [request for request in self.running if request.end_known and not _left(request)]

    def spare_seconds(self, writing: int, spent: float) -> float:
        """How much longer a step may read in which so many sequences write and that has taken `spent` so far."""
        if self._pacing is None:
            return inf
        readers = self.readers
        return self._pacing.seconds(writing, len(readers), spent, sum(_left(request) for request in readers))

    def _reserved(self, now: list[Request], tokens: dict[Request, int]) -> list[Work]:
        """The work of those of `now` that find blocks for their tokens."""
        work: list[Work] = []
        for request in now:
            # Who gave its blocks to another a moment ago runs no longer.
            wanted = tokens.get(request, 0)
            if wanted and request in self.running and self._reserve(request, request.computed + wanted):
                work.append(Work(request, wanted))
        # Replies before prompts, long prompts last: a compiled step multiplies them in another way (step.h).
        still = (item for item in work if item.request in self.running)
        return sorted(still, key=lambda item: (item.is_prompt, item.tokens))

    def measured(self, work: list[Work], seconds: float) -> None:
        """A step with this work took so long, everything included."""
        if self._pacing is not None:
            writing = sum(1 for item in work if item.tokens == 1)
            self._pacing.record(writing, sum(item.tokens for item in work if item.tokens > 1), seconds)

    def advance(self, work: Work) -> None:
        """The step has computed this work's keys and values."""
        request = work.request
        prompt_left = len(request.prompt) - request.computed
        request.evaluated += max(0, min(work.tokens, prompt_left))
        request.computed += work.tokens
        self._served.charge(request.person, work.tokens)
        if request.lease is not None and request.use_cache:
            self._pool.commit(request.lease, request.ids[: request.computed])

    def room(self, request: Request, tokens: int) -> int:
        """How many tokens after the last of its ids, `tokens` at most, have room without anybody giving up theirs."""
        assert request.lease is not None
        while tokens and not self._pool.extend(request.lease, len(request.ids) + tokens):
            tokens -= 1
        return tokens

    def accept(self, request: Request) -> None:
        """The token just taken is the draft whose keys and values the step has computed."""
        request.computed += 1
        if request.lease is not None and request.use_cache and request.computed % self._pool.block_size == 0:
            self._pool.commit(request.lease, request.ids[: request.computed])

    def rewind(self, request: Request, tokens: int) -> None:
        """Take back the last tokens of a running request. It gives up its blocks, since those of the taken tokens may
        be shared by now, and finds what is still true of them again when it is admitted, before all others."""
        self._rewound.add(request)
        self._to_waiting(request)
        for each in request.together():
            del each.ids[len(each.ids) - tokens :]

    def shift(self, request: Request, start: int, tokens: int) -> None:
        """Take `tokens` tokens out of the middle of a running request. What follows them is read anew, at its new
        places: the only exact way, since keys and values know where they stand."""
        self._rewound.add(request)
        self._to_waiting(request)
        del request.ids[start : start + tokens]
        request.shifted += tokens

    def remove(self, request: Request, *, keep: bool = True) -> None:
        """The request is over, wherever it is: its blocks go back, findable unless `keep` is False."""
        if request not in self.waiting and request not in self.running:
            return
        if request in self.waiting:
            self.waiting.remove(request)
        self.running = [other for other in self.running if other not in request.together()]
        self._no_longer_waits(request)
        self._served.leave(request.person)
        for each in request.together():
            self._give_back(each, keep=keep)
        self._number_waiting()

    # admission --------------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Let begin who can. One that has no room yet is passed by other people's that have some, but not for ever:
        then what becomes free is kept for it. Who gives up its place now is not looked at before the next step."""
        passed, preempted = list[Request](), list[Request]()
        while len(passed) < TRIES and (request := self._next(besides=[*passed, *preempted])) is not None:
            request.end_known = self.knows_end(request)
            victims = who_makes_room(request, self.running, self._pool)
            if victims is None:
                passed.append(request)
                if self._passed_by.get(request, 0) >= PASSED_BY:
                    return
                continue
            for victim in victims:
                preempted += victim.together()
                self._preempt(victim)
            self._seat(request)
            self._passed_by |= {other: self._passed_by.get(other, 0) + 1 for other in passed}

    def _next(self, besides: Sequence[Request]) -> Request | None:
        """Of those who can begin: who was rewound, else the first request of whoever has been served least. `besides`:
        neither these nor what comes after them of the same people."""
        people = {request.person for request in besides}
        ready = [
            request
            for request in self.waiting
            if request not in besides
            and (request.person not in people or request in self._rewound)
            and not self._is_being_read(request)
        ]
        rewound = (request for request in ready if request in self._rewound)
        return next(rewound, None) or min(ready, key=lambda each: self._had(each.person), default=None)

    def _had(self, person: str) -> tuple[int, int]:
        """How much somebody has had; between two who are even, who runs less has had less."""
        return self._served.tokens(person), sum(1 for request in self.running if request.person == person)

    def _is_being_read(self, request: Request) -> bool:
        """Whether somebody is reading blocks of this request's beginning just now: then it waits to find them ready.

        So the choices of one question, or many questions with one preface, read what they share once.
        """
        held = self._held.get(request)
        if held is not None and self._is_reading(held[0], held[1]):
            return True
        readers = [other for other in self.running if other.computed < len(other.prompt)]
        found = ((other, self._common(request, other)) for other in readers)
        held = next(((other, shared) for other, shared in found if self._is_reading(other, shared)), None)
        if held is None:
            self._held.pop(request, None)
            return False
        self._held[request] = held
        return True

    def _is_reading(self, other: Request, tokens: int) -> bool:
        """Whether the running `other` has still to read some of its first `tokens` tokens."""
        return other in self.running and other.computed < tokens

    def _common(self, request: Request, other: Request) -> int:
        """Tokens of whole blocks with which both begin, so that one may find them when the other has read them."""
        if not (request.use_cache and other.use_cache) or request.salt != other.salt or request.score_prompt:
            return 0
        size, common = self._pool.block_size, 0
        most = min(len(request.ids) - 1, len(other.prompt))
        while common + size <= most and request.ids[common : common + size] == other.ids[common : common + size]:
            common += size
        return common

    def _seat(self, request: Request) -> None:
        """Let it run, with blocks for all of its tokens and the next one: there is room."""
        for each in request.together():
            lease = self._lease(each)
            assert lease is not None, "there was room"
            if each is request and request.phase == "queued" and not request.evaluated:
                request.cached = min(lease.cached, len(request.prompt))
            each.lease, each.computed, each.phase = lease, lease.cached, "prefill"
            self.running.append(each)
        self.waiting.remove(request)
        self._no_longer_waits(request)
        self._number_waiting()

    def _no_longer_waits(self, request: Request) -> None:
        self._rewound.discard(request)
        self._held.pop(request, None)
        self._passed_by.pop(request, None)

    def _lease(self, request: Request) -> Lease | None:
        ids, tokens = wanted_of(request)
        return self._pool.acquire(ids, request.salt, tokens)

    # taking turns -----------------------------------------------------------------------------------------------------

    def _pieces(self, reading: list[Request], budget: int) -> dict[Request, int]:
        """Prompt tokens of this step for those who read, oldest first."""
        wanted = Counter[str]()
        for request in reading:
            wanted[request.person] += _left(request)
        given, pieces = shares(wanted, budget), {}
        for request in reading:
            # A reply that is read again after its blocks were given up is no prompt: see Work.is_prompt.
            prompt_left = len(request.prompt) - request.computed
            left = min(_left(request), prompt_left) if prompt_left > 0 else _left(request)
            pieces[request] = min(left, given[request.person])
            given[request.person] -= pieces[request]
        return pieces

    def _reserve(self, request: Request, tokens: int) -> bool:
        """Blocks for the first `tokens` tokens of a running request. False: it had to give up its own for others."""
        assert request.lease is not None
        while not self._pool.extend(request.lease, tokens):
            held, last = held_blocks(self.running), latest(self.running)
            victim = last[max(last, key=lambda person: held[person])] if last else request
            self._preempt(victim)
            if request not in self.running:
                return False
        return True

    def _preempt(self, request: Request) -> None:
        self.counts.preemptions += 1
        self._to_waiting(request)

    def _to_waiting(self, request: Request) -> None:
        together = request.together()
        self.running = [other for other in self.running if other not in together]
        for each in together:
            self._give_back(each)
            each.computed, each.phase = 0, "queued"
        self.waiting.appendleft(together[0])
        self._number_waiting()

    def _give_back(self, request: Request, *, keep: bool = True) -> None:
        if request.lease is None:
            return
        if keep:
            self._pool.release(request.lease, request.ids[: request.computed] if request.use_cache else ())
        else:
            self._pool.discard(request.lease)
        request.lease = None

    def _number_waiting(self) -> None:
        for place, request in enumerate(self._in_order()):
            request.ahead = place + len(self.running)

    def _in_order(self) -> Iterator[Request]:
        """Who waits, in the order in which they will probably begin: people take turns, who was served least first."""
        lines: dict[str, deque[Request]] = {}
        for request in self.waiting:
            lines.setdefault(request.person, deque()).append(request)
        people = sorted(lines, key=self._had)
        while people:
            yield from (lines[person].popleft() for person in people)
            people = [person for person in people if lines[person]]


def _left(request: Request) -> int:
    """Tokens of it that the model has not evaluated."""
    return len(request.ids) - request.computed
