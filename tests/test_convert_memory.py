"""Converting holds less than one layer in memory, besides the piece that is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.commandline import peak_of
from tests.tiny import TinyModel, write_tiny

MODEL = TinyModel(weights="F16", dim=1024, n_heads=16, n_kv_heads=16, head_dim=64, ffn_dim=2816, n_layers=12)
LAYER = 2 * (4 * 1024 * 1024 + 3 * 1024 * 2816)  # bytes of one layer's tensors: 25.7 MB
PIECE = 4 * (1 << 21) * 3  # a piece of rows as float32, its order changed, and as it is written


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """308 MB."""
    path = write_tiny(tmp_path_factory.mktemp("memory") / "model.gguf", MODEL)
    assert path.stat().st_size > 300e6
    return path


@pytest.mark.parametrize(("name", "kind"), [("out.gguf", "bf16"), ("folder", "f32")])
def test_peak_memory(model: Path, tmp_path: Path, name: str, kind: str) -> None:
    before, peak = peak_of("convert", model, tmp_path / name, "--type", kind)
    assert peak - before < LAYER + PIECE, (peak - before) / 1e6
