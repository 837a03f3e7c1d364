"""GPTQ: rounding weights to a few bits so that a layer's output changes least (Frantar et al. 2022, arXiv:2210.17323).

Columns are rounded one after the other; the error of each is made up for in the columns still to come, by as much as
the inputs seen in calibration say that these can. The files' layout of the result is in docs/formats.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

BITS = (2, 3, 4, 8)
_SMALLEST, _LARGEST = 2.0**-24, 65504.0  # what a float16 scale can be
_TILE = 16
_MORE_DAMP, _MOST_DAMP = 10.0, 1e3
_PRODUCT_TOKENS, _PRODUCT_COLUMNS = 4096, 1024  # of one product in float32


@dataclass(frozen=True)
class GPTQLayer:
    """W[out, in] = scales[g_idx[in], out] * (codes[out, in] - zeros[g_idx[in], out])"""

    bits: int
    codes: torch.Tensor  # uint8 (out, in), 0 .. 2^bits - 1
    scales: torch.Tensor  # float16 (groups, out)
    zeros: torch.Tensor  # uint8 (groups, out), 1 .. 2^bits - 1
    g_idx: torch.Tensor  # int32 (in,), the group of each column

    def values(self) -> torch.Tensor:
        """float32 (out, in), exact."""
        group = self.g_idx.long()
        values = self.codes.float()
        values -= self.zeros.float().t().index_select(1, group)
        return values.mul_(self.scales.float().t().index_select(1, group))

    def rows(self, index: slice | torch.Tensor) -> GPTQLayer:
        """Some of the outputs: each row is rounded by itself."""
        return GPTQLayer(self.bits, self.codes[index], self.scales[:, index], self.zeros[:, index], self.g_idx)


class Hessian:
    """H = 2/n sum of x x^T over all inputs x of n samples: float32 products, summed in float64."""

    def __init__(self, columns: int) -> None:
        self._sum = torch.zeros(columns, columns, dtype=torch.float64)
        self.samples = 0

    def add(self, inputs: torch.Tensor) -> None:
        """One sample's inputs, float32 (tokens, columns)."""
        for x in inputs.split(_PRODUCT_TOKENS):
            for at in range(0, x.shape[1], _PRODUCT_COLUMNS):  # the upper half is enough
                self._sum[at : at + _PRODUCT_COLUMNS, at:] += x[:, at : at + _PRODUCT_COLUMNS].t() @ x[:, at:]
        self.samples += 1

    def matrix(self, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        """(columns, columns), symmetric."""
        for at in range(0, self._sum.shape[0], _PRODUCT_COLUMNS):
            end = at + _PRODUCT_COLUMNS
            self._sum[end:, at:end] = self._sum[at:end, end:].t()
        return self._sum.mul(2 / max(1, self.samples)).to(dtype)


def gptq_quantize(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    bits: int = 4,
    group_size: int = 128,
    act_order: bool = False,
    sym: bool = False,
    damp: float = 0.01,
    block: int = 128,
) -> GPTQLayer:
    """Round `weight`, float32 (out, in), for inputs whose `hessian` (in, in) was seen. Everything is computed in the
    type of the Hessian, float32 or float64, which is left as it is.

    `group_size` columns share a scale, -1: all. `act_order`: columns with large inputs first, which also decides the
    groups. `damp`: part of the mean diagonal that is added to it. `block`: columns whose errors are spread at once;
    changes the speed, not the result. Raises ValueError for numbers that are not finite or do not fit.
    """
    rows, columns = weight.shape
    size = _checked(weight, bits, group_size)
    if hessian.shape != (columns, columns):
        raise ValueError(f"the Hessian has shape {tuple(hessian.shape)}, expected {(columns, columns)}")
    if not bool(torch.isfinite(hessian).all()):
        raise ValueError("the inputs seen in calibration are not finite numbers")
    energy = hessian.diagonal().clone()
    dead = energy <= 0
    order = torch.argsort(energy, descending=True, stable=True) if act_order else torch.arange(columns)
    factor = _inverse_factor(hessian, dead, order, damp)
    # One row per column of the weight from here on, so that a column is one run of memory.
    todo = weight.t().to(hessian.dtype).masked_fill(dead[:, None], 0).index_select(0, order)
    codes = torch.empty(columns, rows, dtype=torch.uint8)
    scales, zeros = torch.empty(-(-columns // size), rows), torch.empty(-(-columns // size), rows)
    errors = torch.empty_like(todo[:block])
    for start, stop in _blocks(columns, size, block):
        for first, last in _tiles(start, stop, size):
            for at in range(first, last):
                group = at // size
                if at % size == 0:
                    scales[group], zeros[group] = _scale(todo[at : at + size], bits, sym)
                    scale, zero = scales[group].to(todo.dtype), zeros[group].to(todo.dtype)
                code = torch.div(todo[at], scale).round_().add_(zero).clamp_(0, 2**bits - 1)
                codes[at] = code
                error = torch.sub(todo[at], code.sub_(zero).mul_(scale), out=errors[at - start])
                error.div_(factor[at, at])
                todo[at + 1 : last].addr_(factor[at, at + 1 : last], error, alpha=-1)
            _spread(todo[last:stop], factor[first:last, last:stop], errors[first - start : last - start])
        _spread(todo[stop:], factor[start:stop, stop:], errors[: stop - start])
    places = torch.argsort(order)
    g_idx = (places // size).to(torch.int32)
    return GPTQLayer(bits, codes.index_select(0, places).t().contiguous(), scales.half(), zeros.to(torch.uint8), g_idx)


def rtn_quantize(weight: torch.Tensor, bits: int = 4, group_size: int = 128, sym: bool = False) -> GPTQLayer:
    """Rounding to nearest, by the same scales: what GPTQ is measured against, and needs no calibration."""
    rows, columns = weight.shape
    size = _checked(weight, bits, group_size)
    codes = torch.empty(rows, columns, dtype=torch.uint8)
    scales, zeros = torch.empty(-(-columns // size), rows), torch.empty(-(-columns // size), rows)
    for group, start in enumerate(range(0, columns, size)):
        part = weight[:, start : start + size].float()
        scales[group], zeros[group] = scale, zero = _scale(part.t(), bits, sym)
        codes[:, start : start + size] = (
            (part / scale[:, None]).round_().add_(zero[:, None]).clamp_(0, 2**bits - 1).to(torch.uint8)
        )
    g_idx = (torch.arange(columns) // size).to(torch.int32)
    return GPTQLayer(bits, codes, scales.half(), zeros.to(torch.uint8), g_idx)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 (n, m) -> int32 (n, m * bits / 32), lowest bits first: the inverse of `grouped.unpack`."""
    n, m = codes.shape
    if m * bits % 32:
        raise ValueError(f"{m} codes of {bits} bits fill no whole words")
    if bits == 8:
        packed = codes
    elif bits == 3:  # eight codes in three bytes
        a, b, c, d, e, f, g, h = codes.reshape(n, -1, 8).unbind(-1)
        three = [a | b << 3 | c << 6, c >> 2 | d << 1 | e << 4 | f << 7, f >> 1 | g << 2 | h << 5]
        packed = torch.stack(three, dim=-1)
    else:
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
        packed = (codes.reshape(n, -1, 8 // bits) << shifts).sum(-1, dtype=torch.uint8)
    return packed.reshape(n, -1).contiguous().view(torch.int32)


def _checked(weight: torch.Tensor, bits: int, group_size: int) -> int:
    """The columns of a group."""
    if bits not in BITS:
        raise ValueError(f"{bits} bits, expected one of {', '.join(map(str, BITS))}")
    if group_size != -1 and group_size < 1:
        raise ValueError(f"groups of {group_size} columns; expected a positive number, or -1 for one group")
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("the weights are not finite numbers")
    return weight.shape[1] if group_size == -1 else min(group_size, weight.shape[1])


def _scale(part: torch.Tensor, bits: int, sym: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """part (columns of a group, out) -> float32 scale, already one of float16, and zero point, (out,)."""
    top = 2**bits - 1
    low, high = (edge.float() for edge in (part.amin(0).clamp_(max=0), part.amax(0).clamp_(min=0)))
    if sym:
        high = torch.maximum(-low, high)
        low = -high
    empty = (low == 0) & (high == 0)
    low, high = low.masked_fill(empty, -1), high.masked_fill(empty, 1)
    scale = _half((high - low) / top)
    if sym:
        return scale, torch.full_like(scale, 2 ** (bits - 1))
    zero = (-low / scale).round_().clamp_(0, top)
    # Files hold the zero point minus one, and programs disagree on what a zero point of 0 becomes: none is written.
    positive = zero < 1
    return torch.where(positive, _half(high / (top - 1)), scale), zero.clamp_(min=1)


def _half(scale: torch.Tensor) -> torch.Tensor:
    if float(scale.max()) > _LARGEST:
        raise ValueError(f"a scale of {float(scale.max()):g} is more than f16 can hold")
    return scale.half().float().clamp_(min=_SMALLEST)


def _inverse_factor(hessian: torch.Tensor, dead: torch.Tensor, order: torch.Tensor, damp: float) -> torch.Tensor:
    """The upper triangular U with U^T U = H^-1 of the damped Hessian, its columns in `order`.

    H turned end to end is L L^T; L turned end to end is an upper R with H = R R^T, so U = R^-1.
    """
    turned = order.flip(0)
    matrix = hessian.index_select(0, turned).index_select(1, turned)
    diagonal = matrix.diagonal()
    diagonal[dead[turned]] = 1
    mean = float(diagonal.mean())
    added = 0.0
    while True:
        diagonal += damp * mean - added
        added = damp * mean
        lower, failed = torch.linalg.cholesky_ex(matrix)
        if not int(failed):
            break
        damp = max(damp * _MORE_DAMP, 1e-4)
        if damp > _MOST_DAMP:
            raise ValueError("the inputs seen in calibration give no matrix that can be inverted")
    del matrix, diagonal
    identity = torch.eye(lower.shape[0], dtype=lower.dtype)
    return torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1)


def _spread(todo: torch.Tensor, factor: torch.Tensor, errors: torch.Tensor) -> None:
    """Make up in `todo` (columns to come, out) for `errors` (columns, out)."""
    if len(todo):
        todo.addmm_(factor.t(), errors, alpha=-1)


def _blocks(columns: int, size: int, block: int) -> list[tuple[int, int]]:
    """Runs of at most about `block` columns that end where groups end, or lie within one: a group's scale is found when
    all errors before it are spread."""
    if size < block:
        step = block // size * size
        return [(start, min(start + step, columns)) for start in range(0, columns, step)]
    return [
        (start, min(start + block, group + size, columns))
        for group in range(0, columns, size)
        for start in range(group, min(group + size, columns), block)
    ]


def _tiles(start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    """Runs of a few columns inside a block, cut where groups begin: small enough that one thread updates them."""
    for group in range(start, stop, size):
        end = min(group + size, stop)
        for first in range(group, end, _TILE):
            yield first, min(first + _TILE, end)
