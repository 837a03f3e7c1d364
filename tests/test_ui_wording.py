"""Numbers and sentences of the page."""

from dataclasses import replace

import pytest

from backend.errors import CheckpointError, UserError
from backend.events import LoadProgress, Measured, PresetInfo, Stats, Status
from ui import pieces, wording
from ui.plot import plot, ticks
from ui.preset_table import table
from ui.replies import OUR_FAULT, sentence


def test_meter_in_numbers_and_words() -> None:
    assert wording.meter(612, 4096) == "612 / 4,096 tokens · about 2,600 words left"
    assert wording.meter(4096, 4096) == "4,096 / 4,096 tokens · no room left"
    assert wording.meter(5000, 4096).endswith("no room left")
    assert wording.meter(4016, 4096).endswith("about 60 words left")
    assert wording.meter(1, 0) == ""


def test_speed_says_only_what_is_known() -> None:
    assert wording.speed(Stats()) == ""
    one = Stats(completion_tokens=1, seconds_to_first_token=0.214)
    assert wording.speed(one) == "0.21 s to first · 1 token"
    many = Stats(completion_tokens=1201, seconds_to_first_token=0.2, decode_seconds=30.0)
    assert wording.speed(many) == "40.0 tokens/s · 0.20 s to first · 1,201 tokens"
    assert wording.footer(many, "cancelled").startswith("stopped · 40.0")
    assert wording.footer(many, "stop") == wording.speed(many)
    assert wording.footer(many, "stop", 2) == f"without 2 earlier messages · {wording.speed(many)}"
    assert wording.footer(many, "stop", 1).startswith("without 1 earlier message · ")
    shifted = replace(many, shifted_tokens=1500)
    assert wording.footer(shifted, "stop").startswith("went on without 1,500 tokens of the middle · ")


def test_the_line_above_which_nothing_is_read() -> None:
    assert wording.cut(2, 2048) == "2 earlier messages are not read any more: the context holds 2,048 tokens"
    assert wording.cut(1, 2048).startswith("1 earlier message is not read any more")
    assert wording.cut(0, 2048) == pieces.cut(0, 2048) == ""
    assert ":nth-child(3 of .message-row)" in pieces.cut(2, 2048)


@pytest.mark.parametrize(
    ("stats", "words"),
    [
        (Stats(), "Waiting for the model"),
        (Stats(people_ahead=1), "1 person before you"),
        (Stats(people_ahead=2), "2 people before you"),
        (Stats(phase="prefill", prompt_tokens=1240), "Reading 1,240 tokens"),
        (Stats(phase="prefill", prompt_tokens=1240, evaluated_tokens=480), "Reading 1,240 tokens, 38%"),
        (Stats(phase="prefill", prompt_tokens=1240, cached_tokens=1239), "Reading 1 token"),
        (Stats(phase="prefill", prompt_tokens=12, cached_tokens=12), "Reading"),
        (Stats(phase="decode"), "Starting"),
        (Stats(phase="decode", completion_tokens=1), "Writing"),
    ],
)
def test_phase(stats: Stats, words: str) -> None:
    assert wording.phase(stats) == words


def test_loading_and_memory() -> None:
    assert wording.loading(None) == "Loading the model"
    assert wording.loading(None, "starter") == "Loading starter"
    assert wording.loading(LoadProgress("Loading starter", 38, 100)) == "Loading starter, 38%"
    assert wording.loading(LoadProgress("Downloading")) == "Downloading"
    assert wording.memory(13_700_000_000) == "13.7 GB"
    assert wording.memory(87_000_000) == "87 MB"


def test_who_answers() -> None:
    ready = Status(state="ready", preset="starter", title="SmolLM2", weight_bytes=200_000_000, kv_bytes=100_000_000)
    assert wording.holder(ready) == "SmolLM2"
    assert wording.held_memory(ready) == "0.3 GB"
    assert wording.answers(ready) == "SmolLM2 answers, on this machine only."
    assert wording.holder(Status(state="empty")) == "No model loaded"
    assert wording.answers(Status(state="failed", error="The file is gone.")) == "The file is gone."


def test_sentences() -> None:
    assert sentence(UserError("the prompt is too long")) == "The prompt is too long."
    assert sentence(CheckpointError("model.safetensors is cut off.")) == "model.safetensors is cut off."
    assert sentence(RuntimeError("secret")) == OUR_FAULT


def test_pieces_escape_what_they_are_given() -> None:
    bad = '<img src=x onerror="hit()">'
    status = Status(state="ready", preset=bad, title=bad)
    shown = [pieces.notice(bad), pieces.chip(status), pieces.state_line(busy=True, words=bad, numbers=bad)]
    shown.append(pieces.progress_bar(LoadProgress(bad), bad))
    assert not any("<img" in text for text in shown)


def test_a_preset_that_cannot_be_read_has_the_room_of_what_it_would_need() -> None:
    broken = PresetInfo("mine", "mine", "", "", loaded=False, error="mine.yaml: <b> is unknown")
    good = PresetInfo("starter", "Starter", "starter", "about 0.5 GB of memory", ram_bytes=500_000_000)
    html = table([broken, good], Status(state="ready", preset="starter"))
    row, other = html.split("<tr")[2:4]
    assert 'colspan="4"' in row
    assert "data-label" not in row
    assert "&lt;b&gt; is unknown" in row
    assert "0.5 GB" in other
    assert "running" in other


def test_what_can_be_done_with_a_preset() -> None:
    rows = [PresetInfo(name, name, "starter", "") for name in ("one", "two", "three", "four")]
    step = LoadProgress("Loading two", 1, 2)
    html = table(rows, Status("ready", "one", loading=step, loading_preset="two", next_presets=("three",)))
    one, two, three, four = html.split("<tr")[2:]
    assert "running" in one
    assert "data-preset" not in one
    assert 'data-cancel="two"' in two
    assert 'data-cancel="three"' in three
    assert "waits" in three
    assert 'data-preset="four"' in four


def test_progress_in_bytes_and_time() -> None:
    assert wording.load_details(None) == wording.load_details(LoadProgress("Downloading")) == ""
    assert wording.load_details(LoadProgress("Loading", 38_000_000, 98_400_000)) == "38 of 98 MB"
    step = LoadProgress("Loading", 1_250_000_000, 13_500_000_000, seconds_left=151.0)
    assert wording.load_details(step) == "1.2 of 13.5 GB · about 3 min left"
    assert wording.load_details(LoadProgress("Measuring", 3, 12, "presets")) == "3 of 12 presets"
    assert [wording.duration(seconds) for seconds in (0.2, 12.4, 200, 9000)] == ["1 s", "12 s", "3 min", "2 h"]


def test_speed_quality_and_fit_of_a_preset() -> None:
    plain = PresetInfo("one", "one", "starter", "about 1 GB", fits="now")
    assert (wording.needs(plain), wording.quality(plain)) == (["about 1 GB"], [""])
    assert wording.speeds(plain) == ["not measured yet"]
    known = PresetInfo(
        "one", "one", "starter", "", fits="after-unload", ram_bytes=60_000_000, vram_bytes=1_000_000_000,
        tokens_per_second=41.76, bound_by="link", measured=Measured(38.2, perplexity=14.246, kl=0.00213),
    )  # fmt: skip
    assert wording.needs(known) == ["1.0 GB VRAM", "and 60 MB of memory"]
    assert wording.speeds(known) == ["38.2 tokens/s", "measured; 41.8 tokens/s predicted"]
    assert wording.quality(known) == ["14.25", "KL 0.0021"]
    assert wording.fitting(known) == "in place of the loaded one"
    assert wording.speeds(replace(known, measured=None)) == ["41.8 tokens/s", "predicted, link"]
    assert wording.rate(0.0001) == "3 h a token"


def test_what_is_loaded_in_numbers() -> None:
    assert wording.holding(Status("loading")) == []
    status = Status(
        "ready", "one", "Model one", context=2048, weight_bytes=100_000_000, kv_bytes=50_000_000, process_bytes=10**9,
        device="cpu", predicted_bytes=1_100_000_000, kv_used_bytes=3_000_000, free_bytes=5_400_000_000,
        cache_tokens=4160, cache_free_tokens=3900,
    )  # fmt: skip
    assert dict(wording.holding(status)) == {
        "Loaded": "Model one · cpu",
        "Memory": "weights 0.1 GB · cache 3 MB of 50 MB in use · whole process 1.0 GB, 1.1 GB at most were predicted",
        "Room": "5.4 GB free · the cache has room for 3,900 of 4,160 tokens, a chat for 2,048",
    }


def test_plot_of_what_was_measured() -> None:
    rows = [
        PresetInfo("one", "<One>", "m", "", measured=Measured(48.5, 900_000_000)),
        PresetInfo("two", "Two", "m", ""),
    ]
    assert plot(rows[1:]) == ""
    html = plot(rows)
    assert html.count("<circle") == 1
    assert "&lt;One&gt;: 48.5 tokens/s, 0.9 GB" in html
    assert [ticks(most) for most in (48.5, 1.0, 0.03)] == [
        [0, 20, 40, 60],
        [0, 0.25, 0.5, 0.75, 1.0],
        [0, 0.01, 0.02, 0.03],
    ]
