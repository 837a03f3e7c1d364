"""Whose turn it is, between people: by the tokens they have had. Plain Python, no clock.

Admission follows the virtual token counter of Sheng et al. 2024, "Fairness in Serving Large Language Models"
(arXiv 2401.00588, section 4): whoever has been served least is next, and whoever comes back starts no lower than those
who are here, so that nobody saves up a right to everything. A step's reading is divided at once instead, max-min fair:
who wants less than an equal part gets all of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

REMEMBERED = 1000  # people


class Served:
    """Tokens that the model has evaluated for each person. Who has no request here any more is remembered for a while:
    else whoever sends one request after the other would be a newcomer each time."""

    def __init__(self) -> None:
        self._tokens: dict[str, int] = {}  # of those who have requests here
        self._gone: dict[str, int] = {}  # of those who had, who left last behind
        self._requests: Counter[str] = Counter()

    def arrive(self, person: str) -> None:
        """One more request of this person."""
        if person not in self._tokens:
            least = min(self._tokens.values(), default=next(reversed(self._gone.values()), 0))
            self._tokens[person] = max(self._gone.pop(person, 0), least)
        self._requests[person] += 1

    def leave(self, person: str) -> None:
        """One request less."""
        self._requests[person] -= 1
        if self._requests[person] <= 0:
            del self._requests[person]
            self._gone[person] = self._tokens.pop(person)
            if len(self._gone) > REMEMBERED:
                del self._gone[next(iter(self._gone))]

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
