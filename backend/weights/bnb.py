"""Weights as bitsandbytes stores them in checkpoints: int8 rows (LLM.int8) and 4-bit code books (NF4, FP4).

* int8: W[out, in] = code * SCB[out] / 127, SCB being the largest absolute value of the row.
* 4-bit: the values of the whole matrix, row after row, in blocks: W = code_book[nibble] * absmax[block], the first of
  two values in the high nibble. "Double quant" stores absmax as bytes: absmax = nested_map[byte] * nested_absmax +
  offset.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from backend.weights.planes import Planes


class Int8Rows:
    """codes int8 (out, in), scb float32 (out,)."""

    def __init__(self, codes: torch.Tensor, scb: torch.Tensor, release: Callable[[], None] | None = None) -> None:
        self.codes, self._release = codes, release
        self.scale = scb.float() / 127  # (out,): value = code * scale

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.codes.shape)

    @property
    def dtype(self) -> torch.dtype | None:
        return None

    def float32(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        return self.codes[start:stop].float().mul_(self.scale[start:stop, None])

    def planes(self) -> Planes | None:
        return None

    def release(self) -> None:
        if self._release is not None:
            self._release()


class Codebook4:
    """packed uint8 (ceil(out * in / 2),), code_book float32 (16,), absmax float32 (blocks,) of `block` values each."""

    def __init__(
        self,
        packed: torch.Tensor,
        shape: tuple[int, int],
        code_book: torch.Tensor,
        absmax: torch.Tensor,
        block: int,
        release: Callable[[], None] | None = None,
    ) -> None:
        self.packed, self._shape, self.absmax, self.block = packed, shape, absmax, block
        self.book, self._release = tuple(code_book.tolist()), release
        byte = torch.arange(256)
        self._pairs = torch.stack([code_book[byte >> 4], code_book[byte & 15]], dim=-1)  # (256, 2)

    @property
    def shape(self) -> tuple[int, ...]:
        return self._shape

    @property
    def dtype(self) -> torch.dtype | None:
        return None

    def float32(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        rows, columns = self._shape
        stop = rows if stop is None else min(stop, rows)
        first_block, last_block = start * columns // self.block, -(-stop * columns // self.block)
        at = first_block * self.block  # even, because blocks are
        packed = self.packed[at // 2 : last_block * self.block // 2]
        blocks = torch.zeros(last_block - first_block, self.block)  # the last may be longer than the values
        values = self._pairs.index_select(0, packed.int()).flatten()
        blocks.view(-1)[: values.numel()] = values
        blocks.mul_(self.absmax[first_block:last_block, None])
        return blocks.view(-1)[start * columns - at : stop * columns - at].view(stop - start, columns)

    def planes(self) -> Planes | None:
        return None

    def release(self) -> None:
        if self._release is not None:
            self._release()


def nested_absmax(
    codes: torch.Tensor, code_book: torch.Tensor, absmax: torch.Tensor, block: int, offset: float
) -> torch.Tensor:
    """Double quant undone: codes uint8 (n,), code_book float32 (256,), absmax float32 (ceil(n / block),) -> (n,)."""
    return code_book[codes.int()] * absmax.repeat_interleave(block)[: codes.numel()] + offset
