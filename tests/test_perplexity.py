"""Perplexity, KL divergence and top-1 agreement: against transformers, and by hand.

The starter's perplexity is compared in test_numbers.py, where transformers has it in memory already.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from backend.commands import perplexity as command_module
from backend.errors import NumericalError, ParameterError
from backend.events import LoadProgress
from backend.quality import CHUNK, ModelSource, RecordedSource, record, recorded_bytes, score, windows_of
from backend.store.measurements import Measurements
from tests.commandline import command
from tests.oracle import reference_logits, reference_model
from tests.real import tiny_runtime
from tests.tiny import TinyModel, write_tiny

TEXT = "hello world, this is the thin hello of the world; in the world there is nothing thin. " * 12


class Fixed:
    """A source that says the same distribution everywhere."""

    def __init__(self, *probabilities: float) -> None:
        self.row = torch.tensor(probabilities).log()

    def log_probs(self, window):
        yield self.row.expand(len(window) - len(window) // 2 - 1, -1)


# windows -------------------------------------------------------------------------------------------------------------


def test_windows_do_not_overlap_and_the_rest_is_left_out():
    assert windows_of(range(70), 32, None) == [list(range(32)), list(range(32, 64))]
    assert windows_of(range(70), 32, None, limit=1) == [list(range(32))]
    assert windows_of(range(70), 32, begin=99) == [[99, *range(1, 32)], [99, *range(33, 64)]]


@pytest.mark.parametrize(
    ("ids", "context", "words"), [(31, 32, r"31 tokens and fills no window"), (100, 8, r"8 tokens")]
)
def test_windows_that_cannot_be(ids: int, context: int, words: str):
    with pytest.raises(ParameterError, match=words):
        windows_of(range(ids), context, None)


# by hand -------------------------------------------------------------------------------------------------------------


def test_known_distributions():
    windows = [[0] * 16, [0] * 8 + [1] * 8]
    found = score(Fixed(0.5, 0.25, 0.25), windows, Fixed(0.25, 0.5, 0.25))
    # Scored: tokens 9 to 15 of each window, p = 1/2 seven times and 1/4 seven times.
    assert found.tokens == 14
    assert found.perplexity == pytest.approx(2**1.5)
    assert found.kl_mean == pytest.approx(0.25 * math.log(0.5) + 0.5 * math.log(2.0))
    assert found.top1_agreement == 0.0
    assert found.error == pytest.approx(math.log(2) / 2 / math.sqrt(13))


def test_a_model_is_no_distance_from_itself():
    found = score(Fixed(0.5, 0.5), [[1] * 16], Fixed(0.5, 0.5))
    assert (found.kl_mean, found.top1_agreement) == (0.0, 1.0)
    assert score(Fixed(0.5, 0.5), [[1] * 16], None).kl_mean is None


def test_what_is_no_number_is_said():
    with pytest.raises(NumericalError):
        score(Fixed(1.0, 0.0), [[1] * 16], None)


def test_progress_counts_tokens():
    steps: list[LoadProgress] = []
    score(Fixed(0.5, 0.5), [[1] * 16] * 3, None, steps.append)
    assert [(step.done, step.total, step.unit) for step in steps] == [
        (done, 48, "tokens") for done in (0, 16, 32, 48)
    ]  # fmt: skip


# against transformers ------------------------------------------------------------------------------------------------


def by_transformers(path: Path, windows: list[list[int]]) -> tuple[float, torch.Tensor]:
    """(mean of -ln p over the scored tokens, all rows of ln p), from another implementation on the same f32 weights."""
    model = reference_model(path)
    rows, losses = [], []
    for window in windows:
        log_probs = torch.log_softmax(reference_logits(model, window).double(), dim=-1)
        for at in range(len(window) // 2, len(window) - 1):
            losses.append(-log_probs[at, window[at + 1]].item())
            rows.append(log_probs[at])
    return sum(losses) / len(losses), torch.stack(rows)


@pytest.mark.parametrize("context", [32, CHUNK, CHUNK + 72, 2 * CHUNK])
def test_tiny_model_against_transformers(tmp_path: Path, context: int):
    path = write_tiny(tmp_path / "tiny.gguf", TinyModel(scale=0.3, context=512))
    runtime = tiny_runtime(path, weights="f32", context=512)
    try:
        windows = windows_of(runtime.tokenizer.encode(TEXT), context, None, limit=3)
        found = score(ModelSource(runtime), windows, None)
        mean, _ = by_transformers(path, windows)
        assert found.tokens == len(windows) * (context - context // 2 - 1)
        assert math.log(found.perplexity) == pytest.approx(mean, rel=1e-5)
        assert score(ModelSource(runtime), windows, None) == found  # nothing of the first reading is left behind
    finally:
        runtime.close(drain=False)


def test_kl_and_agreement_against_transformers(tmp_path: Path):
    path = write_tiny(tmp_path / "tiny.gguf", TinyModel(scale=0.3, context=512))
    runtime = tiny_runtime(path, weights="bf16", context=512)
    try:
        windows = windows_of(runtime.tokenizer.encode(TEXT), 64, None)
        source = ModelSource(runtime)
        ours = torch.cat([torch.cat(list(source.log_probs(window))) for window in windows]).double()
        _, theirs = by_transformers(path, windows)

        class Theirs:
            at = 0

            def log_probs(self, window):
                count = len(window) - len(window) // 2 - 1
                self.at += count
                yield theirs[self.at - count : self.at].float()

        found = score(source, windows, Theirs())
        expected = torch.nn.functional.kl_div(ours, theirs, log_target=True, reduction="none").sum(-1).mean()
        assert 1e-7 < found.kl_mean == pytest.approx(expected.item(), rel=1e-3)
        agreement = (ours.argmax(-1) == theirs.argmax(-1)).double().mean().item()
        assert found.top1_agreement == pytest.approx(agreement)
    finally:
        runtime.close(drain=False)


# two models that do not fit beside each other ------------------------------------------------------------------------


def test_a_recorded_reference_says_the_same(tmp_path: Path):
    path = write_tiny(tmp_path / "tiny.gguf", TinyModel(scale=0.3, context=512))
    exact, coarse = (tiny_runtime(path, weights=weights, context=512) for weights in ("f32", "bf16"))
    try:
        windows = windows_of(exact.tokenizer.encode(TEXT), 200, None)
        beside = score(ModelSource(coarse), windows, ModelSource(exact))
        with open(tmp_path / "recorded", "w+b") as file:
            record(ModelSource(exact), windows, file, lambda _: None)
            assert file.tell() == recorded_bytes(windows, exact.checkpoint.config.vocab_size)
            file.seek(0)
            recorded = RecordedSource(file, exact.checkpoint.config.vocab_size)
            apart = score(ModelSource(coarse), windows, recorded)
        assert apart.perplexity == beside.perplexity
        assert apart.top1_agreement == pytest.approx(beside.top1_agreement, abs=0.01)  # equal neighbours in float16
        assert apart.kl_mean == pytest.approx(beside.kl_mean, abs=4e-6)
    finally:
        exact.close(drain=False)
        coarse.close(drain=False)


# the command ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("room", [True, False])
def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, room: bool):
    monkeypatch.setattr(command_module, "fits_beside", lambda one, other: room)
    path = write_tiny(tmp_path / "tiny.gguf", TinyModel(scale=0.3, context=512))
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    options = ["--model", path, "--text", tmp_path / "text.txt", "--context", "64", "--windows", "2", "--json"]
    options += ["--preset", "starter-bf16", "--reference", "starter-f32", "--data-dir", tmp_path / "data"]
    assert command("perplexity", *options) == 0
    told = json.loads(capsys.readouterr().out)
    assert {"perplexity", "tokens", "kl_mean", "top1_agreement"} <= set(told)
    assert (told["tokens"], told["reference"], told["weights"]) == (62, "tiny", "bf16")
    assert 1e-8 < told["kl_mean"] < 1e-2
    assert told["top1_agreement"] > 0.9
    (kept,) = Measurements(tmp_path / "data" / "measurements.json").all()
    assert (kept.perplexity, kept.kl, kept.text) == (told["perplexity"], told["kl_mean"], "text.txt")


def test_command_without_a_reference(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = write_tiny(tmp_path / "tiny.gguf", TinyModel())
    assert command("perplexity", "--model", path, "--context", "64", "--windows", "1", "--data-dir", tmp_path) == 0
    assert "perplexity" in capsys.readouterr().out


def test_models_that_cut_the_text_differently_cannot_be_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = write_tiny(tmp_path / "tiny.gguf", TinyModel())
    preset = tmp_path / "tiny.yaml"
    preset.write_text(f"model: {path}\n", encoding="utf-8")
    options = ["--preset", preset, "--reference", "starter", "--windows", "1", "--context", "64"]
    assert command("perplexity", *options, "--data-dir", tmp_path) == 2
    assert "different tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--text", "/no/such/file"], "cannot be read as UTF-8 text"),
        (["--context", "100000"], "the model was made for"),
        (["--context", "4"], "windows of 4 tokens say nothing"),
    ],
)
def test_what_cannot_be_done_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list, words: str):
    path = write_tiny(tmp_path / "tiny.gguf", TinyModel())
    assert command("perplexity", "--model", path, "--data-dir", tmp_path, *options) == 2
    assert words in capsys.readouterr().err


def test_the_text_that_ships():
    text = command_module.TEXT.read_text(encoding="utf-8")
    assert text.isascii()
    assert 100_000 < len(text) < 150_000
    assert "Down the Rabbit-Hole" in text
    assert "Gutenberg" not in text
