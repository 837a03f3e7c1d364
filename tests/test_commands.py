"""The commands as interfaces promise them."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from backend.commands import bench, measuring
from backend.commands.measuring import MODES
from backend.settings import PROJECT
from backend.store.measurements import Measurements
from tests.commandline import command
from tests.tiny import TinyModel, write_tiny


def backend(*arguments: str) -> dict:
    command = [sys.executable, "-m", "backend", *arguments]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)  # one document on stdout and nothing else


SHAPE = "smollm2-135m:q8_0:layers=1:vocabulary=512"
KEYS = {
    "preset", "mode", "decode_tokens_per_second", "prefill_tokens_per_second", "time_to_first_token_s",
    "peak_ram_bytes", "peak_vram_bytes", "read_bandwidth_fraction", "load_seconds", "weight_bytes",
}  # fmt: skip
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")


def bench_arguments(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args(arguments)


def test_bench_takes_several_presets():
    assert bench_arguments("--preset", "starter", "starter-bf16").preset == ["starter", "starter-bf16"]


@pytest.mark.parametrize(
    ("arguments", "table"),
    [
        ([], False),
        (["--preset", "a", "b"], False),
        (["--preset", "a", "--model", "m"], False),
        (["--model", "m"], True),
        (["--preset", "a", "--table"], True),
        (["--modes", "CPU"], True),
    ],
)
def test_bench_with_a_model_alone_is_the_table(arguments: list[str], table: bool):
    assert bench.is_table(bench_arguments(*arguments)) is table


def test_the_seeds_names_say_what_stays_on_the_gpu():
    assert list(MODES)[:6] == ["GPU", "CPU", "8bit", "Off_ALL", "Off_FF", "Off_ATT"]
    assert MODES["Off_FF"]["placement"] == "offload-attention"
    assert MODES["Off_ATT"]["placement"] == "offload-ff"


@needs_no_gpu
def test_bench_table(tmp_path: Path):
    """Rows of processes of their own; what this machine cannot do says why."""
    told = backend(
        "bench", "--shape", SHAPE, "--modes", "GPU", "CPU", "--runs", "1", "--data-dir", str(tmp_path), "--json"
    )
    gpu, cpu = told["results"]
    assert gpu == {"preset": "GPU", "mode": "GPU", "error": "no GPU"}
    assert set(cpu) >= KEYS
    assert (cpu["mode"], cpu["model"], cpu["runs"]) == ("cpu bf16", f"shape:{SHAPE}", 1)
    assert cpu["decode_tokens_per_second"] > 0
    assert cpu["peak_ram_bytes"] > cpu["weight_bytes"] > 0 == cpu["peak_vram_bytes"]
    assert {"processor", "threads", "memory_bytes", "torch"} <= set(told["machine"])
    assert not (tmp_path / "measurements.json").exists()  # a row of the table is no preset


@needs_no_gpu
@pytest.mark.parametrize("mode", [mode for mode, changes in MODES.items() if changes["device"] != "cuda"])
def test_bench_every_mode(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, mode: str
):
    """Without a GPU, what is offloaded comes from the file."""
    monkeypatch.setattr(measuring, "read_bandwidth", lambda device: 1e10)
    options = ["--in-process", "--shape", SHAPE, "--mode", mode, "--runs", "1", "--data-dir", tmp_path]
    assert command("bench", *options) == 0
    row = json.loads(capsys.readouterr().out)
    assert "error" not in row, row
    assert row["preset"] == mode
    assert (row["streamed_bytes"] > 0) is mode.startswith("Off_")


def test_bench_keeps_what_it_measured_of_a_preset(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(measuring, "read_bandwidth", lambda device: 1e10)
    preset = tmp_path / "mine.yaml"
    preset.write_text(f"model: shape:{SHAPE}\ncontext: 512\n", encoding="utf-8")
    assert command("bench", "--in-process", "--preset", preset, "--runs", "1", "--data-dir", tmp_path) == 0
    row = json.loads(capsys.readouterr().out)
    (kept,) = Measurements(tmp_path / "measurements.json").all()
    assert kept.run.preset == row["preset"] == "mine"
    assert kept.tokens_per_second == row["decode_tokens_per_second"]
    assert kept.peak_ram_bytes == row["peak_ram_bytes"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--shape", "llama-9b"], "no shape 'llama-9b'"),
        (["--shape", "llama-2-7b", "--model", "x"], "give one of them"),
        (["--runs", "0"], "expected 1 or more"),
        (["--in-process", "--mode", "CPU", "--vram", "much"], "--vram is 'much'"),
    ],
)
def test_bench_says_what_is_wrong(capsys: pytest.CaptureFixture[str], options: list[str], words: str):
    code = command("bench", *options)
    out = capsys.readouterr()
    assert words in (out.out if "--in-process" in options else out.err)
    assert code == (0 if "--in-process" in options else 2)


def test_inspect(starter_path: Path):
    facts = backend("inspect", str(starter_path), "--json")
    assert facts["architecture"] == "llama"
    assert facts["parameters"] == 134_515_008  # published: 135M
    assert facts["quantization"] == {"Q4_1": 210, "Q8_0": 1}
    assert facts["context"] == 8192
    assert facts["bytes"] == starter_path.stat().st_size


def test_generate(tmp_path: Path):
    path = write_tiny(tmp_path / "tiny.gguf", TinyModel())
    told = backend(
        "generate", "--model", str(path), "--prompt", "hello", "--max-tokens", "4", "--temperature", "0", "--json"
    )
    assert told["completion_tokens"] == len(told["ids"]) == len(told["logprobs"]) <= 4
    assert told["finish_reason"] in ("length", "stop")
    assert all(value <= 0 for value in told["logprobs"])
