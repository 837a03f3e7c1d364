"""The commands as interfaces promise them."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from backend.commands import bench
from backend.settings import PROJECT
from tests.tiny import TinyModel, write_tiny


def backend(*arguments: str) -> dict:
    command = [sys.executable, "-m", "backend", *arguments]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)  # one document on stdout and nothing else


def test_bench_takes_several_presets():
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    assert parser.parse_args(["--preset", "starter", "starter-bf16"]).preset == ["starter", "starter-bf16"]
    assert parser.parse_args([]).preset == ["starter"]


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
