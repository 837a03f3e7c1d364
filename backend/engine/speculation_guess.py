"""What may come next in one sequence, and how likely each guess is right, by how often its like was. Plain Python.

Every token that is drawn says whether the guess before it would have been right, whether it was evaluated or not. So
the chances are learned at no cost, also while nothing is speculated.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from backend.engine.speculation_index import LONGEST, ORDERS, Repeats, Successors

Guess = tuple[list[int], list[float]]  # tokens that may come next, and of each the chance if those before it do
SURENESS = 5  # kinds of guesses of a smaller model, by how sure it is; and one more: any of them
PRIORS = {
    "repeat": (0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9),
    "learned": (0.3, 0.45),
    "drafter": (0.1, 0.3, 0.5, 0.7, 0.9, 0.6),
}
LENGTHS = (1, 2, 3, 4, 6, 10)  # matches up to so long share a chance; the last chance is of longer ones
MEMORY = 0.9  # how much of what a sequence has seen counts after one more of the same kind
LONG_MEMORY = 0.98  # the same for the engine
AT_ONCE = 4096  # tokens of a long prompt that are looked at between two steps: some milliseconds
TRUST = 6.0  # guesses of a sequence's own that count as much as all of the engine's
HOPELESS = 0.03  # a guess that is used so seldom is left out, and those after it
# The number of the chance that matches of each length share; those longer than LONGEST are not told apart.
KINDS = [bisect_left(LENGTHS, length) for length in range(LONGEST + 1)]


@dataclass(slots=True)
class _Chance:
    """Of one kind of guess: right ones among all, older ones counting less."""

    right: float
    tried: float

    def add(self, hit: bool, memory: float) -> None:
        self.right = self.right * memory + hit
        self.tried = self.tried * memory + 1


class Chances:
    """How often guesses of each kind were right, in one sequence on top of the whole engine's."""

    def __init__(self, engine: Chances | None = None) -> None:
        """engine: the chances to begin with, which learn beside; None: these are the engine's."""
        self._engine = engine
        self._kinds: dict[tuple[str, int], _Chance] = {}
        if engine is None:
            for source, priors in PRIORS.items():
                for kind, prior in enumerate(priors):
                    self._kinds[source, kind] = _Chance(prior * TRUST, TRUST)

    def of(self, source: str, kind: int) -> float:
        """The chance of the next guess of this kind, above 0 and below 1."""
        engine = self._engine or self
        base = engine._kinds[source, kind]
        chance = base.right / base.tried
        own = None if engine is self else self._kinds.get((source, kind))
        return chance if own is None else (chance * TRUST + own.right) / (TRUST + own.tried)

    def add(self, source: str, kind: int, hit: bool) -> None:
        own = self._kinds.setdefault((source, kind), _Chance(0.0, 0.0))
        own.add(hit, LONG_MEMORY if self._engine is None else MEMORY)
        if self._engine is not None:
            self._engine.add(source, kind, hit)


class Guesser:
    """Follows one sequence."""

    def __init__(self, prompt_tokens: int, successors: Successors, salt: bytes, chances: Chances) -> None:
        """The sequence begins with a prompt of so many tokens. `successors` and `chances` are the engine's: what is
        drawn here is added to both."""
        self._repeats, self._successors, self._salt = Repeats(), successors, salt
        self._chances = Chances(chances)
        self._prompt = prompt_tokens
        self.unused = 0  # steps since one of its guesses was evaluated
        # After so many tokens: what was said of the next, as `Successors.after` has it.
        self._looked_up: tuple[int, int, int] | None = None

    @property
    def known(self) -> int:
        """Tokens of the sequence that were looked at."""
        return len(self._repeats.ids)

    def follow(self, ids: Sequence[int]) -> bool:
        """The sequence is `ids` now. False: that was too many new tokens at once, and the rest comes next time."""
        known = self.known
        new = ids[known : known + AT_ONCE]
        for place, token in enumerate(new, known):
            if place < self._prompt:
                self._repeats.append(token)
            else:
                self._drawn(token)
        return known + len(new) == len(ids)

    def shorten(self, tokens: int) -> None:
        """All but the first `tokens` tokens of the sequence were taken back."""
        self._looked_up = None
        self._repeats.rewind(max(0, len(self._repeats.ids) - tokens))

    def guess(self, count: int) -> Guess:
        """At most `count` tokens that may come next, as long as there is some hope for them."""
        repeats, chances = self._repeats, self._chances
        length = repeats.length
        _, order = self._learned()
        repeated = chances.of("repeat", KINDS[length]) if length else 0.0
        if order and chances.of("learned", _place(order)) > repeated:
            return self._chain(count)
        sure: list[float] = []
        used = 1.0
        while length and len(sure) < count:
            chance = chances.of("repeat", KINDS[min(length + len(sure), LONGEST)])
            used *= chance
            if used < HOPELESS:
                break
            sure.append(chance)
        return repeats.guess(len(sure)), sure

    def _learned(self) -> tuple[int, int]:
        """What the engine's replies say of the next token: see `Successors.after`."""
        ids = self._repeats.ids
        if self._looked_up is None or self._looked_up[0] != len(ids):
            self._looked_up = len(ids), *self._successors.after(self._salt, ids)
        return self._looked_up[1:]

    def _chain(self, count: int) -> Guess:
        said = self._repeats.ids[-ORDERS[0] :]
        tokens: list[int] = []
        sure: list[float] = []
        token, order = self._learned()
        used = 1.0
        while order and len(tokens) < count:
            chance = self._chances.of("learned", _place(order))
            used *= chance
            if used < HOPELESS:
                break
            tokens.append(token)
            sure.append(chance)
            said = [*said[1:], token]
            token, order = self._successors.after(self._salt, said)
        return tokens, sure

    def _drawn(self, token: int) -> None:
        repeats, successors = self._repeats, self._successors
        if repeats.length:
            self._chances.add("repeat", KINDS[repeats.length], repeats.ids[repeats.at] == token)
        guessed, order = self._learned()
        if order:
            self._chances.add("learned", _place(order), guessed == token)
        successors.add(self._salt, repeats.ids, token)
        repeats.append(token)


def _place(order: int) -> int:
    return len(ORDERS) - 1 - ORDERS.index(order)
