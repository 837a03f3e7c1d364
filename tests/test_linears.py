"""Weights that multiply: packed products, plain ones and tables, against float64 and against the gguf package."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize as reference_dequantize
from gguf.quants import quantize as reference_quantize

from backend.weights.blocks import Q4_0, Q4_1, Q8_0, BlockFormat
from backend.weights.int4 import Int4Linear, can_stack
from backend.weights.linear import BiasedLinear, BlockEmbedding, Linear, PlainEmbedding, PlainLinear, SplitLinear
from backend.weights.planes import Planes, block_planes

BLOCKS = [Q4_0, Q4_1, Q8_0]
PACKED = pytest.mark.parametrize("fmt", BLOCKS, ids=lambda fmt: fmt.name)
BF16_STEP = 2.0**-8  # rounding to 8 significant bits: at most half of 2^-7, relative


def kind(fmt: BlockFormat) -> GGMLQuantizationType:
    return GGMLQuantizationType(fmt.ggml_id)


def random_blocks(fmt: BlockFormat, count: int, seed: int = 0) -> np.ndarray:
    """uint8 (count, bytes): any bytes at all, but scales (and plain values) that are finite numbers."""
    random = np.random.default_rng(seed)
    raw = random.integers(0, 256, (count, fmt.bytes), dtype=np.uint8)
    halves = {"Q4_0": 1, "Q4_1": 2, "Q8_0": 1}.get(fmt.name, 0)
    if halves:
        # Every finite float16: sign and fraction as they are, the exponent below the one of infinity.
        scales = raw[:, : 2 * halves].view(np.uint16)
        scales[(scales & 0x7C00) == 0x7C00] ^= 0x4000
        return raw
    whole = raw.view({"F32": np.uint32, "F16": np.uint16, "BF16": np.uint16}[fmt.name])
    top = {"F32": 0x7F800000, "F16": 0x7C00, "BF16": 0x7F80}[fmt.name]
    whole[(whole & top) == top] ^= {"F32": 0x40000000, "F16": 0x4000, "BF16": 0x4000}[fmt.name]
    return raw


def model_rows(fmt: BlockFormat, rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Rows as a quantiser would write them, of weights of the usual size."""
    values = (np.random.default_rng(seed).standard_normal((rows, columns)) * 0.1).astype(np.float32)
    return torch.from_numpy(reference_quantize(values, kind(fmt)).view(np.uint8).reshape(rows, -1).copy())


def planes_of(raw: torch.Tensor, fmt: BlockFormat) -> Planes:
    planes = block_planes(raw, fmt)
    assert planes is not None
    return planes


def packed(raw: torch.Tensor, fmt: BlockFormat) -> Int4Linear:
    return Int4Linear.of_planes([planes_of(raw, fmt)])


# the packed 4-bit product -------------------------------------------------------------------------------------------


def parameters(raw: torch.Tensor, fmt: BlockFormat) -> tuple[np.ndarray, np.ndarray]:
    """|scale| and |zero| of each value's block as the packed kernel keeps them, float64 (rows, columns)."""
    blocks = raw.numpy().reshape(raw.shape[0], -1, fmt.bytes)
    scale = blocks[..., 0:2].copy().view(np.float16)[..., 0].astype(np.float64)
    zero = np.zeros_like(scale)
    if fmt is Q4_1:
        zero = blocks[..., 2:4].copy().view(np.float16)[..., 0].astype(np.float64) + 8 * scale
    return np.repeat(abs(scale), 32, axis=1), np.repeat(abs(zero), 32, axis=1)


@PACKED
@pytest.mark.parametrize("columns", [32, 64, 96, 160])
def test_packing_keeps_the_codes_and_rounds_scales_to_bf16(fmt: BlockFormat, columns: int) -> None:
    raw = model_rows(fmt, 48, columns, seed=columns)
    twin = packed(raw, fmt).twin().double().numpy()
    exact = reference_dequantize(raw.numpy(), kind(fmt)).astype(np.float64)
    scale, zero = parameters(raw, fmt)
    # value = (code - 8) scale + zero, codes 0..15, or code * scale with codes up to 128: scale and zero are rounded to
    # bfloat16 once, and so is each plane's product on its way out of the kernel.
    codes = 128 if fmt is Q8_0 else 8
    rounded = codes * scale + zero
    planes = abs(exact) + (8 * 2 * scale if fmt is Q8_0 else 0)
    bound = BF16_STEP * (rounded + planes) + 1e-12
    assert twin.shape == exact.shape
    assert (abs(twin - exact) <= bound).all()
    assert abs(twin - exact).max() > 0, "the bound is about something"


@PACKED
@pytest.mark.parametrize("columns", [32, 96, 256])
@pytest.mark.parametrize("tokens", [1, 2, 7, 33])
def test_packed_products(fmt: BlockFormat, tokens: int, columns: int) -> None:
    raw = model_rows(fmt, 32, columns, seed=tokens)
    linear = packed(raw, fmt)
    x = torch.from_numpy(np.random.default_rng(tokens).standard_normal((tokens, columns)).astype(np.float32))
    found = linear(x)
    assert found.dtype == torch.float32
    assert found.shape == (tokens, 32)
    check_against(found, x.bfloat16().double(), linear.twin().double(), raw, fmt)
    # And against the file's own values: what bfloat16 may cost in all.
    check_against(found, x.double(), torch.from_numpy(reference_dequantize(raw.numpy(), kind(fmt))).double(), raw, fmt)


def check_against(
    found: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, raw: torch.Tensor, fmt: BlockFormat
) -> None:
    """Each factor is off by at most a bfloat16 rounding, and so is each plane's sum: bounded by what is added up."""
    exact = x @ weight.T
    scale, zero = (torch.from_numpy(part) for part in parameters(raw, fmt))
    # Largest size a product's weight may have inside of a plane; Q8_0's planes are 16 (h - 8) d and (l - 8) d + 8 d.
    weights = weight.abs() + zero + (16 if fmt is Q8_0 else 8) * scale
    bound = 4 * BF16_STEP * (x.abs() @ weights.T) + 1e-6
    assert ((found.double() - exact).abs() <= bound).all()
    # Errors of many roundings mostly cancel: on average the result is far inside of the bound.
    assert (found.double() - exact).abs().mean() < 0.25 * bound.mean()


def test_packed_products_of_numbers_that_need_no_rounding_are_exact() -> None:
    # Scales that are powers of two, and small whole numbers: bfloat16 holds all of it.
    random = np.random.default_rng(0)
    for fmt in BLOCKS:
        raw = random_blocks(fmt, 16 * 2, seed=9).reshape(16, -1).copy()
        blocks = raw.reshape(16, 2, fmt.bytes)
        blocks[..., 0:2] = np.array([0.5], np.float16).view(np.uint8)
        if fmt is Q4_1:
            blocks[..., 2:4] = np.array([-4.0], np.float16).view(np.uint8)
        if fmt is Q8_0:
            blocks[..., 2:] = random.integers(-8, 8, (16, 2, 32)).astype(np.int8).view(np.uint8)
        one_hot = torch.eye(64)[:3] * 2
        expected = one_hot.numpy() @ reference_dequantize(raw, kind(fmt)).T
        assert np.array_equal(packed(torch.from_numpy(raw), fmt)(one_hot).numpy(), expected)


@pytest.mark.parametrize("rows", [1, 15, 17, 40])
def test_rows_that_do_not_fill_a_tile(rows: int) -> None:
    raw = model_rows(Q4_1, rows, 64)
    linear = packed(raw, Q4_1)
    whole = packed(torch.cat([raw, raw.new_zeros(-rows % 16, raw.shape[1])]), Q4_1)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    assert linear.out_features == rows
    assert torch.equal(linear(x), whole(x)[:, :rows])
    assert linear.twin().shape == (rows, 64)


def test_matrices_one_above_the_other() -> None:
    raws = [model_rows(Q8_0, rows, 64, seed=rows) for rows in (32, 16, 48)]
    parts = [planes_of(raw, Q8_0) for raw in raws]
    assert can_stack(parts, [32, 16, 48])
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    together = Int4Linear.of_planes(parts)(x)
    assert torch.equal(together, torch.cat([packed(raw, Q8_0)(x) for raw in raws], dim=-1))


def test_what_cannot_be_stacked() -> None:
    one, two = planes_of(model_rows(Q4_0, 16, 64), Q4_0), planes_of(model_rows(Q8_0, 16, 64), Q8_0)
    assert can_stack([one, one], [16, 16])
    assert not can_stack([one, two], [16, 16]), "one plane and two"
    assert not can_stack([one, one], [16, 8]), "a tile that is not full"
    assert can_stack([one], [8])
    order = torch.arange(64).flip(0)
    assert not can_stack([one, dataclasses.replace(one, order=order)], [16, 16])
    assert can_stack([dataclasses.replace(one, order=order)] * 2, [16, 16])
    assert not can_stack([one, dataclasses.replace(one, group=64)], [16, 16])


def test_columns_in_another_order() -> None:
    raw = model_rows(Q4_0, 16, 64)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(3))
    linear = Int4Linear.of_planes([dataclasses.replace(planes_of(raw, Q4_0), order=order)])
    plain = packed(raw, Q4_0).twin()
    expected = torch.empty_like(plain)
    expected[:, order] = plain  # column j of the planes is column order[j] of the matrix
    assert torch.equal(linear.twin(), expected)
    x = torch.eye(64)[:7]
    assert torch.equal(linear(x), expected.T[:7])


# the others -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03), (torch.float16, 4e-3)])
def test_plain_linear(dtype: torch.dtype, tolerance: float) -> None:
    random = torch.Generator().manual_seed(2)
    weight, x = torch.randn(7, 33, generator=random).to(dtype), torch.randn(3, 33, generator=random)
    linear = PlainLinear(weight)
    exact = x.to(dtype).double() @ weight.double().T
    assert ((linear(x).double() - exact).abs() <= tolerance * (exact.abs() + 1)).all()
    assert linear(x).dtype == torch.float32
    assert torch.equal(linear.twin(), weight.float())
    assert (linear.out_features, linear.in_features, linear.nbytes()) == (7, 33, 7 * 33 * weight.itemsize)


def test_split_linear() -> None:
    parts: list[Linear] = [
        PlainLinear(torch.randn(5, 64, generator=torch.Generator().manual_seed(2)).bfloat16()),
        packed(model_rows(Q4_0, 16, 64), Q4_0),
        PlainLinear(torch.randn(3, 64, generator=torch.Generator().manual_seed(3))),
    ]
    linear = SplitLinear(parts)
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(4))
    out = linear(x)
    assert out.shape == (4, 24)
    for part, columns in zip(parts, (slice(0, 5), slice(5, 21), slice(21, 24))):
        assert torch.equal(out[:, columns], part(x))
        assert torch.equal(linear.twin()[columns], part.twin())
    assert (linear.out_features, linear.in_features) == (24, 64)
    assert linear.nbytes() == 5 * 64 * 2 + 16 * 2 * 20 + 3 * 64 * 4


def test_a_bias_is_added() -> None:
    weight, bias = torch.randn(6, 8), torch.randn(6)
    linear = BiasedLinear(PlainLinear(weight), bias)
    x = torch.randn(3, 8)
    torch.testing.assert_close(linear(x), x @ weight.T + bias)
    assert linear.nbytes() == 6 * 8 * 4 + 24
    assert torch.equal(linear.twin(), weight)


@pytest.mark.parametrize("fmt", [Q4_0, Q4_1, Q8_0], ids=lambda fmt: fmt.name)
def test_a_table_of_blocks(fmt: BlockFormat) -> None:
    raw = model_rows(fmt, 20, 96)
    table = BlockEmbedding(raw, fmt)
    ids = [19, 0, 7, 7]
    expected = reference_dequantize(raw.numpy(), kind(fmt)).astype(np.float32)[ids]
    raw.zero_()  # its own copy
    assert np.array_equal(table(torch.tensor(ids)).numpy(), expected)
    assert table.nbytes() == raw.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_table_of_values(dtype: torch.dtype) -> None:
    values = torch.randn(20, 8).to(dtype)
    table = PlainEmbedding(values)
    assert torch.equal(table(torch.tensor([3, 3, 0])), values[[3, 3, 0]].float())
    assert table.nbytes() == 160 * dtype.itemsize
