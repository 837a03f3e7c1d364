"""Triton: what stands between the products of a step, one launch each. Imported only through `available.py`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _add_norm(x, delta, weight, total, out, width, eps, ADDED: tl.constexpr, LANES: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    inside = lane < width
    value = tl.load(x + row * width + lane, mask=inside, other=0.0)
    if ADDED:
        value += tl.load(delta + row * width + lane, mask=inside, other=0.0)
        tl.store(total + row * width + lane, value, mask=inside)
    size = tl.sqrt(tl.sum(value * value, axis=0) / width + eps)
    tl.store(out + row * width + lane, value / size * tl.load(weight + lane, mask=inside, other=0.0), mask=inside)


@triton.jit
def _gated(both, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    lane = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = lane < width
    gate = tl.load(both + row * 2 * width + lane, mask=inside, other=0.0)
    up = tl.load(both + row * 2 * width + width + lane, mask=inside, other=0.0)
    tl.store(out + row * width + lane, gate / (1.0 + tl.exp(-gate)) * up, mask=inside)


@triton.jit
def _greedy(logits, tokens, finite, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    where = tl.full((BLOCK,), 0, tl.int32) + width
    bad = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, width, BLOCK):
        at = first + lane
        value = tl.load(logits + row * width + at, mask=at < width, other=float("-inf"))
        # Infinity minus itself and NaN minus itself are NaN, which is unequal to zero.
        bad += tl.where((at < width) & (value - value != 0.0), 1, 0)
        better = value > best
        best = tl.where(better, value, best)
        where = tl.where(better, at, where)
    top = tl.max(best, axis=0)
    # The lowest of equal ids, whoever found it: the same answer on every machine.
    tl.store(tokens + row, tl.min(tl.where(best == top, where, width), axis=0).to(tl.int64))
    tl.store(finite + row, tl.where(tl.sum(bad, axis=0) == 0, 1, 0).to(tl.int64))


def add_norm(
    x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`backend.model.operations.add_norm` in one pass."""
    x = x.contiguous()
    rows, width = x.shape
    out = torch.empty_like(x)
    total = x if delta is None else torch.empty_like(x)
    lanes = triton.next_power_of_2(width)
    _add_norm[(rows,)](
        x, x if delta is None else delta.contiguous(), weight, total, out, width, eps,
        ADDED=delta is not None, LANES=lanes, num_warps=min(16, max(1, lanes // 256)),
    )  # fmt: skip
    return total, out


def gated(both: torch.Tensor) -> torch.Tensor:
    """`backend.model.operations.gated` in one pass."""
    both = both.contiguous()
    rows, width = both.shape[0], both.shape[1] // 2
    out = torch.empty(rows, width, dtype=both.dtype, device=both.device)
    _gated[(rows, triton.cdiv(width, 1024))](both, out, width, BLOCK=1024, num_warps=4)
    return out


def greedy(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 (rows, vocab) -> int64 (rows,): likeliest ids, the lowest of equals; and 1 where a row is finite."""
    rows, width = logits.shape
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    finite = torch.empty(rows, dtype=torch.int64, device=logits.device)
    _greedy[(rows,)](logits.contiguous(), tokens, finite, width, BLOCK=4096, num_warps=8)
    return tokens, finite
