"""Products on a CUDA device: which kernel for how many tokens. None where torch has to do it, for want of kernels.

x is float32 (tokens, in), results float32 (tokens, out). Up to `FEW` tokens read the weight once in its packed form;
more are a dense product, for which 4-bit weights are decoded into a buffer first. Nothing here waits for the device.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from backend.kernels.cuda.available import Kernels, kernels

FEW = 16  # tokens of one tile of a matrix unit


def rows(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor | None:
    """weight float32, bfloat16 or float16 (out, in); x is rounded to its type."""
    loaded = _for(x)
    if loaded is None or x.shape[0] > FEW:
        return None
    return _few(loaded, x).rows(x.contiguous(), weight)


def int8(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor | None:
    """codes int8 (out, in), scale float32 (out,); x is rounded to bfloat16, in which codes are exact."""
    loaded = _for(x)
    if loaded is None:
        return None
    if x.shape[0] > FEW:
        return F.linear(x.bfloat16(), codes.bfloat16()).float() * scale
    return _few(loaded, x).rows(x.contiguous(), codes, scale)


def llm_int8(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, threshold: float) -> torch.Tensor | None:
    """As `backend.weights.llm_int8.product`, in one pass and without asking the host which columns are outliers."""
    loaded = _for(x)
    if loaded is None or x.shape[0] > FEW:
        return None
    return loaded.outliers.llm_int8(x.contiguous(), codes, scale, threshold)


def grouped4(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor | None:
    """codes uint8 (out, in / 2), the first of two in the low bits; scale, zero (out, in / group).

    value = (code - 8) * scale + zero; group a power of two, 2 or more. x is rounded to bfloat16.
    """
    loaded = _for(x)
    if loaded is None or not _groups(codes, scale):
        return None
    if x.shape[0] > FEW:
        return F.linear(x.bfloat16(), loaded.dense.decode(codes, scale, zero, None, torch.bfloat16)).float()
    return _few(loaded, x).grouped4(x.contiguous(), codes, scale, zero)


def looked_up4(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, table: torch.Tensor) -> torch.Tensor | None:
    """codes uint8 (out, in / 2), the first of two in the high bits; scale (out, in / block); table float32 (16,).

    value = table[code] * scale; block a power of two, 2 or more. x is rounded to bfloat16.
    """
    loaded = _for(x)
    if loaded is None or not _groups(codes, scale):
        return None
    if x.shape[0] > FEW:
        return F.linear(x.bfloat16(), loaded.dense.decode(codes, scale, None, table, torch.bfloat16)).float()
    return _few(loaded, x).looked_up4(x.contiguous(), codes, scale, table)


def _few(loaded: Kernels, x: torch.Tensor) -> Any:
    """The kernels for so few tokens."""
    return loaded.gemv if x.shape[0] <= loaded.gemv.MOST else loaded.skinny


def _for(x: torch.Tensor) -> Kernels | None:
    return kernels() if x.shape[0] else None


def _groups(codes: torch.Tensor, scale: torch.Tensor) -> bool:
    """Whether the groups are of a size that a tile can be made of."""
    columns, groups = 2 * codes.shape[1], scale.shape[1]
    group = columns // groups
    return columns % groups == 0 and group >= 2 and group & (group - 1) == 0
