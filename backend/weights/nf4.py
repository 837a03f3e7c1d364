"""4-bit code books: 16 values, and a float32 scale for each block of a row. NF4 (QLoRA, arXiv:2305.14314) and FP4.

    W[out, in] = book[code] * absmax[block]

`quantise` gives bitsandbytes' codes and absmax to the bit. A few tokens are multiplied in float32 by compiled code that
looks values up in a register; for many, and on other devices, rows become bfloat16 (as bitsandbytes has them), some at
a time, for a dense product.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F

from backend.kernels.cpu import rows
from backend.kernels.cpu.quantise import nf4
from backend.kernels.cuda import products

# Quantiles of the normal distribution with an exact zero: QLoRA, appendix E.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
BLOCK = 64
_MULTIPLE = 32  # of columns in a block, for compiled code
_KERNEL_TOKENS = 12  # with more, a dense product of decoded rows is faster
_CHUNK = 1 << 20  # values decoded at once: 2 MiB of bfloat16


class CodebookLinear:
    """packed uint8 (out, in / 2), the first of two codes in the high bits; absmax float32 (out, in / block).

    Kept as given, so pass no views of a mapped file. x float32 (tokens, in) -> float32 (tokens, out).
    """

    def __init__(self, packed: torch.Tensor, absmax: torch.Tensor, book: tuple[float, ...] = NF4) -> None:
        self.packed, self.absmax, self.book = packed.contiguous(), absmax.float().contiguous(), book
        self.out_features, self.in_features = packed.shape[0], 2 * packed.shape[1]
        self.block = self.in_features // absmax.shape[1]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if x.device.type == "cpu" and x.shape[0] <= _KERNEL_TOKENS and self.block % _MULTIPLE == 0:
            y = rows.codebook(x, self.packed, book_tensor(self.book, "cpu"), self.absmax, self.block)
            if y is not None:
                return y
        if x.is_cuda:
            y = products.looked_up4(x, self.packed, self.absmax, book_tensor(self.book, self.packed.device))
            if y is not None:
                return y
        return self.product(x)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """The dense product, rounded to bfloat16."""
        x16, step = x.bfloat16(), max(1, _CHUNK // self.in_features)
        parts = [F.linear(x16, self._bfloat16(at, at + step)) for at in range(0, self.out_features, step)]
        return torch.cat(parts, dim=-1).float()

    def nbytes(self) -> int:
        return self.packed.nbytes + self.absmax.nbytes

    def twin(self) -> torch.Tensor:
        return dequantise(self.packed, self.absmax, book_tensor(self.book, self.packed.device))

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.packed, self.absmax

    def with_tensors(self, tensors: Sequence[torch.Tensor]) -> CodebookLinear:
        packed, absmax = tensors
        return CodebookLinear(packed, absmax, self.book)

    def _bfloat16(self, start: int, stop: int) -> torch.Tensor:
        stop = min(stop, self.out_features)
        book = book_tensor(self.book, self.packed.device)
        if self.packed.device.type == "cpu" and self.block % _MULTIPLE == 0:
            values = rows.codebook_values(self.packed, book, self.absmax, self.block, start, stop)
            if values is not None:
                return values
        return dequantise(self.packed[start:stop], self.absmax[start:stop], book).bfloat16()


def quantise(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 (rows, columns), columns whole blocks -> packed uint8 (rows, columns / 2), absmax (rows, blocks)."""
    compiled = nf4(values, midpoints()) if values.device.type == "cpu" else None
    return compiled or quantise_twin(values)


def quantise_twin(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same by torch alone."""
    blocks = values.unflatten(1, (-1, BLOCK))
    absmax = blocks.abs().amax(-1)
    # Times the inverse, and an entry for what is up to half-way to the next: in this order, to have the same codes.
    scaled = (blocks * absmax.clamp(min=1e-38).reciprocal()[..., None]).clamp_(-1, 1)
    bounds = midpoints().to(values.device)
    codes = torch.bucketize(scaled, bounds, out_int32=True).to(torch.uint8).view(values.shape)
    return codes[:, 0::2] << 4 | codes[:, 1::2], absmax


@cache
def midpoints() -> torch.Tensor:
    """float32 (15,): what lies half-way between neighbours of the NF4 book."""
    book = book_tensor(NF4, "cpu")
    return (book[:-1] + book[1:]) / 2


def dequantise(packed: torch.Tensor, absmax: torch.Tensor, book: torch.Tensor) -> torch.Tensor:
    """packed uint8 (rows, columns / 2), absmax float32 (rows, blocks), book float32 (16,) -> float32 (rows, columns)"""
    codes = torch.stack([packed >> 4, packed & 15], dim=-1).view(packed.shape[0], absmax.shape[1], -1)
    return (book[codes.int()] * absmax[..., None]).flatten(1)


@cache
def book_tensor(book: tuple[float, ...], device: str | torch.device) -> torch.Tensor:
    """float32 (16,); one for each book and device, however many weights there are."""
    return torch.tensor(book, dtype=torch.float32, device=device)
