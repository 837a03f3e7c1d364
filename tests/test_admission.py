"""Who waits and for how long: who was served least, and who has no room yet. No model: tokens are made up."""

from __future__ import annotations

import itertools

from backend.engine import fairness
from backend.engine.fairness import Served
from backend.engine.pairs import add_partner
from backend.engine.request import Request
from backend.engine.scheduler import PASSED_BY
from backend.params import GenerationParams
from tests.stepping import BLOCK, Steps, alone, request


def test_who_comes_back_again_and_again_is_no_newcomer() -> None:
    """One request after the other is served like many at once: by what somebody has had."""
    steps = Steps(9)  # 72 tokens: one of these prompts at a time
    line = [request(60, tokens=1, person="line") for _ in range(6)]
    for each in line:
        steps.scheduler.add(each)
    order: list[str] = []
    for _ in range(12):
        again = request(60, tokens=1, person="again")
        steps.scheduler.add(again)
        while again not in steps.done:
            steps.step()
        order = [each.person for each in steps.done]
    between = [place for place, person in enumerate(order) if person == "line"]
    assert len(between) == 6, "those who wait come to their turn"
    assert all(later - earlier <= 3 for earlier, later in itertools.pairwise(between))


def test_who_was_here_is_remembered_but_not_for_ever() -> None:
    served = Served()
    served.arrive("stays")
    served.charge("stays", 10)
    served.arrive("a")
    served.charge("a", 90)
    served.leave("a")
    served.arrive("new")
    assert served.tokens("new") == 10, "no less than those who are here"
    served.arrive("a")
    assert served.tokens("a") == 100
    served.leave("a")
    for number in range(fairness.REMEMBERED):
        served.arrive(f"p{number}")
        served.leave(f"p{number}")
    served.arrive("a")
    assert served.tokens("a") == 10


# what has no room ---------------------------------------------------------------------------------------------------


def guided(prompt: int, negative: int, person: str, context: int = 64) -> Request:
    pair = request(prompt, tokens=3, person=person)
    pair.params = GenerationParams(max_tokens=3, guidance_scale=2.0)
    pair.context = context
    add_partner(pair, list(range(50_000_000 + prompt, 50_000_000 + prompt + negative)), 14, BLOCK)
    return pair


def test_two_people_with_guided_replies_do_not_take_turns_for_ever() -> None:
    steps = Steps(14)
    steps.scheduler.add(request(35, tokens=200, person="b"))
    steps.step()
    steps.scheduler.add(guided(5, 20, "b"))
    steps.scheduler._admit()
    steps.scheduler.add(guided(44, 1, "a"))
    steps.scheduler.schedule()
    assert steps.scheduler.counts.preemptions <= 1


def test_nobody_gives_up_where_that_is_not_enough() -> None:
    """Six replies share a preface: what one of them would give back is its own few blocks."""
    steps, preface = Steps(62), list(range(240))
    replies = [request([*preface, 9000 + n], tokens=40, person="many") for n in range(6)]
    for each in replies:
        steps.scheduler.add(each)
    while not all(each.completion_tokens >= 3 for each in replies):
        steps.step()
    large = request(360, tokens=2, person="large")
    steps.scheduler.add(large)
    for _ in range(4):
        steps.step()
    assert steps.scheduler.counts.preemptions == 0
    assert large in steps.scheduler.waiting
    assert all(each.completion_tokens >= 7 for each in replies), "they go on"
    steps.run()
    assert large.ids == alone(large.prompt, 2)


def test_who_has_room_passes_who_has_none_but_not_for_ever() -> None:
    steps = Steps(62)
    old, large = request(250, tokens=240, person="old"), request(360, tokens=2, person="large")
    steps.scheduler.add(old)
    while old.completion_tokens < 3:
        steps.step()
    steps.scheduler.add(large)
    steps.step()
    passed = 0
    while large in steps.scheduler.waiting and old not in steps.done:
        small = request(8, tokens=2, person=f"small{passed}")
        steps.scheduler.add(small)
        for _ in range(3):
            steps.step()
        if small not in steps.done:
            break
        passed += 1
    assert passed == PASSED_BY, "then what becomes free is kept"
    steps.run()
    assert large.ids == alone(large.prompt, 2)
    assert steps.pool.in_use == 0


def test_a_pair_that_has_no_room_changes_nothing() -> None:
    steps = Steps(40)
    for _ in range(8):
        steps.scheduler.add(request(24, tokens=1))
    steps.run()
    steps.scheduler.add(request(100, tokens=60))
    for _ in range(3):
        steps.step()
    cached, evicted = steps.pool.cached, steps.pool.counts.evicted
    pair = request(150, tokens=2)
    pair.params = GenerationParams(max_tokens=2, guidance_scale=2.0)
    add_partner(pair, list(range(5, 155)), 40, BLOCK)
    steps.scheduler.add(pair)
    steps.step()
    assert pair in steps.scheduler.waiting
    assert steps.pool.counts.evicted == evicted
    assert steps.pool.cached in (cached, cached + 1), "what was cached still is"


def test_who_keeps_to_a_speed_limit_reads_on_all_the_same() -> None:
    """A reply that gave up its blocks is read again at once: others may wait for what they have in common with it."""
    now, document = [0.0], list(range(200))
    steps = Steps(60)
    slow = request(document, tokens=50, person="slow", clock=lambda: now[0])
    slow.params = GenerationParams(max_tokens=50, max_tokens_per_second=0.01)
    steps.scheduler.add(slow)
    while not slow.completion_tokens:
        steps.step()
    slow.pace(now[0])
    steps.scheduler._preempt(slow)
    steps.scheduler.waiting.remove(slow)
    steps.scheduler.add(other := request(400, tokens=1, person="other"))
    while other not in steps.done:
        steps.step()
    steps.scheduler.waiting.append(slow)
    steps.step()
    quick = request([*document, 7777], tokens=2, person="quick", clock=lambda: now[0])
    steps.scheduler.add(quick)
    for _ in range(6):
        steps.step()
    assert quick in steps.done
    assert slow.completion_tokens == 1


def test_a_scored_prompt_that_is_cached_needs_its_blocks_once() -> None:
    steps, prompt = Steps(20), list(range(90))
    steps.scheduler.add(request(prompt, tokens=1))
    steps.run()
    scored, evaluated = request(prompt, tokens=60, score_prompt=True), 0
    steps.scheduler.add(scored)
    while scored not in steps.done:
        evaluated += sum(item.tokens for item in steps.step())
    assert steps.scheduler.counts.preemptions == 0
    assert evaluated == 90 + 59
    assert scored.ids == alone(scored.prompt, 60)
