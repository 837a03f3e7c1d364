"""Where guesses come from, what they are thought to be worth, and how many a step takes. No engine, no model."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest

from backend.engine.request import Request
from backend.engine.scheduler import Work
from backend.engine.speculation import FIRST_PROBE, LEAST_GAIN, MOST_IN_STEP, TOGETHER, UNUSED, Speculation
from backend.engine.speculation_cost import SIZES, StepCost
from backend.engine.speculation_guess import AT_ONCE, Chances, Guesser
from backend.engine.speculation_index import LONGEST, MOST_PLACES, Repeats, Successors
from backend.params import GenerationParams
from tests.stepping import Nobody

# repeats ----------------------------------------------------------------------------------------------------------


def longest_match(ids: Sequence[int]) -> int:
    """The slow twin: how many tokens of the end stood earlier in the sequence as well."""
    for length in range(min(LONGEST, len(ids) - 1), 0, -1):
        end = list(ids[-length:])
        if any(list(ids[at : at + length]) == end for at in range(len(ids) - length)):
            return length
    return 0


@pytest.mark.parametrize("alphabet", [3, 5, 40])
def test_it_finds_the_longest_match(alphabet: int) -> None:
    """Few tokens and so many places: then it looks at the latest only, and goes on with what it has."""
    random.seed(alphabet)
    ids: list[int] = []
    repeats, found, longest = Repeats(), 0, 0
    for _ in range(250):
        ids.append(ids[-7] if len(ids) > 7 and random.random() < 0.6 else random.randrange(alphabet))
        repeats.append(ids[-1])
        best = longest_match(ids)
        length, at = repeats.length, repeats.at
        assert bool(length) == bool(best)
        assert ids[at - length : at] == ids[len(ids) - length :]
        assert length <= best
        if len(ids) <= MOST_PLACES:
            assert length == best
        found, longest = found + length, longest + best
    assert found > (0.7 if alphabet == 3 else 0.97) * longest


def test_what_followed_is_guessed_and_goes_round() -> None:
    repeats = Repeats()
    for token in [1, 2, 3, 4, 5, 9, 2, 3]:
        repeats.append(token)
    assert (repeats.length, repeats.guess(3)) == (2, [4, 5, 9])
    for token in [7, 8, 7, 8]:
        repeats.append(token)
    assert repeats.guess(5) == [7, 8, 7, 8, 7]
    repeats.append(100)
    assert (repeats.length, repeats.guess(5)) == (0, [])


def test_tokens_that_are_taken_back_leave_nothing() -> None:
    random.seed(1)
    with_detours, straight = Repeats(), Repeats()
    for _ in range(300):
        token = random.randrange(4)
        if random.random() < 0.3:
            detour = [random.randrange(4) for _ in range(random.randrange(1, 6))]
            for other in detour:
                with_detours.append(other)
            with_detours.rewind(len(detour))
        with_detours.append(token)
        straight.append(token)
    assert with_detours.ids == straight.ids
    assert with_detours._places == straight._places


# successors -------------------------------------------------------------------------------------------------------


def test_successors_by_the_most_telling_order() -> None:
    table = Successors()
    table.add(b"", [1, 2, 3], 4)
    table.add(b"", [9, 2, 3], 5)
    assert table.after(b"", [7, 7, 1, 2, 3]) == (4, 3)
    assert table.after(b"", [8, 2, 3]) == (5, 2), "the latest for two tokens"
    assert table.after(b"", [2, 3]) == (5, 2)
    assert table.after(b"", [3]) == (0, 0)
    assert table.after(b"", [3, 2]) == (0, 0)


def test_salts_never_meet() -> None:
    table = Successors()
    table.add(b"anna", [1, 2, 3], 4)
    assert table.after(b"berta", [1, 2, 3]) == table.after(b"", [1, 2, 3]) == (0, 0)
    assert table.after(b"anna", [1, 2, 3]) == (4, 3)


def test_the_table_is_bounded_and_the_oldest_go() -> None:
    table = Successors(most=10)
    for token in range(50):
        table.add(b"", [token, token + 1], token + 2)
        table.add(b"", [0, 1], 2)  # seen again and again
        assert len(table) <= 10
    assert table.after(b"", [0, 1]) == (2, 2)
    assert table.after(b"", [30, 31]) == (0, 0)
    assert table.after(b"", [49, 50]) == (51, 2)


# guesses and their chances ----------------------------------------------------------------------------------------


def guesser(prompt: Sequence[int], table: Successors | None = None, chances: Chances | None = None) -> Guesser:
    made = Guesser(len(prompt), Successors() if table is None else table, b"", chances or Chances())
    made.follow(prompt)
    return made


def test_chances_follow_what_happens() -> None:
    text = list(range(100, 140)) * 6
    right, wrong = guesser(text), guesser(text)
    said = text[:]
    for step in range(60):
        said.append(text[step])
        assert right.follow(said)
    _, chances = right.guess(8)
    assert min(chances) > 0.9
    said = text[:]
    for step in range(39):
        said.append(100 + (step * 7) % 40)
        wrong.follow(said)
    tokens, chances = wrong.guess(8)
    assert not tokens or chances[0] < 0.3


def test_another_sequence_begins_with_what_the_engine_knows() -> None:
    chances = Chances()
    before = guesser([1], chances=chances).follow([1, 2, 3] * 40)
    assert before
    assert guesser([7, 8, 7, 8], chances=chances).guess(1)[1][0] > guesser([7, 8, 7, 8]).guess(1)[1][0]


def test_what_another_reply_said_is_guessed() -> None:
    table = Successors()
    first = guesser([1], table)
    first.follow([1, 50, 51, 52, 53, 54, 55])
    second = guesser([2], table)
    assert second.guess(5) == ([], [])
    second.follow([2, 50, 51])
    assert second.guess(3)[0] == [52, 53, 54]
    assert guesser([2, 1], table).guess(3) == ([], []), "prompts are not learned from, and nothing follows these"


def test_long_prompts_are_read_in_pieces() -> None:
    made = Guesser(3 * AT_ONCE, Successors(), b"", Chances())
    ids = list(range(3 * AT_ONCE)) + [5]
    assert [made.follow(ids) for _ in range(4)] == [False, False, False, True]
    assert made.guess(2)[0] == [6, 7]


# costs ------------------------------------------------------------------------------------------------------------


def test_the_curve_is_found_whatever_the_pace() -> None:
    """A machine whose speed wanders by a factor of two, and one step in ten that takes thrice its time."""
    random.seed(2)
    true = {size: 1 + 0.14 * (size - 1) for size in range(1, 17)}
    cost, pace = StepCost(), 0.01
    for _ in range(600):
        pace *= random.choice((0.97, 1.03))
        pace = min(0.02, max(0.01, pace))
        size = random.choice((1, 1, 2, 4, 8, 16))
        late = 3 if random.random() < 0.1 else 1
        cost.observe(size, true[size] * pace * late)
    for size in (1, 2, 3, 4, 6, 8, 12, 16):
        assert cost.of(size) / cost.of(1) == pytest.approx(true[size], rel=0.15)


@pytest.mark.parametrize("guessing", ["first", "seldom"])
def test_costs_stay_true_while_nobody_guesses(guessing: str) -> None:
    """What disturbs a step makes it longer, never shorter: no reason to think ever more of what others cost."""
    random.seed(4)
    true, cost, pace = {1: 1.0, 2: 1.3, 4: 1.8, 8: 2.3, 16: 3.2}, StepCost(), 0.01
    for step in range(5000):
        pace = min(0.02, max(0.01, pace * random.lognormvariate(0, 0.01)))
        wide = step < 100 if guessing == "first" else random.random() < 0.02
        size = random.choice((2, 4, 8, 16)) if wide else 1
        late = 2 if random.random() < 0.06 else random.lognormvariate(0, 0.08)
        cost.observe(size, true[size] * pace * late)
    for size, value in true.items():
        assert cost.of(size) == pytest.approx(value, rel=0.3)


def test_costs_never_fall_and_go_on_beyond_what_is_known() -> None:
    cost = StepCost()
    for size, seconds in ((1, 1.0), (8, 5.0), (4, 7.0), (4, 7.0), (4, 7.0), (8, 5.0), (8, 5.0), (1, 1.0), (1, 1.0)):
        cost.observe(size, seconds)
    curve = [cost.of(size) for size in range(1, 40)]
    assert curve == sorted(curve)
    assert curve[-1] > curve[10]
    cost.observe(SIZES + 1, 99.0)
    assert [cost.of(size) for size in range(1, 40)] == curve


def test_one_slow_step_is_tried_again() -> None:
    cost = StepCost()
    for _ in range(5):
        cost.observe(1, 1.0)
    cost.observe(4, 30.0)  # a library that was used for the first time
    assert cost.of(4) < 2


# widths -----------------------------------------------------------------------------------------------------------


class Given:
    """A curve that never learns."""

    def __init__(self, *curve: float, token: float = 0.0) -> None:
        self._curve, self.token = (0.0, *curve), token
        self.guess = 0.1
        self.seen: list[int] = []

    def of(self, size: int) -> float:
        slope = self._curve[-1] - self._curve[-2] if len(self._curve) > 2 else 0.0
        beyond = size - len(self._curve) + 1
        return self._curve[size] if beyond <= 0 else self._curve[-1] + slope * beyond

    def observe(self, size: int, seconds: float) -> None:
        self.seen.append(size)

    def observe_draw(self, seconds: float) -> None: ...

    def observe_guess(self, seconds: float) -> None: ...


FREE = Given(1.0)
LINEAR = Given(1.0, 1.15)


def speed(widths: Sequence[int], chances: list[list[float]], cost: Given) -> float:
    """Expected tokens in the time of a step of one token."""
    expected = float(len(chances))
    for width, row in zip(widths, chances, strict=True):
        expected += sum(math.prod(row[:n]) for n in range(1, width + 1))
    return expected / cost.of(len(chances) + sum(widths))


def test_widths_are_the_best_of_all() -> None:
    """Against every other division, tried one by one."""
    random.seed(3)
    for _ in range(200):
        chances = [[random.random() for _ in range(3)] for _ in range(2)]
        cost = Given(1.0, 1.0 + random.random(), 2.0 + random.random())
        widths = Speculation(cost)._widths(chances)
        best = max(speed((a, b), chances, cost) for a in range(4) for b in range(4))
        assert speed(widths, chances, cost) == pytest.approx(best) or best < LEAST_GAIN * speed((0, 0), chances, cost)


def test_guesses_that_do_not_pay_are_left_out() -> None:
    assert Speculation(LINEAR)._widths([[0.1, 0.1]]) == [0]
    assert Speculation(LINEAR)._widths([[0.99] * 15]) == [15]
    assert 1 <= Speculation(LINEAR)._widths([[0.6] * 15])[0] <= 3
    assert Speculation(Given(1.0, 2.0))._widths([[0.9] * 15]) == [0], "every token costs as much as a step"
    assert Speculation(LINEAR)._widths([[], [0.9, 0.9], []])[1] == 2
    assert Speculation(LINEAR)._widths([]) == []


def test_guesses_take_no_longer_than_they_may() -> None:
    assert Speculation(LINEAR)._widths([[0.99] * 15], slower=1.5) == [3], "1.45 of a step without"
    assert sum(Speculation(LINEAR)._widths([[0.99] * 15] * 2, slower=1.5)) == 3, "0.15 each, of 1.15 twice"
    assert Speculation(Given(1.0, 1.6))._widths([[0.99] * 15], slower=1.5) == [0]
    assert Speculation(LINEAR)._rounds(1, 1, 0.99, slower=1.5) == 2, "0.1 for each, of the model that guesses"


def test_all_sequences_share_a_step() -> None:
    widths = Speculation(FREE)._widths([[0.9] * 15] * 8)
    assert sum(widths) == MOST_IN_STEP - 8
    assert sum(Speculation(FREE, most_in_step=4)._widths([[0.9] * 15])) == 3
    assert sum(Speculation(FREE, most_in_step=4)._widths([[0.9] * 15] * 3)) == 1
    assert sum(Speculation(FREE, most_in_step=4)._widths([[0.9] * 15] * 5)) == 0
    assert max(widths) - min(widths) <= 1
    large = Given(*(1.0 for _ in range(4)), *(1.0 + 0.3 * n for n in range(1, 60)))  # free up to four, dear beyond
    assert sum(Speculation(large)._widths([[0.3] * 4] * 4)) == 0
    assert sum(Speculation(large)._widths([[0.3] * 4])) == 3


def test_costs_are_measured_again_rarely() -> None:
    speculation = Speculation(Given(1.0, 3.0))
    tried = [step for step in range(20_000) if sum(speculation._widths([[0.9] * 4]))]
    assert tried[:3] == [FIRST_PROBE - 1, 3 * FIRST_PROBE - 1, 7 * FIRST_PROBE - 1]
    assert len(tried) < 15
    never = Speculation(Given(1.0, 3.0))
    assert not any(sum(never._widths([[0.02] * 4])) for _ in range(5000)), "nothing could make these pay"


def asked(prompt: Sequence[int], **values: float) -> Request:
    params = GenerationParams.from_mapping({"max_tokens": 50, **values})
    request = Request(tuple(prompt), params, frozenset(), Nobody(), 256)  # type: ignore[arg-type]
    request.computed = len(prompt) - 1
    return request


def all_room(request: Request, tokens: int) -> int:
    return tokens


def test_who_gets_guesses() -> None:
    speculation, words = Speculation(FREE), [5, 6, 7, 8] * 5
    one, paced, last = asked(words), asked(words, max_tokens_per_second=9.0), asked(words, max_tokens=3)
    work = speculation.add_drafts([Work(one, 1), Work(paced, 1), Work(last, 1)], all_room)
    assert [len(item.drafts) for item in work] == [15, 0, 2], "never beyond the last token of a reply"
    assert work[0].drafts[:5] == (5, 6, 7, 8, 5)
    reading = asked(words)
    reading.computed = 3
    work = [Work(one, 1), Work(reading, len(words) - 3)]
    assert speculation.add_drafts(work, all_room) == work, "not beside a prompt"
    narrow = speculation.add_drafts([Work(one, 1)], lambda _, tokens: min(tokens, 3))
    assert narrow[0].drafts == (5, 6, 7)
    assert Speculation(FREE, most=4).add_drafts([Work(one, 1)], all_room)[0].drafts == (5, 6, 7, 8)


def test_steps_are_measured_without_prompts() -> None:
    cost = Given(1.0, 1.5, 2.0)
    speculation, one = Speculation(cost), asked([1, 2, 3])
    assert speculation.observe([Work(one, 1, (4, 5))], 0.3) == pytest.approx(0.5)
    assert speculation.observe([Work(one, 1)], 0.3) == 1.0
    one.computed = 0
    assert speculation.observe([Work(one, 3)], 0.3) == 1.0
    assert cost.seen == [3, 1]


def test_where_nothing_is_worth_it_it_is_looked_for_seldom() -> None:
    """And found again: at most so many steps after the text has begun to repeat itself."""
    cost = Given(1.0, 1.1)
    speculation, one, text = Speculation(cost), asked([1, 2, 3], max_tokens=200), iter(range(1000, 2000))
    looked = 0
    for _ in range(UNUSED + 10 * TOGETHER):
        assert not speculation.add_drafts([Work(one, 1)], all_room)[0].drafts
        seen = len(cost.seen)
        assert speculation.observe([Work(one, 1)], 0.3) == 1.0
        looked += len(cost.seen) - seen
        one.ids.append(next(text))
        one.computed += 1
    assert UNUSED <= looked <= UNUSED + 12
    for steps in range(2 * TOGETHER):
        one.ids.append(1000 + steps)
        one.computed += 1
        if speculation.add_drafts([Work(one, 1)], all_room)[0].drafts:
            break
    assert steps <= TOGETHER + 2
    other = asked([5, 6, 7, 8] * 5)
    speculation._resting, speculation._rested = TOGETHER, 1
    assert speculation.add_drafts([Work(one, 1), Work(other, 1)], all_room)[1].drafts, (
        "somebody new is not kept waiting"
    )
