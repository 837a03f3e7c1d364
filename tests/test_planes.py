"""Blocks as planes of 4-bit codes: their sum is what decoding gives, but for a rounding that is said."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from backend.weights.blocks import BY_NAME, FORMATS, MXFP4, Q4_0, Q4_K, Q8_0, BlockFormat
from backend.weights.decode import dequantize
from backend.weights.legacy import LEGACY
from backend.weights.planes import Planes, block_planes

EVERY = [*FORMATS, *LEGACY]
WITH_PLANES = [fmt for fmt in EVERY if fmt.planes]
# Formats whose planes each have a scale of their own: nothing is rounded to bfloat16 on the way.
OWN_SCALES = {"Q4_0", "Q4_1", "Q4_K", "Q3_K", "Q4_2"}


def rows_of(fmt: BlockFormat, rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Any codes, with scales as weights have them."""
    random = np.random.default_rng(seed)
    raw = random.integers(0, 256, (rows * columns // fmt.elements, fmt.bytes), dtype=np.uint8)
    wide = fmt.bytes - {"Q4_0": 16, "Q4_1": 16, "Q8_0": 32}.get(fmt.name.split()[0], fmt.bytes)
    if fmt is MXFP4:
        raw[:, 0] = random.integers(110, 130, len(raw))
    elif wide in (4, 8) and fmt.ggml_id is None:  # float32 scales
        raw[:, :wide] = random.normal(size=(len(raw), wide // 4)).astype(np.float32).view(np.uint8)
    else:
        two = fmt.name.split()[0] in ("Q4_1", "Q5_1", "Q4_K", "Q5_K")
        scales = (random.normal(size=(len(raw), 2 if two else 1)) * 0.01).astype(np.float16).view(np.uint8)
        at = {"Q3_K": 108}.get(fmt.name, 0)
        raw[:, at : at + scales.shape[1]] = scales
    return torch.from_numpy(raw.reshape(rows, -1))


def summed(planes: Planes) -> torch.Tensor:
    """float64 (rows, columns)."""
    total = torch.zeros(planes.planes[0][0].shape, dtype=torch.float64)
    for codes, scale, zero in planes.planes:
        wide_scale, wide_zero = (x.double().repeat_interleave(planes.group, dim=1) for x in (scale, zero))
        total += (codes.double() - 8) * wide_scale + wide_zero
    return total


@pytest.mark.parametrize("fmt", WITH_PLANES, ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("columns", [256, 768])
def test_the_sum_of_the_planes(fmt: BlockFormat, columns: int) -> None:
    raw = rows_of(fmt, 7, columns)
    planes = block_planes(raw, fmt)
    assert planes is not None
    assert (len(planes.planes), planes.group, planes.order) == (fmt.planes, fmt.group, None)
    for codes, scale, zero in planes.planes:
        assert (codes.dtype, codes.shape, int(codes.max()) <= 15) == (torch.uint8, (7, columns), True)
        for part in (scale, zero):
            assert (part.dtype, part.shape) == (torch.float32, (7, columns // 32))
    exact, found = dequantize(raw, fmt).double(), summed(planes)
    # Roundings of float32, and of a scale to bfloat16: half a step of 2^-7, against the largest
    # code * scale.
    largest = exact.view(7, -1, 32).abs().amax(dim=-1).repeat_interleave(32, dim=1)
    if fmt.name.split()[0] in OWN_SCALES:
        bound = 2e-6 * (1 + largest)
    else:
        reach = sum(15 * scale.double().abs() for _, scale, _ in planes.planes).repeat_interleave(32, dim=1)
        bound = 2.0**-8 * reach
        assert ((found - exact).abs() > 1e-6 * reach).any() or fmt is MXFP4, "the bound is about something"
    assert ((found - exact).abs() <= bound).all()


@pytest.mark.parametrize("fmt", [fmt for fmt in WITH_PLANES if fmt.planes == 2], ids=lambda fmt: fmt.name)
def test_two_planes_that_share_a_scale_share_its_rounding(fmt: BlockFormat) -> None:
    planes = block_planes(rows_of(fmt, 3, 256), fmt)
    assert planes is not None
    (_, high, high_zero), (_, low, low_zero) = planes.planes
    if fmt.name.split()[0] in OWN_SCALES:
        assert not high_zero.any()
        assert not low_zero.any()
        return
    assert torch.equal(high, 16 * low)
    assert torch.equal(low.bfloat16().float(), low), "the product rounds to bfloat16: nothing is left to round"
    assert torch.equal(high_zero.bfloat16().float(), high_zero)


def test_scales_that_bfloat16_holds_are_exact() -> None:
    for fmt in WITH_PLANES:
        if fmt.ggml_id is None or fmt.elements != 32 or fmt is MXFP4:
            continue
        raw = rows_of(fmt, 16, 128).reshape(-1, fmt.bytes).clone()
        raw[:, :2] = torch.tensor([0.375], dtype=torch.float16).view(torch.uint8)
        if fmt.name in ("Q4_1", "Q5_1"):
            raw[:, 2:4] = torch.tensor([-4.5], dtype=torch.float16).view(torch.uint8)
        raw = raw.view(16, -1)
        planes = block_planes(raw, fmt)
        assert planes is not None
        assert torch.equal(summed(planes), dequantize(raw, fmt).double()), fmt.name


def test_slices_of_work_fit_together() -> None:
    for fmt in (Q4_0, Q4_K, Q8_0, BY_NAME["Q3_K"]):
        raw = rows_of(fmt, 6, 256 * 200)  # more than one slice of work, the last one short
        whole = block_planes(raw, fmt)
        assert whole is not None
        for row in (0, 3, 5):
            one = block_planes(raw[row : row + 1], fmt)
            assert one is not None
            for plane, part in zip(whole.planes, one.planes, strict=True):
                for tensor, tensor_of_one in zip(plane, part, strict=True):
                    assert torch.equal(tensor[row : row + 1], tensor_of_one)


def test_formats_without_planes() -> None:
    for fmt in EVERY:
        if not fmt.planes:
            assert block_planes(torch.zeros(2, 3 * fmt.bytes, dtype=torch.uint8), fmt) is None
    # Blocks of 16 fill no group of 32.
    odd = next(fmt for fmt in LEGACY if fmt.elements == 16 and fmt.planes)
    assert block_planes(torch.zeros(2, 3 * odd.bytes, dtype=torch.uint8), odd) is None
