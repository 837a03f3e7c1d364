"""Weights as GPTQ and AWQ files hold them: small codes with a scale and a zero point for each group of columns.

W[out, in] = scale[out, g(in)] * (code[out, in] - zero[out, g(in)])

Nothing is unpacked before it is asked for, and then a slice of rows at a time. The packing of each layout is in
docs/formats.md; all arithmetic on codes is on bytes, all arithmetic on values in float32 (exact for float16 scales).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch

from backend.weights.planes import Planes

PLANE_GROUPS = (256, 128, 64, 32)  # columns per scale that the packed 4-bit product takes, best first
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble i of a word is output 8 c + AWQ_ORDER[i]
_BLOCK = 256  # rows unpacked at once, so that the words of a block stay in the cache


@dataclass(frozen=True)
class Grouping:
    """Which columns share a scale: column j belongs to group index[j].

    `size` > 0: the groups are runs of this many columns, one after the other, and fill the columns; 0: ask `index`.
    """

    groups: int
    size: int
    index: torch.Tensor  # int64 (columns,), 0..groups-1

    @classmethod
    def even(cls, columns: int, groups: int, size: int) -> Grouping:
        """Runs of `size` columns; the last may be shorter."""
        return cls(groups, size if columns == groups * size else 0, torch.arange(columns) // size)

    @classmethod
    def listed(cls, index: torch.Tensor, groups: int) -> Grouping:
        """By a list (columns,) of group numbers, each checked to be in 0..groups-1 by the caller."""
        columns = index.numel()
        size = columns // groups
        if columns == groups * size and torch.equal(index, torch.arange(columns, dtype=index.dtype) // size):
            return cls.even(columns, groups, size)
        return cls(groups, 0, index.long())

    @cached_property
    def act_order(self) -> bool:
        """Whether the columns of a group do not lie side by side in rising order of groups."""
        return bool((self.index[1:] < self.index[:-1]).any())

    @cached_property
    def plane_group(self) -> int:
        """Columns per scale in planes: the largest that every group is a multiple of; 0 when there is none."""
        counts = torch.bincount(self.index, minlength=self.groups)
        return next((size for size in PLANE_GROUPS if not bool((counts % size).any())), 0)

    def order(self) -> torch.Tensor | None:
        """int64 (columns,): the columns sorted by group; None when they are."""
        return torch.argsort(self.index, stable=True) if self.act_order else None

    def runs(self) -> torch.Tensor:
        """int64 (columns / plane_group,): the group of each run of columns in planes."""
        return self.index.sort().values[:: self.plane_group]


class Codes(Protocol):
    """Packed whole numbers, (rows, columns)."""

    bits: int
    shape: tuple[int, int]

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """uint8 (stop - start, columns), each 0 .. 2^bits - 1."""
        ...


class WordCodes:
    """int32 words (columns * bits / 32, rows): the bits of a column of words are a row's codes, lowest bits first."""

    def __init__(self, words: torch.Tensor, bits: int) -> None:
        self.words, self.bits = words, bits
        self.shape = words.shape[1], words.shape[0] * 32 // bits

    def rows(self, start: int, stop: int) -> torch.Tensor:
        codes = torch.empty(stop - start, self.shape[1], dtype=torch.uint8)
        for at in range(start, stop, _BLOCK):
            end = min(at + _BLOCK, stop)
            codes[at - start : end - start] = unpack(self.words[:, at:end].t(), self.bits)
        return codes


class AwqCodes:
    """int32 words (columns, rows / 8): the nibbles of a word are eight rows' codes in the order of `AWQ_ORDER`."""

    bits = 4

    def __init__(self, words: torch.Tensor) -> None:
        self.words = words
        self.shape = words.shape[1] * 8, words.shape[0]

    def rows(self, start: int, stop: int) -> torch.Tensor:
        first, last = start // 8, -(-stop // 8)
        columns = self.shape[1]
        codes = torch.empty(last - first, 8, columns, dtype=torch.uint8)
        for at in range(first, last, _BLOCK // 8):
            block = _bytes(self.words[:, at : min(at + _BLOCK // 8, last)].t()).view(-1, columns, 4)
            out = codes[at - first : at - first + block.shape[0]]
            for byte in range(4):
                torch.bitwise_and(block[..., byte], 15, out=out[:, AWQ_ORDER[2 * byte]])
                torch.bitwise_right_shift(block[..., byte], 4, out=out[:, AWQ_ORDER[2 * byte + 1]])
        return codes.view(-1, columns)[start - 8 * first : stop - 8 * first]


def unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 (n, words) of any stride -> uint8 (n, words * 32 / bits), lowest bits first; 3 bits run across words."""
    packed = _bytes(words)
    if bits == 8:
        return packed
    if bits == 4:
        pairs = packed.to(torch.int16)  # 0x00hl -> 0x0h0l, which is the two bytes l, h
        pairs |= pairs << 4
        pairs &= 0x0F0F
        return pairs.view(torch.uint8)
    if bits == 2:
        return torch.stack([(packed >> shift) & 3 for shift in (0, 2, 4, 6)], dim=-1).flatten(1)
    if bits == 3:
        a, b, c = packed.view(packed.shape[0], -1, 3).unbind(-1)  # eight codes in three bytes
        eight = [a, a >> 3, a >> 6 | b << 2, b >> 1, b >> 4, b >> 7 | c << 1, c >> 2, c >> 5]
        return torch.stack(eight, dim=-1).bitwise_and_(7).flatten(1)
    raise ValueError(f"no packing of {bits} bits")


def _bytes(words: torch.Tensor) -> torch.Tensor:
    """int32 (n, words) of any stride -> uint8 (n, 4 * words), a copy."""
    # Not contiguous(): that keeps odd strides of dimensions of one element, which a view as bytes refuses.
    return words.clone(memory_format=torch.contiguous_format).view(torch.uint8)


class Grouped:
    """Codes (out, in) with scale and zero, float32 (out, groups); see the formula above.

    `scaled_zero`: the zero is already multiplied by the scale, value = scale * code - zero (the first GPTQ files).
    """

    def __init__(
        self,
        codes: Codes,
        scale: torch.Tensor,
        zero: torch.Tensor,
        grouping: Grouping,
        scaled_zero: bool = False,
        release: Callable[[], None] | None = None,
    ) -> None:
        self._codes, self._scale, self._zero = codes, scale.contiguous(), zero.contiguous()
        self._grouping, self._scaled_zero, self._release = grouping, scaled_zero, release

    @property
    def bits(self) -> int:
        return self._codes.bits

    @property
    def shape(self) -> tuple[int, ...]:
        return self._codes.shape

    @property
    def dtype(self) -> torch.dtype | None:
        return None

    def float32(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        stop = self.shape[0] if stop is None else min(stop, self.shape[0])
        values = self._codes.rows(start, stop).float()
        scale, zero = self._scale[start:stop], self._zero[start:stop]
        if self._grouping.size:
            by_group = values.view(stop - start, self._grouping.groups, self._grouping.size)
            scale, zero = scale[..., None], zero[..., None]
        else:
            by_group, index = values, self._grouping.index
            scale, zero = scale.index_select(1, index), zero.index_select(1, index)
        if self._scaled_zero:
            by_group.mul_(scale).sub_(zero)
        else:
            by_group.sub_(zero).mul_(scale)
        return values

    @property
    def planes_kept(self) -> int:
        """How many planes there are; 0 where there is no such form."""
        return (1 if self.bits < 8 else 2) if self._grouping.plane_group else 0

    def planes(self) -> Planes | None:
        group = self._grouping.plane_group
        if not group:
            return None
        codes = self._codes.rows(0, self.shape[0])
        order = self._grouping.order()
        if order is not None:
            codes = codes.gather(1, order.expand(codes.shape))
        runs = self._grouping.runs()
        scale = self._scale.index_select(1, runs)
        if self.bits < 8:
            return Planes(((codes, scale, self._value_of(8, scale, runs)),), group, order)
        # code = 16 h + l = 16 (h - 8) + (l - 8) + 136
        high = (codes >> 4, 16 * scale, torch.zeros_like(scale))
        return Planes((high, (codes & 15, scale, self._value_of(136, scale, runs))), group, order)

    def _value_of(self, code: int, scale: torch.Tensor, runs: torch.Tensor) -> torch.Tensor:
        """What a code stands for in each run of columns: float32 (out, runs)."""
        zero = self._zero.index_select(1, runs)
        return code * scale - zero if self._scaled_zero else (code - zero) * scale

    def release(self) -> None:
        if self._release is not None:
            self._release()
