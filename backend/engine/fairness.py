"""Whose turn it is, between people: by the tokens they have had. Plain Python, no clock.

Admission follows the virtual token counter of Sheng et al. 2024, "Fairness in Serving Large Language Models"
(arXiv 2401.00588, section 4): whoever has been served least is next, and whoever comes back starts no lower than those
who are here, so that nobody saves up a right to everything. A step's reading is divided at once instead, max-min fair:
who wants less than an equal part gets all of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping


class Served:
    """Tokens that the model has evaluated for each person who has requests here. Forgets whoever has none."""

    def __init__(self) -> None:
        self._tokens: dict[str, int] = {}
        self._requests: Counter[str] = Counter()

    def arrive(self, person: str) -> None:
        """One more request of this person."""
        if person not in self._tokens:
            self._tokens[person] = min(self._tokens.values(), default=0)
        self._requests[person] += 1

    def leave(self, person: str) -> None:
        """One request less."""
        self._requests[person] -= 1
        if self._requests[person] <= 0:
            del self._requests[person], self._tokens[person]

    def charge(self, person: str, tokens: int) -> None:
        if person in self._tokens:
            self._tokens[person] += tokens

    def tokens(self, person: str) -> int:
        """What this person has had, on the scale of those who are here."""
        return self._tokens.get(person, 0)


def shares(wanted: Mapping[str, int], budget: int) -> dict[str, int]:
    """Divide `budget` tokens: nobody gets more than wanted, and nobody less than another who got less than wanted."""
    given: dict[str, int] = {}
    for place, person in enumerate(sorted(wanted, key=lambda each: wanted[each])):
        given[person] = min(wanted[person], budget // (len(wanted) - place))
        budget -= given[person]
    return given
