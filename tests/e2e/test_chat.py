"""The Chat tab in a real browser."""

from __future__ import annotations

import re
import threading

from playwright.sync_api import Page, expect

from backend.errors import BusyError, UserError
from backend.events import LoadProgress, Status
from backend.text.messages import Message
from tests.e2e.conftest import Site, Watch, done, say, settled, wait_for

LONG = " ".join(f"word{i}" for i in range(4000))


def users(page: Page):
    return page.locator("#messages .message.user")


def replies(page: Page):
    return page.locator("#messages .message.bot")


def test_sends_and_streams(page: Page, site: Site) -> None:
    site.service.hold_at = 50, threading.Event()
    site.service.reply = lambda asked: "one two three " * 20 + "end of it"
    expect(page.locator("#welcome")).to_contain_text("SmolLM2 135M, as shipped answers")
    say(page, "Hello there", wait=False)
    expect(page.locator("#live")).to_contain_text("one two three")
    expect(page.locator("#live")).not_to_contain_text("end of it")
    expect(page.locator("#chat-state .numbers")).to_contain_text("tokens/s")
    expect(page.locator("#stop")).to_be_visible()
    expect(page.locator("#send")).to_be_hidden()
    site.service.hold_at[1].set()
    done(page)
    expect(replies(page)).to_contain_text("end of it")
    expect(page.locator("#box textarea")).to_have_value("")
    expect(page.locator("#chat-state .numbers")).to_contain_text(
        re.compile(r"\d+\.\d tokens/s · \d\.\d\d s to first · \d+ tokens")
    )
    expect(page.locator("#meter")).to_contain_text(re.compile(r"\d+ / 2,048 tokens · about 1,\d\d0 words left"))
    assert site.service.asked == [(Message("user", "Hello there"),)]


def test_says_what_is_going_on_before_the_first_token(page: Page, site: Site) -> None:
    site.service.hold_prefill = threading.Event()
    say(page, "a longer message of a few words", wait=False)
    expect(page.locator("#chat-state .words")).to_have_text("Reading 11 tokens")
    site.service.hold_prefill.set()
    done(page)


def test_stop_keeps_the_text_and_stops_the_engine(page: Page, site: Site) -> None:
    site.service.reply = lambda asked: LONG
    say(page, "Go on for long", wait=False)
    expect(page.locator("#live")).to_contain_text("word5")
    page.locator("#stop").click()
    wait_for(lambda: site.service.requests[0].cancelled.is_set())
    done(page)
    expect(replies(page)).to_contain_text("word5")
    expect(page.locator("#chat-state")).to_contain_text("stopped")
    text, said = replies(page).inner_text(), site.service.requests[0].stats().completion_tokens
    page.wait_for_timeout(500)
    assert replies(page).inner_text() == text
    assert site.service.requests[0].stats().completion_tokens == said < 4000


def test_stop_before_the_first_word_gives_the_message_back(page: Page, site: Site) -> None:
    site.service.hold_prefill = threading.Event()
    say(page, "Never mind", wait=False)
    expect(page.locator("#chat-state .words")).to_contain_text("Reading")
    page.locator("#stop").click()
    done(page)
    expect(page.locator("#box textarea")).to_have_value("Never mind")
    expect(users(page)).to_have_count(0)


def test_regenerate_keeps_both_versions(page: Page, site: Site) -> None:
    answers = iter(["first answer", "second answer"])
    site.service.reply = lambda asked: next(answers)
    say(page, "Tell me")
    expect(page.locator("#older")).to_be_hidden()
    page.locator("#regenerate").click()
    expect(replies(page)).to_have_text("second answer")
    expect(page.locator("#versions")).to_contain_text("2 / 2")
    page.locator("#older").click()
    expect(replies(page)).to_have_text("first answer")
    expect(page.locator("#versions")).to_contain_text("1 / 2")
    assert site.service.asked[1] == (Message("user", "Tell me"),)


def test_edit_my_message(page: Page, site: Site) -> None:
    say(page, "first question")
    say(page, "second question")
    users(page).first.hover()
    page.get_by_label("Edit", exact=True).first.click()
    page.locator("#messages textarea").fill("better question")
    page.get_by_label("Submit").click()
    expect(users(page)).to_have_count(1)
    done(page)
    expect(replies(page)).to_have_text("You said: better question")
    assert site.service.asked[-1] == (Message("user", "better question"),)


def test_turns_that_are_not_read_any_more_are_marked(page: Page, site: Site) -> None:
    words = "2 earlier messages are not read any more: the context holds 2,048 tokens"
    mark = "row => getComputedStyle(row, '::before').content"
    rows = page.locator("#messages .message-row")
    say(page, "first question")
    expect(page.locator("#cut")).to_have_text("")
    site.service.left_out, site.service.hold_at = 2, (20, threading.Event())
    site.service.reply = lambda asked: "one two three " * 20
    say(page, "second question", wait=False)
    expect(page.locator("#live")).to_contain_text("one two three")
    expect(page.locator("#cut")).to_have_text(words)
    page.locator("#stop").click()
    done(page)
    expect(page.locator("#cut")).to_have_text(words)
    expect(page.locator("#chat-state")).to_contain_text("without 2 earlier messages")
    expect(rows).to_have_count(4)
    assert [row.evaluate(mark) for row in rows.all()] == ["none", "none", f'"{words}"', "none"]
    asked = [len(site.service.count_chat_asked[-1]), len(site.service.asked[-1])]
    assert asked == [2, 3], "the meter counts what is read; the service is given all"
    page.reload()
    settled(page)
    expect(page.locator("#cut")).to_have_text(words)
    # an edit makes a shorter chat, and a branch has a place of its own
    site.service.left_out, site.service.hold_at = 0, None
    users(page).first.hover()
    page.get_by_label("Edit", exact=True).first.click()
    page.locator("#messages textarea").fill("better question")
    page.get_by_label("Submit").click()
    expect(users(page)).to_have_count(1)
    done(page)
    expect(page.locator("#cut")).to_have_text("")
    page.locator("#regenerate").click()
    expect(page.locator("#versions")).to_contain_text("2 / 2")
    done(page)
    expect(page.locator("#chat-state")).not_to_contain_text("without")


def test_new_chat_clears(page: Page, site: Site) -> None:
    say(page, "to be forgotten")
    page.locator("#new-chat").click()
    expect(page.locator("#welcome")).to_be_visible()
    expect(users(page)).to_have_count(0)
    say(page, "fresh")
    assert site.service.asked[-1] == (Message("user", "fresh"),)


def test_new_chat_while_writing_stops_the_reply(page: Page, site: Site) -> None:
    site.service.reply = lambda asked: LONG
    say(page, "Go on for long", wait=False)
    expect(page.locator("#live")).to_contain_text("word5")
    page.locator("#new-chat").click()
    wait_for(lambda: site.service.requests[0].cancelled.is_set())
    expect(page.locator("#welcome")).to_be_visible()
    page.wait_for_timeout(700)
    expect(page.locator("#live .md > *")).to_have_count(0)
    expect(page.locator("#welcome")).to_be_visible()


def test_system_prompt_reaches_the_model(page: Page, site: Site) -> None:
    page.locator("#system-toggle").click()
    page.locator("#system textarea").fill("Answer in verse.")
    say(page, "Hello")
    assert site.service.asked[-1] == (Message("system", "Answer in verse."), Message("user", "Hello"))


def test_examples_can_be_pressed(page: Page, site: Site) -> None:
    page.locator(".example").first.click()
    done(page)
    expect(users(page)).to_contain_text("rainbows")


def test_code_math_and_copy(page: Page, site: Site) -> None:
    site.service.reply = lambda asked: (
        'So:\n\n```python\ndef f(n):\n    return "x"\n```\n\n$$E = mc^2$$ and \\(a^2\\) end'
    )
    say(page, "code please")
    expect(replies(page).locator("pre .token.keyword").first).to_have_text("def")
    expect(replies(page).locator(".katex")).to_have_count(2)
    expect(replies(page).locator(".copy_code_button")).to_have_count(1)
    expect(page.locator("#messages .bot-row + .message-buttons").get_by_label("Copy message")).to_be_visible()


def test_indentation_of_what_i_type_survives(page: Page, site: Site) -> None:
    say(page, "    indented\n\tand tabbed", wait=False)
    expect(replies(page)).to_have_count(1)
    assert site.service.asked[-1] == (Message("user", "    indented\n\tand tabbed"),)


def test_error_keeps_the_typed_message(page: Page, site: Site) -> None:
    site.service.fail_next = BusyError("64 people are waiting already; try again in a minute")
    say(page, "my careful question", wait=False)
    expect(page.locator("#chat-notice [role=alert]")).to_have_text(
        "64 people are waiting already; try again in a minute."
    )
    expect(page.locator("#box textarea")).to_have_value("my careful question")
    expect(users(page)).to_have_count(0)
    page.locator("#send").click()
    expect(replies(page)).to_have_text("You said: my careful question")
    expect(page.locator("#chat-notice [role=alert]")).to_have_count(0)


def test_a_defect_shows_no_stack(page: Page, site: Site) -> None:
    def broken(asked: object) -> str:
        raise RuntimeError("secret detail")

    site.service.reply = broken
    say(page, "hello", wait=False)
    expect(page.locator("#chat-notice [role=alert]")).to_contain_text("Something went wrong inside Suri")
    expect(page.locator("#box textarea")).to_have_value("hello")
    assert "secret detail" not in page.content()


def test_error_in_the_middle_keeps_the_text(page: Page, site: Site) -> None:
    site.service.reply = lambda asked: LONG
    say(page, "Go", wait=False)
    expect(page.locator("#live")).to_contain_text("word3")
    run = next(run for session in site.registry.sessions() for run in session.runs.values())
    assert run.generation is not None
    run.generation.on_finish("error", UserError("the model's output was not a number"))
    expect(page.locator("#chat-notice [role=alert]")).to_have_text("The model's output was not a number.")
    expect(replies(page)).to_contain_text("word3")


def test_waits_while_a_model_is_loading(page: Page, site: Site) -> None:
    ready = site.service.status()
    site.service.set_status(Status(state="loading", loading=LoadProgress("Loading starter", 38, 100)))
    say(page, "patient question", wait=False)
    expect(page.locator("#chat-state .words")).to_have_text("Loading starter, 38%")
    site.service.set_status(ready)
    done(page)
    expect(replies(page)).to_have_text("You said: patient question")


def test_reload_brings_the_chat_back(page: Page, site: Site) -> None:
    say(page, "remember me")
    page.reload()
    settled(page)
    expect(users(page)).to_have_text("remember me")
    expect(replies(page)).to_have_text("You said: remember me")
    say(page, "and now")
    assert len(site.service.asked[-1]) == 3  # type: ignore[arg-type]


def test_reload_in_the_middle_keeps_what_was_there(page: Page, site: Site, watch: Watch) -> None:
    watch.expected = (
        "AbortError",
        "Connection errored out",
    )  # Gradio's own words about the stream that the reload cuts off
    site.service.reply = lambda asked: LONG
    say(page, "Go on", wait=False)
    expect(page.locator("#live")).to_contain_text("word20")
    page.reload()
    settled(page)
    expect(replies(page)).to_contain_text("word20")
    wait_for(lambda: site.service.requests[0].cancelled.is_set())
    expect(page.locator("#send")).to_be_visible()


def test_long_chat_is_not_sent_again_while_streaming(page: Page, site: Site) -> None:
    """The reply in progress is in the light part, so the list of turns is not touched until the end."""
    say(page, "one")
    site.service.reply, site.service.hold_at = (lambda asked: LONG), (70, threading.Event())
    say(page, "two", wait=False)
    expect(page.locator("#live")).to_contain_text("word5")
    page.evaluate("""() => new MutationObserver((seen) => window.touched = (window.touched || 0) + seen.length)
        .observe(document.querySelector('#messages'), {childList: true, subtree: true, characterData: true})""")
    expect(page.locator("#live")).to_contain_text("word60")
    assert page.evaluate("window.touched || 0") == 0
    page.locator("#stop").click()
    done(page)
