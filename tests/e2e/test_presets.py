"""The Presets tab in a real browser: choosing, loading, calling off, taking turns, and what is shown of each preset."""

from __future__ import annotations

import re
import threading

from playwright.sync_api import Page, expect

from backend.errors import CheckpointError
from backend.events import Measured, PresetInfo
from tests.e2e.conftest import Site, done, say, tab, wait_for

BF16, F32 = "Load SmolLM2 135M, bf16", "Load SmolLM2 135M, f32"


def test_preset_load_shows_progress_and_the_chat_goes_on(page: Page, site: Site) -> None:
    say(page, "before")
    page.locator("#chip .chip").click()
    expect(page.locator("#preset-table tr.on")).to_contain_text("SmolLM2 135M, as shipped")
    site.service.hold_load = threading.Event()
    page.get_by_role("button", name="Load SmolLM2 135M, bf16").click()
    expect(page.locator("#preset-progress [role=progressbar]")).to_be_visible()
    expect(page.locator("#preset-progress")).to_contain_text(re.compile(r"Loading starter-bf16, \d0%"))
    site.service.hold_load.set()
    expect(page.locator("#preset-table tr.on")).to_contain_text("SmolLM2 135M, bf16")
    expect(page.locator("#preset-progress [role=progressbar]")).to_have_count(0)
    expect(page.locator("#chip")).to_contain_text("SmolLM2 135M, bf16")
    tab(page, "Chat")
    say(page, "after")
    assert len(site.service.asked[-1]) == 3  # type: ignore[arg-type]


def test_failed_load_says_why_and_the_earlier_preset_stays(page: Page, site: Site) -> None:
    tab(page, "Presets")
    site.service.fail_load = CheckpointError("model.safetensors ends at byte 1,000, expected 2,000")
    page.get_by_role("button", name=F32).click()
    expect(page.locator("#preset-notice [role=alert]")).to_contain_text("model.safetensors ends at byte 1,000")
    expect(page.locator("#preset-table tr.on")).to_contain_text("SmolLM2 135M, as shipped")
    expect(page.locator("#chip")).to_contain_text("SmolLM2 135M, as shipped")


def test_cancel_brings_the_earlier_preset_back(page: Page, site: Site) -> None:
    tab(page, "Presets")
    site.service.hold_load = threading.Event()
    page.get_by_role("button", name=BF16).click()
    expect(page.locator("#preset-progress")).to_contain_text(re.compile(r"\d+ of 100 MB · about \d+ s left"))
    page.get_by_role("button", name="Cancel loading SmolLM2 135M, bf16").click()
    expect(page.locator("#preset-notice [role=status]")).to_contain_text("Loading 'starter-bf16' was cancelled")
    expect(page.locator("#preset-notice")).to_contain_text("SmolLM2 135M, as shipped goes on answering")
    expect(page.locator("#preset-progress [role=progressbar]")).to_have_count(0)
    expect(page.locator("#preset-table tr.on")).to_contain_text("SmolLM2 135M, as shipped")
    expect(page.get_by_role("button", name=BF16)).to_be_visible()


def test_a_message_sent_in_the_gap_waits_and_is_answered_by_the_new_model(page: Page, site: Site) -> None:
    say(page, "before")
    tab(page, "Presets")
    site.service.gap, site.service.hold_load = True, threading.Event()
    page.get_by_role("button", name=BF16).click()
    expect(page.locator("#preset-progress [role=progressbar]")).to_be_visible()
    tab(page, "Chat")
    say(page, "while nothing is loaded", wait=False)
    expect(page.locator("#chat-state .words")).to_contain_text("Loading starter-bf16")
    assert site.service.asked[-1][-1].content == "before"  # type: ignore[index]
    site.service.hold_load.set()
    expect(page.locator("#messages .message.bot").last).to_contain_text("You said: while nothing is loaded")
    done(page)
    assert len(site.service.asked[-1]) == 3  # type: ignore[arg-type]
    expect(page.locator("#chip")).to_contain_text("SmolLM2 135M, bf16")


def test_two_people_load_in_order_and_the_second_is_told(page: Page, site: Site, window) -> None:
    second = window()
    site.service.hold_load = threading.Event()
    for each in (page, second):
        tab(each, "Presets")
    page.get_by_role("button", name=BF16).click()
    expect(page.locator("#preset-progress [role=progressbar]")).to_be_visible()
    second.get_by_role("button", name=F32).click()
    expect(second.locator("#preset-progress")).to_contain_text(
        "is being loaded by someone; yours ('starter-f32') is next"
    )
    site.service.hold_load.set()
    expect(page.locator("#preset-table tr.on")).to_contain_text("SmolLM2 135M, bf16")
    expect(second.locator("#preset-table tr.on")).to_contain_text("SmolLM2 135M, f32")
    wait_for(lambda: site.service.status().preset == "starter-f32")


def test_what_is_known_of_each_preset_is_shown(page: Page, site: Site) -> None:
    site.service.measured = [
        Measured(48.5, 900_000_000, perplexity=14.25, kl=0.0),
        Measured(20.0, 1_400_000_000, perplexity=14.31, kl=0.0021),
        None,
    ]
    site.service.further = [
        PresetInfo("big", "Big <b>model</b>", "models/big", "", fits="no", why_not="too large", ram_bytes=9 * 10**9),
        PresetInfo("far", "Far model", "models/far", "", note="not here yet", fits="after-unload", ram_bytes=10**9),
        PresetInfo("bad", "bad", "", "", error="bad.yaml: unknown key 'wieghts'"),
    ]
    tab(page, "Presets")
    rows = page.locator("#preset-table tr")
    first = rows.filter(has_text="as shipped")
    expect(first.locator("[data-label=Speed] .first")).to_have_text("48.5 tokens/s")
    expect(first).to_contain_text("measured; 52.0 tokens/s predicted")
    expect(first.locator("[data-label=Perplexity] .first")).to_have_text("14.25")
    expect(rows.filter(has_text="bf16")).to_contain_text("KL 0.0021")
    expect(rows.filter(has_text="f32")).to_contain_text("predicted, ram bandwidth")
    expect(rows.filter(has_text="Big <b>model</b>").locator("[data-label=Fits]")).to_contain_text("too large")
    expect(rows.filter(has_text="Far model")).to_contain_text("in place of the loaded one")
    expect(page.locator("#preset-table tr.group")).to_have_text("Their model is not here yet")
    expect(rows.filter(has_text="wieghts")).to_contain_text("cannot be read")
    expect(page.locator("#preset-plot svg circle")).to_have_count(2)
    expect(page.get_by_role("img", name="SmolLM2 135M, bf16: 20.0 tokens/s, 1.4 GB")).to_be_visible()
    expect(page.locator("#preset-holding")).to_contain_text("weights 0.1 GB")
    site.service.measured, site.service.further = None, []
    tab(page, "Chat")
    tab(page, "Presets")
    expect(page.locator("#preset-plot svg")).to_have_count(0)
