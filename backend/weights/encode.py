"""Float32 to blocks, with as little squared error as a search can do: the writers' half of `decode`.

Plain types are rounded to nearest, ties to even. Blocks of 32 get scales that minimise the squared error: no worse than
the nearest-only rounding of the `gguf` package, because that is among what is tried. The K types are in `encode_k`.
"""

from __future__ import annotations

import torch

from backend.weights.blocks import BF16, F16, F32, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, BlockFormat
from backend.weights.encode_k import ENCODE_K
from backend.weights.search import affine, error, f16, inverse, symmetric

CHUNK = 1 << 18  # values at a time: a dozen temporaries of 1 MiB
LARGEST = 2.0**40  # more than any block can hold; its square still fits in float32, a hundred times over
PLAIN_TYPES = {F32: torch.float32, F16: torch.float16, BF16: torch.bfloat16}
# What to try for each type: more of it gains less than half a percent of the error, and takes twice the time.
# Signed types: lowest and highest code, and the codes to try for the number of the largest size.
SYMMETRIC: dict[BlockFormat, tuple[int, int, tuple[float, ...]]] = {
    Q4_0: (-8, 7, (-9.2, -8.6, -8.0, -7.4, -6.8, 6.2, 6.8, 7.4, 8.0)),
    Q5_0: (-16, 15, (-17.2, -16.6, -16.0, -15.4, -14.8, 14.2, 14.8, 15.4)),
    Q8_0: (-127, 127, (126.2, 126.6, 127.0, 127.4)),
}
# Types with a minimum: highest code, and the steps to try between a block's ends.
AFFINE: dict[BlockFormat, tuple[int, tuple[float, ...]]] = {
    Q4_1: (15, (14.0, 14.3, 14.6, 14.9, 15.2, 15.5, 15.8)),
    Q5_1: (31, (29.9, 30.2, 30.5, 30.8, 31.1, 31.4, 31.7)),
}
QUANTIZERS: tuple[BlockFormat, ...] = (*PLAIN_TYPES, *SYMMETRIC, *AFFINE, *ENCODE_K)


def quantize(values: torch.Tensor, fmt: BlockFormat, importance: None = None) -> torch.Tensor:
    """float32 (rows, columns) -> uint8 (rows, bytes per row), the same bytes for the same numbers.

    Numbers beyond what a block can hold become its largest. Raises ValueError for numbers that are not finite, for rows
    that are not whole blocks and for formats of which there is no writer. `importance` is for weights of columns to
    come.
    """
    rows, columns = values.shape
    row_bytes = fmt.row_bytes(columns)
    if fmt not in QUANTIZERS:
        raise ValueError(f"there is no writer for {fmt.name}")
    out = torch.empty(rows * columns // fmt.elements, fmt.bytes, dtype=torch.uint8)
    blocks = values.reshape(-1, fmt.elements)
    step = CHUNK // fmt.elements
    for start in range(0, len(blocks), step):
        part = blocks[start : start + step].float()
        if not bool(torch.isfinite(part).all()):
            raise ValueError(f"numbers that are not finite cannot be written as {fmt.name}")
        into = out[start : start + step]
        if fmt in PLAIN_TYPES:
            into.copy_(part.to(PLAIN_TYPES[fmt]).contiguous().view(torch.uint8))
            continue
        part = part.clamp(-LARGEST, LARGEST)
        if fmt in SYMMETRIC:
            _symmetric_blocks(part.T.contiguous(), fmt, into)
        elif fmt in AFFINE:
            _affine_blocks(part.T.contiguous(), fmt, into)
        else:
            ENCODE_K[fmt](part, into)
    return out.view(rows, row_bytes)


def _symmetric_blocks(x: torch.Tensor, fmt: BlockFormat, out: torch.Tensor) -> None:
    """x (32, blocks) as d and codes less an offset: Q4_0, Q5_0, Q8_0."""
    low, high, reaches = SYMMETRIC[fmt]
    top, bottom = x.amax(0), x.amin(0)
    extreme = torch.where(top >= -bottom, top, bottom)
    # The nearest-only scale is the one to beat.
    scale = f16(extreme / low) if fmt is not Q8_0 else f16(extreme.abs() / 127)
    codes = _codes(x, scale, low, high)
    least = error(x, codes * scale)
    trial = f16(symmetric(x, low, high, reaches))
    for _ in range(3):
        new = _codes(x, trial, low, high)
        errs = error(x, new * trial)
        better = errs < least
        least, scale = torch.where(better, errs, least), torch.where(better, trial, scale)
        codes = torch.where(better, new, codes)
        trial = f16((codes * x).sum(0) * inverse(codes.square().sum(0)))
    _pack(out, fmt, codes - low if fmt is not Q8_0 else codes, scale)


def _affine_blocks(x: torch.Tensor, fmt: BlockFormat, out: torch.Tensor) -> None:
    """x (32, blocks) as d, m and codes: Q4_1, Q5_1."""
    high, reaches = AFFINE[fmt]
    bottom, top = x.amin(0), x.amax(0)
    scale, minimum = f16((top - bottom) / high), f16(bottom)
    codes = _codes(x - minimum, scale, 0, high)
    least = error(x, codes * scale + minimum)
    real_scale, real_minimum = affine(x, high, reaches, above_zero=True)
    trial, low = f16(real_scale), f16(real_minimum)
    count, total = x.shape[0], x.sum(0)
    for _ in range(3):
        new = _codes(x - low, trial, 0, high)
        errs = error(x, new * trial + low)
        better = errs < least
        least, scale = torch.where(better, errs, least), torch.where(better, trial, scale)
        minimum, codes = torch.where(better, low, minimum), torch.where(better, new, codes)
        # The minimum is rounded first; the scale can make up for a part of that.
        ones, square, product = codes.sum(0), codes.square().sum(0), (codes * x).sum(0)
        fitted = (count * product - ones * total) * inverse(count * square - ones * ones)
        low = f16((total - fitted * ones) / count)
        trial = f16((product - low * ones) * inverse(square))
    _pack(out, fmt, codes, scale, minimum)


def _codes(x: torch.Tensor, scale: torch.Tensor, low: int, high: int) -> torch.Tensor:
    return (x * inverse(scale)).round_().clamp_(low, high)


def _pack(out: torch.Tensor, fmt: BlockFormat, codes: torch.Tensor, *scales: torch.Tensor) -> None:
    """Scales, high bits, then codes (32, blocks): the fields of all blocks of 32."""
    at = 2 * len(scales)
    out[:, :at] = torch.stack(scales, dim=1).half().view(torch.uint8)
    if fmt is Q8_0:
        out[:, at:] = codes.T.to(torch.int8).view(torch.uint8)
        return
    whole = codes.T.to(torch.uint8).contiguous()  # (blocks, 32)
    if fmt in (Q5_0, Q5_1):
        weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)
        out[:, at : at + 4] = ((whole >> 4).view(-1, 4, 8) * weights).sum(-1, dtype=torch.uint8)
        whole &= 15
        at += 4
    out[:, at:] = whole[:, :16] | whole[:, 16:] << 4
