"""Memory while loading, in a process of its own: the finished model, one tensor, and little besides."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from backend.kernels.cpu.build import library
from backend.settings import PROJECT
from tests.metafiles import MetaModel, write_meta
from tests.tiny import TinyModel, write_tiny

PROGRAM = """
import sys
from pathlib import Path
import torch
from backend.checkpoint.open import open_checkpoint
from backend.placement.load import load_model
from tests.commandline import resident
path, small, weights = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
load_model(open_checkpoint(small), weights, "small")  # whatever is made once
torch.ones(512, 512).bfloat16() @ torch.ones(512, 512).bfloat16()
before = resident("VmRSS")
checkpoint = open_checkpoint(path)
loaded = load_model(checkpoint, weights, "test")
largest = max(info.nbytes for info in checkpoint.tensors.values())
print(loaded.weight_bytes, largest, resident("VmHWM") - before)
"""


def peak(path: Path, small: Path, weights: str) -> tuple[int, int, int]:
    """(bytes of the finished weights, of the largest tensor in the files, most bytes above what was there before)."""
    line = [sys.executable, "-c", PROGRAM, str(path), str(small), weights]
    done = subprocess.run(line, cwd=PROJECT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    final, largest, most = map(int, done.stdout.split())
    return final, largest, most


@pytest.mark.parametrize("weights", ["original", "bf16"])
def test_two_shards_are_merged_without_a_second_copy(tmp_path: Path, weights: str) -> None:
    model = MetaModel(
        dim=1024, n_layers=6, n_heads=8, n_kv_heads=8, ffn_dim=2816, vocab_size=8000, multiple_of=256,
        dtype=torch.bfloat16,
    )  # fmt: skip
    write_meta(tmp_path / "model", model, ranks=2)
    final, largest, most = peak(tmp_path / "model", write_tiny(tmp_path / "small.gguf"), weights)
    assert final > 180e6
    assert most < 1.15 * final + largest


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "Q5_1"])
def test_packed_weights_are_never_there_twice(tmp_path: Path, kind: str) -> None:
    """The packed model, its largest matrix once more while it is repacked, and no copy of the file."""
    model = TinyModel(
        weights=kind, tied=False, n_layers=4, dim=1024, n_heads=8, n_kv_heads=8, head_dim=128, ffn_dim=4096
    )
    path = write_tiny(tmp_path / "model.gguf", model)
    small = write_tiny(tmp_path / "small.gguf", TinyModel(weights=kind))
    final, _, most = peak(path, small, "original")
    assert final > 35e6
    compiled = kind != "Q5_1" and library("repack") is not None
    # Without compiled repacking a pair of matrices is unpacked at once: some bytes for each of its codes.
    print(kind, final, most)
    assert most < 1.15 * final + (8e6 if compiled else 8 * 2 * 1024 * 4096)


@pytest.mark.parametrize("weights", ["int8", "llm-int8", "int4", "nf4"])
def test_quantising_needs_the_result_and_less_than_a_layer(tmp_path: Path, weights: str) -> None:
    """Never the values of the whole model: here they are four times the file's layers in float32."""
    model = TinyModel(
        weights="BF16", tied=False, n_layers=6, dim=1024, n_heads=8, n_kv_heads=8, head_dim=128, ffn_dim=4096
    )
    path = write_tiny(tmp_path / "model.gguf", model)
    small = write_tiny(tmp_path / "small.gguf", TinyModel(weights="F32"))
    final, _, most = peak(path, small, weights)
    layer = 2 * (4 * 1024 * 1024 + 3 * 4096 * 1024)  # as the file has it
    assert final > 50e6
    assert most < final + layer
