"""Completion, Parameters and Presets in a real browser."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import Page, expect

from backend.errors import UserError
from backend.params import KNOBS, GenerationParams
from tests.e2e.conftest import Site, say, settled, tab, wait_for

LONG = " ".join(f"word{i}" for i in range(4000))


@pytest.fixture
def text(page: Page) -> Page:
    """The Completion tab with an empty text."""
    tab(page, "Completion")
    page.locator("#completion-text textarea").fill("")
    return page


def area(page: Page):
    return page.locator("#completion-text textarea")


def test_completion_goes_on_in_the_same_text_and_can_be_undone(text: Page, site: Site) -> None:
    site.service.reply = lambda asked: " and then" if len(str(asked)) < 20 else " the end"
    area(text).fill("Once upon a time")
    text.locator("#completion-go").click()
    expect(area(text)).to_have_value("Once upon a time and then")
    expect(area(text)).to_be_editable()
    text.locator("#completion-go").click()
    expect(area(text)).to_have_value("Once upon a time and then the end")
    expect(text.locator("#completion-state")).to_contain_text("tokens")
    assert site.service.asked == ["Once upon a time", "Once upon a time and then"]
    text.locator("#completion-undo").click()
    expect(area(text)).to_have_value("Once upon a time and then")
    text.locator("#completion-undo").click()
    expect(area(text)).to_have_value("Once upon a time")


def test_completion_stop_keeps_the_text(text: Page, site: Site) -> None:
    site.service.reply = lambda asked: " " + LONG
    area(text).fill("Start:")
    text.locator("#completion-go").click()
    expect(area(text)).to_have_value(re.compile("Start: word0 .*word5"))
    text.keyboard.press("Escape")
    wait_for(lambda: site.service.requests[0].cancelled.is_set())
    expect(text.locator("#completion-go")).to_be_visible()
    assert area(text).input_value().startswith("Start: word0 word1")


def test_completion_error_keeps_the_text(text: Page, site: Site) -> None:
    site.service.fail_next = UserError("the text does not fit into the context")
    area(text).fill("A very long text")
    text.locator("#completion-go").click()
    expect(text.locator("#completion-notice [role=alert]")).to_have_text("The text does not fit into the context.")
    expect(area(text)).to_have_value("A very long text")


@pytest.fixture
def knobs(page: Page) -> Page:
    """The Parameters tab with everything at its default."""
    tab(page, "Parameters")
    page.locator("#knob-top_p input[type=number]").fill("0.5")  # so that the answer to the press can be seen
    page.keyboard.press("Tab")
    expect(page.locator("#marks")).to_contain_text("Top-p")
    page.locator("#defaults").click()
    expect(page.locator("#marks")).to_contain_text("Everything is at its default")
    return page


def test_every_knob_is_there_and_reaches_the_model(knobs: Page, site: Site) -> None:
    page = knobs
    for fold in page.locator("#parameters .label-wrap").all():
        fold.click()
    for knob in KNOBS:
        expect(page.locator(f"#knob-{knob.name}")).to_contain_text(knob.label)
        expect(page.locator(f"#knob-{knob.name}")).to_contain_text(knob.help)
    page.locator("#knob-temperature input[type=number]").fill("1.2")
    page.keyboard.press("Tab")
    expect(page.locator("#marks")).to_contain_text("Temperature")
    page.locator("#knob-seed input, #knob-seed textarea").first.fill("42")
    page.locator("#knob-stop textarea").fill("END\nStop here")
    page.keyboard.press("Tab")
    expect(page.locator("#marks")).to_contain_text("Seed")
    tab(page, "Chat")
    say(page, "hello")
    used = site.service.params[-1]
    assert (used.temperature, used.seed, used.stop) == (1.2, 42, ("END", "Stop here"))
    page.reload()
    settled(page)
    tab(page, "Parameters")
    expect(page.locator("#knob-temperature input[type=number]")).to_have_value("1.2")
    page.locator("#defaults").click()
    expect(page.locator("#marks")).to_contain_text("Everything is at its default")
    tab(page, "Chat")
    say(page, "again")
    assert site.service.params[-1] == GenerationParams()


def test_a_value_that_does_not_fit_is_said_in_one_sentence(knobs: Page, site: Site) -> None:
    page = knobs
    page.locator("#knob-max_tokens input").fill("-5")
    page.keyboard.press("Tab")
    expect(page.locator("#parameters-notice [role=alert]")).to_contain_text("max_tokens: found -5")
    tab(page, "Chat")
    say(page, "my question", wait=False)
    expect(page.locator("#chat-notice [role=alert]")).to_contain_text("max_tokens: found -5")
    expect(page.locator("#box textarea")).to_have_value("my question")
    tab(page, "Parameters")
    page.locator("#defaults").click()
    expect(page.locator("#knob-max_tokens input")).to_have_value("1024")
    expect(page.locator("#parameters-notice [role=alert]")).to_have_count(0)


def test_sampling_sets(knobs: Page, site: Site) -> None:
    page = knobs

    def pick(name: str) -> None:
        page.locator("#sets input").click()
        page.get_by_role("option", name=name).click()

    pick("Precise")
    expect(page.locator("#knob-temperature input[type=number]")).to_have_value("0")
    page.locator("#knob-temperature input[type=number]").fill("0.3")
    page.keyboard.press("Tab")
    expect(page.locator("#sets input")).to_have_value("My own values")
    page.locator("#set-name input, #set-name textarea").first.fill("Careful")
    page.locator("#save-set").click()
    expect(page.locator("#sets input")).to_have_value("Careful")
    assert site.service.sets["Careful"].temperature == 0.3
    pick("Creative")
    expect(page.locator("#knob-temperature input[type=number]")).to_have_value("1.1")
    pick("Careful")
    expect(page.locator("#knob-temperature input[type=number]")).to_have_value("0.3")
    page.locator("#delete-set").click()
    wait_for(lambda: "Careful" not in site.service.sets)
