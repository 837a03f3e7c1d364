"""The compiled repacking against its slow twin, and what happens where nothing can be compiled."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from backend.kernels.cpu import build
from backend.kernels.cpu.repack import FORMATS, decode_to_bf16, repack
from backend.weights.blocks import Q4_0, Q6_K, Q8_0, BlockFormat
from backend.weights.decode import dequantize
from backend.weights.int4 import Int4Linear, pack_codes, pack_codes_twin
from backend.weights.planes import block_planes

HALVES = {"Q4_0": [0], "Q4_1": [0, 2], "Q8_0": [0], "Q4_K": [0, 2]}
needs_compiler = pytest.mark.skipif(build.library("repack") is None, reason="not run: there is no C compiler here")


def random_rows(fmt: BlockFormat, rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Any bytes, with float16 scales of every finite size, also below the normal ones."""
    raw = np.random.default_rng(seed).integers(0, 256, (rows, columns // fmt.elements, fmt.bytes), dtype=np.uint8)
    for at in HALVES[fmt.name]:
        high = raw[..., at + 1]
        high[(high & 0x7C) == 0x7C] ^= 0x40  # no infinity, no NaN
        high[::5] &= 0x83  # numbers below the normal ones
    return torch.from_numpy(raw.reshape(rows, -1))


def packed_by_hand(codes: np.ndarray, tile: int) -> np.ndarray:
    """The layout as its comment says it: for each tile and column, row r with row r + half a tile."""
    rows, columns = codes.shape
    out = []
    for start in range(0, rows, tile):
        for column in range(columns):
            for r in range(tile // 2):
                out.append(codes[start + r, column] | codes[start + r + tile // 2, column] << 4)
    return np.array(out, np.uint8).reshape(rows, columns // 2)


@needs_compiler
@pytest.mark.parametrize("tile", [64, 32])
@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
def test_every_format_equals_its_planes(fmt: BlockFormat, tile: int) -> None:
    raw = random_rows(fmt, 2 * tile, 512)
    found, planes = repack([raw], fmt, tile), block_planes(raw, fmt)
    assert found is not None
    assert planes is not None
    assert len(found) == len(planes.planes) == fmt.planes
    for (codes, scales), (values, scale, zero) in zip(found, planes.planes):
        assert np.array_equal(codes.numpy(), packed_by_hand(values.numpy(), tile))
        assert torch.equal(scales[..., 0], scale.T.bfloat16())
        assert torch.equal(scales[..., 1], zero.T.bfloat16())


@needs_compiler
@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
def test_matrices_one_above_the_other_on_any_number_of_threads(fmt: BlockFormat) -> None:
    raws = [random_rows(fmt, rows, 2048, seed=rows) for rows in (1024, 64, 192)]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = repack([torch.cat(raws)], fmt, 64)
        torch.set_num_threads(3)
        together = repack(raws, fmt, 64)
    finally:
        torch.set_num_threads(before)
    assert alone is not None
    assert together is not None
    for (codes, scales), (other_codes, other_scales) in zip(alone, together):
        assert torch.equal(codes, other_codes)
        assert torch.equal(scales, other_scales)


@needs_compiler
def test_where_it_does_not_apply() -> None:
    raw = random_rows(Q4_0, 64, 64)
    assert repack([raw], Q4_0, 64) is not None
    assert repack([raw[:63]], Q4_0, 64) is None, "a tile that is not full"
    assert repack([raw[::2]], Q4_0, 32) is None, "rows that are not side by side"
    assert repack([torch.zeros(64, Q6_K.bytes, dtype=torch.uint8)], Q6_K, 64) is None, "a format it does not know"


def test_a_linear_is_the_same_with_and_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = random_rows(Q8_0, 128, 256)
    planes = block_planes(raw, Q8_0)
    assert planes is not None
    slow, fast = Int4Linear.of_planes([planes]), Int4Linear.of_blocks([raw], Q8_0)
    assert (fast is None) == (build.library("repack") is None)
    if fast is not None:
        x = torch.randn(3, 256)
        assert torch.equal(fast(x), slow(x))
        assert fast.nbytes() == slow.nbytes()


@pytest.mark.parametrize("rows", [16, 32, 64, 80, 128, 192, 208])
def test_packing_codes_equals_torchs_own(rows: int) -> None:
    codes = torch.randint(0, 16, (rows, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(rows))
    assert torch.equal(pack_codes(codes), pack_codes_twin(codes))


@needs_compiler
def test_values_in_bfloat16_are_those_of_the_decoder() -> None:
    raw = np.random.default_rng(3).integers(0, 256, (96, 8, Q6_K.bytes), dtype=np.uint8)
    raw[..., 209] = raw[..., 209] & 0x83 | 0x28  # d of ordinary size and of either sign
    rows = torch.from_numpy(raw.reshape(96, -1))
    out = torch.zeros(96, 2048, dtype=torch.bfloat16)
    assert decode_to_bf16(rows, Q6_K, out)
    assert torch.equal(out, dequantize(rows, Q6_K).bfloat16())
    assert out.abs().max() > 0.1
    assert not decode_to_bf16(rows, Q6_K, torch.zeros(96, 2048)), "another type"
    assert not decode_to_bf16(rows, Q6_K, torch.zeros(2048, 96, dtype=torch.bfloat16).T), "not in one piece"
    assert not decode_to_bf16(random_rows(Q4_0, 32, 64), Q4_0, torch.zeros(32, 64, dtype=torch.bfloat16))


# the compiler -----------------------------------------------------------------------------------------------------


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("CC", "/nowhere/cc")
    with caplog.at_level(logging.INFO):
        assert build.library.__wrapped__("repack") is None
    assert "no C compiler was found" in caplog.text


def test_a_compiler_that_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    script = tmp_path / "cc"
    script.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\nexit 1\n')
    script.chmod(0o755)
    monkeypatch.setenv("CC", str(script))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert build.library.__wrapped__("repack") is None
    assert "the slower path is used" in caplog.text
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


@needs_compiler
def test_a_library_is_compiled_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert build.library.__wrapped__("repack") is not None
    made = list(tmp_path.rglob("*.so"))
    assert len(made) == 1
    assert made[0].parent == build.cache_folder()
    before = made[0].stat().st_mtime_ns
    assert build.library.__wrapped__("repack") is not None
    assert made[0].stat().st_mtime_ns == before
    assert list(tmp_path.rglob("*.so")) == made
