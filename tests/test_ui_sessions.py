"""Who is here, and what becomes of a reply whose page has gone."""

import asyncio
from collections.abc import Callable

import pytest

from backend.errors import UserError
from backend.params import KNOBS, GenerationParams
from tests.fakes import FakeService
from ui.conversation import Conversation
from ui.parameters_tab import marks, read_params, show_params
from ui.replies import follow
from ui.sessions import Registry, Run, Session, settle


def begun(session: Session, text: str = "hello") -> Run:
    conversation = session.workspace.conversation
    run = Run(GenerationParams(), typed=text, added=conversation.add_user(text))
    run.reply = conversation.open_reply()
    session.begin("chat", run)
    return run


def lines(conversation: Conversation) -> list[str]:
    return [turn.text for turn in conversation.path()]


def test_a_reload_finds_its_workspace_and_ends_the_earlier_page() -> None:
    registry = Registry()
    first = registry.open("page1", "tab")
    run = begun(first)
    assert run.reply is not None
    run.reply.text = "half an ans"
    second = registry.open("page2", "tab")
    assert run.stopped
    assert run.done
    assert lines(second.workspace.conversation) == ["hello", "half an ans"]
    assert registry.running() == 0
    assert registry.open("page3", "other").workspace is not second.workspace
    assert registry.open("page4", "tab", owner="ana").workspace is not second.workspace


def test_a_message_of_which_nothing_came_goes_back() -> None:
    session = Registry().open("page", "tab")
    run = begun(session, "unanswered")
    settle(session.workspace, run)
    assert lines(session.workspace.conversation) == []
    assert session.workspace.draft == "unanswered"


def test_old_workspaces_and_pages_are_forgotten() -> None:
    registry = Registry(keep=2, pages=3)
    kept = registry.open("p0", "t0").workspace
    runs = [begun(registry.open(f"p{i}", f"t{i}")) for i in range(1, 5)]
    assert registry.open("again", "t0").workspace is not kept
    assert len(registry.sessions()) == 3
    assert runs[0].stopped
    assert not runs[-1].stopped


def test_one_reply_at_a_time() -> None:
    session = Registry().open("page", "tab")
    begun(session)
    with pytest.raises(UserError, match="press Esc"):
        session.begin("chat", Run(GenerationParams()))
    session.begin("completion", Run(GenerationParams()))
    session.drop("chat")
    session.begin("chat", Run(GenerationParams()))


def test_knobs_survive_their_widgets() -> None:
    params = GenerationParams(temperature=1.3, seed=2**62 + 1, stop=("a", "b c"))
    assert read_params(show_params(params)) == params
    assert "Temperature" in marks(params, GenerationParams())
    assert "Seed" in marks(params, GenerationParams())
    with pytest.raises(UserError, match="Seed: found 'x'"):
        read_params([("x" if knob.kind == "seed" else v) for knob, v in zip(KNOBS, show_params(params), strict=True)])


def test_what_is_not_begun_does_not_start_twice() -> None:
    session = Registry().open("page", "tab")
    run = begun(session)
    assert session.fresh("chat") is run
    assert session.fresh("chat") is None
    assert session.take_done("chat") is None
    settle(session.workspace, run)
    assert session.take_done("chat") is run
    assert session.take_done("chat") is None


async def _leave_early(service: FakeService, run: Run, ask: Callable[[], object]) -> None:
    moments = follow(service, run, ask)  # type: ignore[arg-type]
    async for moment in moments:
        if moment.text:
            break
    await moments.aclose()


def test_closing_the_iterator_stops_the_engine() -> None:
    service = FakeService(delay=0.01)
    service.reply = lambda asked: "word " * 5000
    run = Run(GenerationParams(max_tokens=0))
    asyncio.run(_leave_early(service, run, lambda: service.complete("x", run.params)))
    assert service.requests[0].cancelled.is_set()


def test_leaving_while_the_prompt_is_prepared_stops_the_engine_too() -> None:
    service = FakeService(delay=0.01)
    service.reply = lambda asked: "word " * 5000
    run = Run(GenerationParams(max_tokens=0))

    def slow() -> object:
        run.stop()  # the person goes while the template is rendered
        return service.complete("x", run.params)

    asyncio.run(_leave_early(service, run, slow))
    assert service.requests[0].cancelled.wait(2)
