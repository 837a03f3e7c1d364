"""Quantising: errors against the `gguf` package's quantizers and plain rounding by the formats' definitions."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType

from backend.checkpoint.open import open_checkpoint
from backend.weights.blocks import (
    BF16,
    BY_NAME,
    F16,
    F32,
    IQ4_XS,
    Q2_K,
    Q3_K,
    Q4_0,
    Q4_1,
    Q4_K,
    Q5_0,
    Q5_1,
    Q5_K,
    Q6_K,
    Q8_0,
    BlockFormat,
)
from backend.weights.encode import QUANTIZERS, quantize

SMALL = [Q4_0, Q4_1, Q5_0, Q5_1, Q8_0]
K_TYPES = [Q2_K, Q3_K, Q4_K, Q5_K, Q6_K]
PACKED = [*SMALL, *K_TYPES]
EVERY = pytest.mark.parametrize("fmt", PACKED, ids=lambda fmt: fmt.name)
STARTER = Path("models/SmolLM2-135M-Instruct.Q4_1.gguf")
ROWS, COLUMNS = 20, 1536


def decoded(raw: torch.Tensor, fmt: BlockFormat) -> np.ndarray:
    """By the `gguf` package, float64."""
    with np.errstate(all="ignore"):
        return gguf.dequantize(raw.numpy(), GGMLQuantizationType(fmt.ggml_id)).astype(np.float64)


@lru_cache
def weights(name: str) -> np.ndarray:
    """float32 (20, 1536)."""
    random = np.random.default_rng(5)
    if name == "real":
        if not STARTER.is_file():
            pytest.skip("the starter model is not here")
        table = open_checkpoint(STARTER).read("tok_embeddings")  # Q8_0: the nearest to real numbers that the file has
        return table.float32(3000, 3100).numpy().reshape(-1)[: ROWS * COLUMNS].reshape(ROWS, -1)
    draw = {"gauss": random.standard_normal, "laplace": lambda size: random.laplace(size=size),
            "uniform": lambda size: random.uniform(-1, 1, size)}[name]  # fmt: skip
    return (draw((ROWS, COLUMNS)) * 0.05).astype(np.float32)


def rounded(values: np.ndarray, fmt: BlockFormat) -> np.ndarray:
    """A K type by its definition and rounding to nearest: float64 values."""

    def half(x: np.ndarray) -> np.ndarray:
        return x.astype(np.float16).astype(np.float64)

    def over(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.divide(x, y, out=np.zeros(np.broadcast_shapes(x.shape, y.shape)), where=y != 0)

    size = 32 if fmt in (Q4_K, Q5_K) else 16
    x = values.astype(np.float64).reshape(-1, 256 // size, size)
    if fmt in (Q3_K, Q6_K):
        lowest, most = {Q3_K: (-4, 32), Q6_K: (-32, 128)}[fmt]
        extreme = np.take_along_axis(x, abs(x).argmax(-1, keepdims=True), -1)
        scale = extreme / lowest
        d = half(np.take_along_axis(scale, abs(scale).argmax(1, keepdims=True), 1) / -most)
        step = d * np.clip(np.rint(over(scale, d)), -most, most - 1)
        return (step * np.clip(np.rint(over(x, step)), lowest, -lowest - 1)).reshape(values.shape)
    top, most = {Q2_K: (3, 15), Q4_K: (15, 63), Q5_K: (31, 63)}[fmt]
    low = np.minimum(x.min(-1, keepdims=True), 0)
    scale = (x.max(-1, keepdims=True) - low) / top
    d, dmin = half(scale.max(1, keepdims=True) / most), half(-low.min(1, keepdims=True) / most)
    step, shift = (
        d * np.clip(np.rint(over(scale, d)), 0, most),
        dmin * np.clip(np.rint(over(-low, dmin)), 0, most),
    )
    return (step * np.clip(np.rint(over(x + shift, step)), 0, top) - shift).reshape(values.shape)


def rms(values: np.ndarray, exact: np.ndarray) -> float:
    return float(np.sqrt(np.square(values - exact.astype(np.float64)).mean()))


@EVERY
@pytest.mark.parametrize("name", ["gauss", "laplace", "uniform", "real"])
def test_errs_less_than_rounding_to_nearest(fmt: BlockFormat, name: str) -> None:
    x = weights(name)
    found = decoded(quantize(torch.from_numpy(x), fmt), fmt)
    if fmt in SMALL:
        kind = GGMLQuantizationType(fmt.ggml_id)
        nearest = gguf.dequantize(gguf.quantize(x, kind), kind).astype(np.float64)
    else:
        nearest = rounded(x, fmt)
    assert found.shape == x.shape
    assert rms(nearest, x) > 0 or fmt is Q8_0
    # Block by block for those of 32, where nearest-only is among what is tried.
    if fmt in SMALL:
        ours, theirs = (np.square(y - x.astype(np.float64)).reshape(-1, 32).sum(-1) for y in (found, nearest))
        assert (ours <= theirs * (1 + 1e-5) + 1e-12).all()
    # The search is worth its time; numbers that a Q8_0 file gives are nearly on its grid already.
    assert rms(found, x) <= (0.97 if not (fmt is Q8_0 and name == "real") else 1.0) * rms(nearest, x)


@EVERY
def test_a_block_that_the_format_can_hold_comes_back(fmt: BlockFormat) -> None:
    """Decoded random blocks are numbers with no error to make; a search may find other codes, but hardly an error."""
    random = np.random.default_rng(3)
    raw = random.integers(0, 256, (64, fmt.bytes), dtype=np.uint8)
    places = {Q2_K: (80, 82), Q3_K: (108,), Q6_K: (208,), Q4_1: (0, 2), Q5_1: (0, 2), Q4_K: (0, 2), Q5_K: (0, 2)}
    for at in places.get(fmt, (0,)):
        raw[:, at : at + 2] = np.array([0.0625], np.float16).view(np.uint8)
    x = decoded(torch.from_numpy(raw), fmt).astype(np.float32)
    again = decoded(quantize(torch.from_numpy(x), fmt), fmt)
    relative = rms(again, x) / np.sqrt(np.square(x.astype(np.float64)).mean())
    assert relative < {
        Q2_K: 0.12,
        Q3_K: 0.06,
        Q4_K: 0.02,
    }.get(fmt, 0.01)


HARD = {
    "zeros": np.zeros(256),
    "one": np.eye(1, 256)[0],
    "minus one": -np.eye(1, 256, 200)[0],
    "all the same": np.full(256, 0.3),
    "all the same, below zero": np.full(256, -0.3),
    "subnormal": np.full(256, 1e-42),
    "tiny": np.linspace(-1e-30, 1e-30, 256),
    "below float16": np.linspace(-1e-7, 1e-7, 256),
    "all above zero": np.linspace(5, 6, 256),
    "all below zero": np.linspace(-6, -5, 256),
    "an outlier": np.where(np.arange(256) == 77, 1e6, np.sin(np.arange(256))),
    "a huge outlier": np.where(np.arange(256) == 77, -3e38, np.sin(np.arange(256))),
    "huge": np.full(256, 3.4e38),
    "two sizes": np.where(np.arange(256) < 128, 1e-3, 1e3) * np.cos(np.arange(256)),
    "two signs": np.where(np.arange(256) % 2, 1.0, -1.0),
}


@EVERY
def test_hard_rows(fmt: BlockFormat) -> None:
    x = np.stack(list(HARD.values())).astype(np.float32)
    raw = quantize(torch.from_numpy(x), fmt)
    found = decoded(raw, fmt)
    assert np.isfinite(found).all()
    row = dict(zip(HARD, found, strict=True))
    for name in ("zeros", "subnormal", "tiny"):
        assert not row[name].any(), name
    wanted = {Q2_K: 0.2, Q3_K: 0.1}.get(fmt, 0.04)
    for name in ("one", "minus one", "all the same", "all the same, below zero", "two signs"):
        assert abs(row[name] - HARD[name]).max() <= wanted * abs(HARD[name]).max(), name
    for name, values in HARD.items():
        if "huge" not in name:
            assert rms(row[name], values) <= np.sqrt(np.square(values).mean()) * 1.0001, f"{name}: worse than zeros"
    for name in ("an outlier", "a huge outlier", "huge"):
        assert np.sign(row[name][77]) == np.sign(HARD[name][77]), name


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("fmt", QUANTIZERS, ids=lambda fmt: fmt.name)
def test_numbers_that_are_none(fmt: BlockFormat, bad: float) -> None:
    x = torch.zeros(3, 512)
    x[2, 511] = bad
    with pytest.raises(ValueError, match=rf"not finite.*{fmt.name}"):
        quantize(x, fmt)


def test_what_cannot_be_written() -> None:
    with pytest.raises(ValueError, match="IQ4_XS"):
        quantize(torch.zeros(1, 256), IQ4_XS)
    with pytest.raises(ValueError, match=r"128.*Q4_K"):
        quantize(torch.zeros(1, 128), Q4_K)
    assert {fmt.name for fmt in QUANTIZERS} <= set(BY_NAME)


@pytest.mark.parametrize("fmt", [F32, F16, BF16], ids=lambda fmt: fmt.name)
def test_plain_types_round_to_nearest_even(fmt: BlockFormat) -> None:
    random = np.random.default_rng(1)
    x = random.integers(0, 2**32, (8, 256), dtype=np.uint32)
    x[0] = (x[0] & 0xFFFF0000) | 0x8000  # ties of bfloat16
    x[1] = (np.float32(1) + np.arange(256, dtype=np.float32) / 2048).view(np.uint32)  # ties of float16
    values = x.view(np.float32)
    values[~np.isfinite(values)] = 1.5
    if fmt is F16:
        values = np.clip(values, -60000, 60000)
    raw = quantize(torch.from_numpy(values), fmt)
    expected = gguf.quantize(values, GGMLQuantizationType(fmt.ggml_id))
    assert np.array_equal(raw.numpy(), np.ascontiguousarray(expected).view(np.uint8).reshape(8, -1))


@EVERY
def test_slices_of_work(fmt: BlockFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long matrices are quantised in slices; a row gets the bytes that it gets alone, and always the same."""
    values = torch.randn(5, 768, generator=torch.Generator().manual_seed(4))
    whole = quantize(values, fmt)
    assert (whole.dtype, whole.shape) == (torch.uint8, (5, fmt.row_bytes(768)))
    assert torch.equal(quantize(values.T.contiguous().T, fmt), whole), "numbers that do not lie side by side"
    assert quantize(values[:0], fmt).shape == (0, whole.shape[1])
    monkeypatch.setattr("backend.weights.encode.CHUNK", 1024)  # slices that end inside of rows, the last one short
    assert torch.equal(quantize(values, fmt), whole)
    assert torch.equal(quantize(values[3:4], fmt), whole[3:4])
