"""Numbers and sentences of the page."""

import pytest

from backend.errors import CheckpointError, UserError
from backend.events import LoadProgress, PresetInfo, Stats, Status
from ui import pieces, wording
from ui.presets_tab import table
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
    good = PresetInfo("starter", "Starter", "starter", "about 0.5 GB of memory", loaded=True)
    html = table([broken, good], Status(state="ready"))
    row, other = html.split("<tr")[2:4]
    assert 'colspan="2"' in row
    assert 'class="needs"' not in row
    assert "&lt;b&gt; is unknown" in row
    assert 'class="needs">about 0.5 GB of memory' in other
