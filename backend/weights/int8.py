"""One signed byte per weight and one scale per row: weight-only int8. And the same with a scale per 32 columns.

    W[out, in] = code * scale[out]

A few tokens are multiplied in float32 by compiled code. For some more (and without a compiler) there is torch's
`aten::_weight_int8pack_mm`, which multiplies bfloat16 activations by int8 weights. What was found out about it in torch
2.13: its float32 form is a scalar loop; in features that are no multiple of 16 are read beyond their end (wrong
numbers, or a crash); for many tokens, converting the weights to bfloat16 and a dense product is faster. Codes are exact
in bfloat16 (8 significant bits), and the scale is applied in float32 after the sum: only activations and sums are
rounded.

Where compiled code multiplies tiles (tiled.py), matrices are Q8_0 blocks instead, which `quantise_blocks` makes: a
float16 scale for each 32 columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from backend.kernels.cpu import quantise as compiled
from backend.kernels.cpu import rows
from backend.kernels.cuda import products

_GROUP = 32  # of columns with one scale, in blocks
_MULTIPLE = 16  # of in features, for torch's kernel
_COMPILED_TOKENS = 8  # with more, torch's kernel is faster
_KERNEL_TOKENS = 32  # with more, converting pays
_CHUNK = 1 << 20  # weights converted at once: 2 MiB of bfloat16


class Int8Linear:
    """y = x W^T with W = code * scale. codes int8 (out, in), scale float32 (out,): kept as given, so pass no views of a
    mapped file. x float32 (tokens, in) -> float32 (tokens, out)."""

    def __init__(self, codes: torch.Tensor, scale: torch.Tensor) -> None:
        self._codes, self._scale = codes.contiguous(), scale.float().contiguous()
        self.out_features, self.in_features = codes.shape

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if x.device.type == "cpu" and x.shape[0] <= _COMPILED_TOKENS:
            y = rows.int8(x, self._codes, self._scale)
            if y is not None:
                return y
        if x.is_cuda and (y := products.int8(x, self._codes, self._scale)) is not None:
            return y
        return self.product(x)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """The product in bfloat16 by torch."""
        x16 = x.bfloat16()
        whole = self.in_features % _MULTIPLE == 0 and x16.is_contiguous()
        if x.device.type == "cpu" and whole and 0 < x.shape[0] <= _KERNEL_TOKENS:
            one = torch.ones(self.out_features, dtype=torch.bfloat16)
            return torch.ops.aten._weight_int8pack_mm(x16, self._codes, one).float().mul_(self._scale)
        step = max(1, _CHUNK // self.in_features)
        parts = [F.linear(x16, some.bfloat16()) for some in self._codes.split(step)]
        return torch.cat(parts, dim=-1).float().mul_(self._scale)

    def nbytes(self) -> int:
        return self._codes.nbytes + self._scale.nbytes

    def twin(self) -> torch.Tensor:
        return self._codes.float() * self._scale[:, None]

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self._codes, self._scale

    def with_tensors(self, tensors: Sequence[torch.Tensor]) -> Int8Linear:
        return Int8Linear(*tensors)


def quantise(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 (rows, columns) -> codes int8 -127..127, and what one code is worth, float32 (rows,)."""
    largest = values.abs().amax(1)
    each = torch.where(largest > 0, 127 / largest, 0)
    return (values * each[:, None]).round_().to(torch.int8), largest / 127


def quantise_blocks(values: torch.Tensor) -> torch.Tensor:
    """float32 (rows, columns), columns whole groups of 32 -> Q8_0 blocks, uint8 (rows, 34 bytes for each 32).

    The scale is largest / 127 as the nearest float16, and codes are the nearest for that rounded scale; ggml's are for
    the scale before it was rounded. Raises ValueError for numbers that are not finite.
    """
    if not bool(torch.isfinite(values.abs().amax())):
        raise ValueError("numbers that are not finite cannot be written as Q8_0")
    blocks = compiled.q8_0(values)
    return quantise_blocks_twin(values) if blocks is None else blocks


def quantise_blocks_twin(values: torch.Tensor) -> torch.Tensor:
    """The same in plain torch."""
    groups = values.reshape(-1, _GROUP)
    largest = groups.abs().amax(1)
    scale = (largest / 127).clamp(max=torch.finfo(torch.float16).max).half().float()
    # Float16 numbers this small are coarse: where the nearest one does not reach the largest number, the next one does.
    tiny = torch.finfo(torch.float16)
    scale = torch.where((scale < tiny.tiny) & (largest > 127.5 * scale), scale + tiny.smallest_normal * tiny.eps, scale)
    each = torch.where(scale > 0, 1 / scale, 0)
    codes = (groups * each[:, None]).round_().clamp_(-127, 127).to(torch.int8)
    blocks = torch.cat([scale.half()[:, None].view(torch.uint8), codes.view(torch.uint8)], dim=1)
    return blocks.view(values.shape[0], -1)
