"""Quantising while loading: stored weights of any kind into int8 rows, 4-bit code books, 8-bit and 4-bit blocks.

Rows are decoded and quantised some at a time, so that what is needed besides the result is a few times 1 MiB. Weights
that are stored in the asked form are copied, code by code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from backend.kernels.cpu.memory import empty
from backend.weights import int4_grouped, int8, llm_int8, nf4
from backend.weights.blocks import Q4_1, Q8_0, BlockFormat
from backend.weights.bnb import Codebook4, Int8Rows
from backend.weights.grouped import Grouped
from backend.weights.int8 import Int8Linear
from backend.weights.linear import Linear
from backend.weights.llm_int8 import LlmInt8Linear
from backend.weights.nf4 import CodebookLinear
from backend.weights.stored import Blocks, Stored
from backend.weights.tiled import TiledLinear, multiplies_rightly
from backend.weights.tiles import ROWS

_CHUNK = 1 << 18  # values quantised at once: 1 MiB of float32; larger pieces leave holes in the heap
Quantise = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]  # rows -> codes, scales


def int8_linear(parts: Sequence[Stored]) -> Int8Linear:
    """Weight-only int8: each row's largest number is 127."""
    return Int8Linear(*_int8_rows(parts, int8.quantise))


def llm_int8_linear(parts: Sequence[Stored]) -> LlmInt8Linear:
    """The same with bitsandbytes' codes: of numbers rounded to float16."""
    return LlmInt8Linear(*_int8_rows(parts, llm_int8.quantise))


def kept_linear(parts: Sequence[Stored]) -> Linear | None:
    """Weights that bitsandbytes quantised, as they are in the file; None where they are others or do not fit in one."""
    if all(isinstance(part, Int8Rows) for part in parts):
        return int8_linear(parts)
    if all(isinstance(part, Codebook4) for part in parts):
        return _codebook(parts)
    return None


def nf4_linear(parts: Sequence[Stored]) -> CodebookLinear | None:
    """NF4 with blocks of 64, or another code book where the file has one; None where blocks do not fill the rows."""
    if any(isinstance(part, Codebook4) for part in parts):
        return _codebook(parts)
    columns = parts[0].shape[1]
    if columns % nf4.BLOCK:
        return None
    count = sum(part.shape[0] for part in parts)
    packed, absmax = empty((count, columns // 2), torch.uint8), empty((count, columns // nf4.BLOCK), torch.float32)
    for rows, values in _rows(parts):
        packed[rows], absmax[rows] = nf4.quantise(values)
    return CodebookLinear(packed, absmax)


def is_int4(part: Stored) -> bool:
    """Whether a weight is stored as codes of at most 4 bits in the groups of the packed product."""
    if isinstance(part, Blocks):
        return part.format.planes == 1
    return isinstance(part, Grouped) and part.planes_kept == 1


def quantised_int4(part: Stored) -> Blocks:
    """Any matrix whose columns are whole groups of 32 as Q4_1: 4-bit codes, a float16 scale and minimum for each 32."""
    return _blocks(part, Q4_1, int4_grouped.quantise)


def int8_for(parts: Sequence[Stored], device: str) -> Linear | None:
    """Weight-only int8: on a CPU with compiled products Q8_0 in tiles, a float16 scale for each 32 columns; else rows.

    Blocks of Q8_0 stay as they are, and so do rows that bitsandbytes quantised. None where matrices must be products of
    their own.
    """
    tiled = [device == "cpu" and _has_tiles(part) for part in parts]
    if not any(tiled):
        return int8_linear(parts)
    if not all(tiled) or any(part.shape[0] % ROWS for part in parts[:-1]):
        return None
    blocks = [
        part if isinstance(part, Blocks) and part.format == Q8_0 else _blocks(part, Q8_0, int8.quantise_blocks)
        for part in parts
    ]
    return TiledLinear.of_blocks([part.raw for part in blocks], Q8_0)


def _has_tiles(part: Stored) -> bool:
    return not isinstance(part, Int8Rows) and part.shape[1] % Q8_0.elements == 0 and multiplies_rightly(Q8_0)


def _blocks(part: Stored, fmt: BlockFormat, quantise: Callable[[torch.Tensor], torch.Tensor]) -> Blocks:
    rows, columns = part.shape
    raw = empty((rows, fmt.row_bytes(columns)), torch.uint8)
    for at, values in _rows([part]):
        raw[at] = quantise(values)
    return Blocks(raw, fmt)


def _int8_rows(parts: Sequence[Stored], quantise: Quantise) -> tuple[torch.Tensor, torch.Tensor]:
    count, columns = sum(part.shape[0] for part in parts), parts[0].shape[1]
    codes, scale = empty((count, columns), torch.int8), torch.empty(count)
    at = 0
    for part in parts:
        own = slice(at, at + part.shape[0])
        if isinstance(part, Int8Rows):
            codes[own], scale[own] = part.codes, part.scale
        else:
            for rows, values in _rows([part]):
                codes[own][rows], scale[own][rows] = quantise(values)
        part.release()
        at = own.stop
    return codes, scale


def _codebook(parts: Sequence[Stored]) -> CodebookLinear | None:
    """One product of code books; None unless all have the same, in blocks that fill the rows."""
    books = [part for part in parts if isinstance(part, Codebook4)]
    first = books[0]
    if len(books) < len(parts) or any((part.book, part.block) != (first.book, first.block) for part in books):
        return None
    rows, columns = sum(part.shape[0] for part in parts), parts[0].shape[1]
    if columns % first.block:
        return None
    packed, absmax = empty((rows, columns // 2), torch.uint8), empty((rows, columns // first.block), torch.float32)
    torch.cat([part.packed.view(-1, columns // 2) for part in books], out=packed)
    torch.cat([part.absmax.view(-1, columns // first.block) for part in books], out=absmax)
    return CodebookLinear(packed, absmax, first.book)


def _rows(parts: Sequence[Stored]) -> Iterator[tuple[slice, torch.Tensor]]:
    """Rows of the parts one above the other, decoded: where they belong, and float32 (rows, columns)."""
    at = 0
    for part in parts:
        rows, columns = part.shape
        step = max(1, _CHUNK // columns)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            yield slice(at + start, at + stop), part.float32(start, stop)
        part.release()
        at += rows
