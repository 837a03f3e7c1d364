"""Which guesses a step evaluates beside what it must: those that are expected to save more time than they cost.

Nothing here decides what is said. The engine draws each token from the logits of its own place, with the request's own
sampler and random stream, and a guess that is another token ends the row: so text with speculation is text without.
Without guesses a step is plain decoding; there is no other loop.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from typing import Protocol

from backend.engine.request import Request
from backend.engine.scheduler import Work
from backend.engine.speculation_cost import StepCost
from backend.engine.speculation_guess import SURENESS, Chances, Guess, Guesser
from backend.engine.speculation_index import Successors
from backend.memory import give_back, is_allocation_failure, without_frames
from backend.sampling.chain import is_greedy

log = logging.getLogger(__name__)

MOST_DRAFTS = 15  # of one sequence: with the token before them they fill one tile of a product
MOST_IN_STEP = 48  # tokens: guesses, and one more for each sequence
# The same where a step is not one compiled call: more tokens would go through other products than a single one, which
# round otherwise (kernels/cpu/plain.py, kernels/cuda/gemv.py), and the text would be another.
MOST_ALIKE = 4
LEAST_GAIN = 1.15  # expected tokens a second, beside those of a plain step
MOST_OF_DRAFTER = 8  # guesses of a smaller model in one step: each is a step of its own
UNUSED, TOGETHER = 16, 8  # after so many steps in which no guess was worth it, so many tokens are looked at together
FIRST_PROBE, LAST_PROBE = 32, 4096  # steps that could have had guesses until costs are measured again


class Cost(Protocol):
    """`StepCost`, or another curve."""

    token: float
    guess: float

    def of(self, size: int) -> float: ...

    def observe(self, size: int, seconds: float) -> None: ...

    def observe_draw(self, seconds: float) -> None: ...

    def observe_guess(self, seconds: float) -> None: ...


class Drafter(Protocol):
    """A smaller model that guesses: `DraftModel`."""

    rounds: int
    seconds: float

    def guess(self, wanted: Sequence[tuple[Request, int]]) -> list[Guess]: ...

    def rewound(self, request: Request) -> None: ...

    def forget(self, request: Request) -> None: ...

    def drop(self, request: Request) -> None: ...


@dataclass(frozen=True)
class _Said:
    """Guesses of the drafter for the places from `at` on, and of which kind each is."""

    at: int
    tokens: list[int]
    kinds: list[int]


@dataclass
class Counts:
    """What an engine has done so far."""

    passes: int = 0  # steps of a sequence that drew from its logits
    drawn: int = 0  # tokens that came of them
    drafted: int = 0  # guesses that were evaluated
    accepted: int = 0  # of these, the right ones


class Speculation:
    """The guesses of an engine's sequences. One thread at a time."""

    def __init__(
        self,
        cost: Cost | None = None,
        most: int = MOST_DRAFTS,
        drafter: Drafter | None = None,
        most_in_step: int = MOST_IN_STEP,
    ) -> None:
        """`most`: guesses of one sequence in one step. `cost`: of steps; None: learned from their times. `drafter`: is
        asked where the text itself has nothing as good to offer. `most_in_step`: tokens of a step with guesses, those
        that it evaluates anyway included."""
        self._most, self._drafter, self._most_in_step = most, drafter, most_in_step
        self._said: dict[Request, _Said] = {}  # of the drafter, in the latest step
        self.cost: Cost = cost if cost is not None else StepCost()
        self._successors, self._chances = Successors(), Chances()
        # What is drawn by chance is another word more often, so those replies have chances of their own.
        self._chances_of_greedy = Chances()
        self._guessers: dict[Request, Guesser] = {}
        self._resting = self._rested = 0  # steps for which nobody guesses, of so many sequences
        self._skipped, self._wait = 0, FIRST_PROBE
        self._unasked, self._pause = 0, FIRST_PROBE  # the same for the drafter
        self._recovering = 0  # steps for which it is not asked, since it has failed

    def forget(self, request: Request) -> None:
        """The request is over: what it said last is learned, and it takes no more memory."""
        guesser = self._guessers.pop(request, None)
        if guesser is not None:
            guesser.follow(request.ids)
        if self._drafter is not None:
            self._said.pop(request, None)
            self._drafter.forget(request)

    def add_drafts(self, work: Sequence[Work], room: Callable[[Request, int], int], slower: float = inf) -> list[Work]:
        """The same work, with guesses where they are expected to pay.

        `room(request, n)` says for how many tokens, n at most, the request has room in the cache, and reserves it.
        `slower`: what the step may take with guesses, in steps without.
        """
        if self._resting and len(work) == self._rested:
            self._resting -= 1
            return list(work)
        self._resting = 0
        if any(item.tokens != 1 or not item.draws for item in work):
            return list(work)  # a prompt is being read, and the others wait for it long enough
        guesses = [self._guess(item) for item in work]
        if self._drafter is not None:
            guesses = self._with_drafter(self._drafter, work, guesses, slower)
        widths = self._widths([sure for _, sure in guesses], slower)
        drafted, busy = [], self._drafter is not None
        for item, (tokens, _), width in zip(work, guesses, widths, strict=True):
            width = room(item.request, width) if width else 0
            guesser = self._guessers.get(item.request)
            if guesser is not None:
                guesser.unused = 0 if width else guesser.unused + 1
                busy = busy or guesser.unused < UNUSED
            drafted.append(Work(item.request, item.tokens, tuple(tokens[:width])) if width else item)
        if not busy:
            self._resting, self._rested = TOGETHER - 1, len(work)
        return drafted

    def observe(self, work: Sequence[Work], seconds: float) -> float:
        """The step took so long, from its tokens to logits on the host.

        Returns which share of it a step of the same sequences without guesses would have taken.
        """
        if self._resting or not all(item.tokens == 1 and item.draws for item in work):
            return 1.0
        size = sum(item.evaluated for item in work)
        self.cost.observe(size, seconds)
        return min(1.0, self.cost.of(len(work)) / self.cost.of(size))

    def observe_draws(self, tokens: int, seconds: float) -> None:
        """Drawing so many tokens from their logits, and handing them on, took so long."""
        if not self._resting:
            self.cost.observe_draw(seconds / tokens)

    def rewound(self, request: Request) -> None:
        """Its last tokens were taken back."""
        if request in self._guessers:
            self._guessers[request].shorten(len(request.ids))
        if self._drafter is not None:
            self._said.pop(request, None)
            self._drafter.rewound(request)

    def _guess(self, item: Work) -> Guess:
        request = item.request
        if len(request.together()) > 1:  # guided: both would have to guess
            return [], []
        guesser = self._guessers.get(request)
        if guesser is None:
            chances = self._chances_of_greedy if is_greedy(request.params) else self._chances
            guesser = Guesser(len(request.prompt), self._successors, request.salt, chances)
            self._guessers[request] = guesser
        if guesser.unused >= UNUSED and len(request.ids) - guesser.known < TOGETHER:
            return [], []  # nearly all that this costs is to begin
        behind = not guesser.follow(request.ids)
        if behind or request.params.max_tokens_per_second:  # then it waits for its next token anyway
            return [], []
        return guesser.guess(max(0, min(self._most, request.max_length - len(request.ids) - 1)))

    def _with_drafter(self, drafter: Drafter, work: Sequence[Work], guesses: list[Guess], slower: float) -> list[Guess]:
        """The same guesses, or the drafter's where they are worth its time."""
        for item in work:
            self._learn_from(item.request)
        chance = self._chances.of("drafter", SURENESS)
        asked = [
            (item.request, min(MOST_OF_DRAFTER, item.request.max_length - len(item.request.ids) - 1))
            for item, (_, sure) in zip(work, guesses, strict=True)
            if item.request in self._guessers and not item.request.params.max_tokens_per_second
            if not sure or sure[0] < chance
        ]
        asked = [(request, count) for request, count in asked if count > 0]
        if self._recovering:
            self._recovering -= 1
            return guesses
        rounds = self._rounds(len(work), len(asked), chance, slower)
        if not rounds:
            return guesses
        try:
            found = drafter.guess([(request, min(count, rounds)) for request, count in asked])
        except Exception as error:  # nobody's reply depends on guesses
            self._without(drafter, [request for request, _ in asked], error)
            return guesses
        if drafter.rounds:
            self.cost.observe_guess(drafter.seconds / drafter.rounds)
        said = {}
        for (request, _), (tokens, probabilities) in zip(asked, found, strict=True):
            kinds = [min(int(probability * SURENESS), SURENESS - 1) for probability in probabilities]
            self._said[request] = _Said(len(request.ids), tokens, kinds)
            if tokens:
                said[request] = tokens, [self._chances.of("drafter", kind) for kind in kinds]
        return [said.get(item.request, guess) for item, guess in zip(work, guesses, strict=True)]

    def _without(self, drafter: Drafter, asked: Sequence[Request], error: Exception) -> None:
        """The drafter has failed: for a while there are no guesses of it."""
        log.warning("the model that guesses failed, and is left alone for %d steps: %s", LAST_PROBE, error)
        self._recovering = LAST_PROBE
        for request in asked:
            drafter.drop(request)
        if is_allocation_failure(error):
            without_frames(error)
            give_back()

    def _rounds(self, sequences: int, asked: int, chance: float, slower: float) -> int:
        """How many tokens the drafter is to guess for each who asks; 0 where that is not worth its time."""
        if not asked:
            return 0
        cost, best = self.cost, 0
        plain = speed = sequences / (cost.of(sequences) + sequences * cost.token)
        drawn = float(sequences)
        for rounds in range(1, min(MOST_OF_DRAFTER, (self._most_in_step - sequences) // asked) + 1):
            drawn += asked * chance**rounds
            seconds = cost.of(sequences + asked * rounds) + rounds * cost.guess
            if seconds > slower * cost.of(sequences):
                break
            now = drawn / (seconds + drawn * cost.token)
            if now > speed:
                best, speed = rounds, now
        if speed >= LEAST_GAIN * plain:
            self._unasked, self._pause = 0, FIRST_PROBE
            return best
        self._unasked += 1
        if self._unasked < self._pause:
            return 0
        self._unasked, self._pause = 0, min(2 * self._pause, LAST_PROBE)
        return 2

    def _learn_from(self, request: Request) -> None:
        """What became of the drafter's latest guesses."""
        said = self._said.pop(request, None)
        if said is None:
            return
        for token, kind, drawn in zip(said.tokens, said.kinds, request.ids[said.at :], strict=False):
            self._chances.add("drafter", kind, token == drawn)
            self._chances.add("drafter", SURENESS, token == drawn)
            if token != drawn:
                return

    def _widths(self, sure: list[list[float]], slower: float = inf) -> list[int]:
        """How many guesses of each sequence to evaluate, by the chances of each to be right if those before it are."""
        reached = []  # (chance that a guess is used, sequence): falling, so those of a sequence stay in order
        for sequence, chances in enumerate(sure):
            used = 1.0
            for chance in chances:
                used *= chance
                reached.append((used, sequence))
        if not reached:
            return [0] * len(sure)
        reached.sort(key=lambda guess: -guess[0])
        used_in_step = [used for used, _ in reached[: max(0, self._most_in_step - len(sure))]]
        best, gain = self._best(len(sure), used_in_step, slower)
        if gain < LEAST_GAIN:
            best = self._probe(reached[0][0])
        else:
            self._skipped, self._wait = 0, FIRST_PROBE
        widths = [0] * len(sure)
        for _, sequence in reached[:best]:
            widths[sequence] += 1
        return widths

    def _best(self, sequences: int, used: Sequence[float], slower: float) -> tuple[int, float]:
        """The number of guesses that gives most tokens a second, and that speed beside the one without any."""
        cost, token = self.cost, self.cost.token
        plain = sequences / (cost.of(sequences) + sequences * token)
        best, speed, drawn = 0, plain, float(sequences)
        for count, chance in enumerate(used, 1):
            drawn += chance
            seconds = cost.of(sequences + count)
            if seconds > slower * cost.of(sequences):
                break
            now = drawn / (seconds + drawn * token)
            if now > speed:
                best, speed = count, now
        return best, speed / plain

    def _probe(self, chance: float) -> int:
        """One guess once in a while, each time after twice as many steps: what it costs may have changed."""
        self._skipped += 1
        if self._skipped < self._wait or chance < 1 - 1 / LEAST_GAIN:
            return 0
        self._skipped, self._wait = 0, min(2 * self._wait, LAST_PROBE)
        return 1
