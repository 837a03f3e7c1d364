"""Stored tensors to bytes of another format, a few rows at a time, so that no tensor is ever in memory whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import numpy as np
import torch

from backend.convert.output import ConvertError
from backend.weights.blocks import BF16, F16, F32, BlockFormat
from backend.weights.encode import quantize
from backend.weights.stored import PLAIN_DTYPES, Blocks, Joined, Plain, Stored

PIECE_ELEMENTS = 1 << 21  # decoded at once: 8 MiB of float32
Order = Callable[[int, int], torch.Tensor]  # (rows, heads) -> int64 row permutation


def write_rows(
    file: BinaryIO,
    stored: Stored,
    fmt: BlockFormat,
    name: str,
    reorder: Order | None = None,
    head_dim: int = 1,
    report: Callable[[int], None] = lambda nbytes: None,
) -> None:
    """Write all rows in format `fmt`; blocks that have this format already are copied as bytes.

    `reorder`: how the rows of each head of `head_dim` rows change places. `report` gets the bytes of each piece.
    """
    for start, stop in pieces(stored.shape, head_dim):
        order = reorder(stop - start, (stop - start) // head_dim) if reorder else None
        raw = raw_rows(stored, fmt, start, stop)
        if raw is not None:
            data = (raw if order is None else raw[order]).contiguous().view(torch.uint8).numpy()
        else:
            values = stored.float32(start, stop) if len(stored.shape) > 1 else stored.float32()
            data = encode(values if order is None else values[order], fmt, name)
        stored.release()
        file.write(memoryview(data).cast("B"))
        report(data.nbytes)


def pieces(shape: tuple[int, ...], head_dim: int = 1) -> Iterator[tuple[int, int]]:
    """Rows (start, stop) of each piece, whole heads in each; a vector is one piece."""
    if len(shape) == 1:
        yield 0, shape[0]
        return
    step = max(1, PIECE_ELEMENTS // shape[1] // head_dim) * head_dim
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


def encode(values: torch.Tensor, fmt: BlockFormat, name: str) -> np.ndarray[Any, Any]:
    """float32 (rows, columns) or (n,) as C-contiguous bytes or numbers of the format.

    Raises ConvertError for values that are not finite or do not fit.
    """
    largest = magnitude(values)
    if not math.isfinite(largest):
        raise ConvertError(f"tensor '{name}' holds values that are not numbers or infinite; the model is damaged")
    if fmt is F16 and largest >= 65520:
        raise ConvertError(f"tensor '{name}' reaches {largest:g}, more than f16 can hold; use bf16 or f32")
    if fmt in (F32, F16, BF16):
        return values.contiguous().to(PLAIN_DTYPES[fmt]).view(torch.uint8).numpy()
    try:
        return quantize(values, fmt).numpy()
    except ValueError as error:
        raise ConvertError(f"tensor '{name}' cannot be written as {fmt.name}: {error}") from None


def magnitude(values: torch.Tensor) -> float:
    """The largest absolute value; infinite or NaN where there is such a one. One pass over the values."""
    low, high = (float(end) for end in torch.aminmax(values))
    return max(-low, high) if not math.isnan(low) else low


def raw_rows(stored: Stored, fmt: BlockFormat, start: int, stop: int) -> torch.Tensor | None:
    """Rows start to stop as they are stored, where that is this format already: uint8 blocks, or plain numbers."""
    if isinstance(stored, Blocks) and stored.format is fmt:
        return stored.raw[start:stop]
    if isinstance(stored, Plain) and stored.dtype == PLAIN_DTYPES.get(fmt):
        return stored.values[start:stop]
    if not isinstance(stored, Joined):
        return None
    found: list[torch.Tensor] = []
    at = 0
    for part in stored.parts:
        first, last = (start, stop) if stored.dim else (max(start - at, 0), min(stop - at, part.shape[0]))
        at += part.shape[0]
        if first >= last:
            continue
        raw = raw_rows(part, fmt, first, last)
        if raw is None:
            return None
        found.append(raw)
    return torch.cat(found, dim=stored.dim) if found else None
