"""One signed byte per weight and one scale per row, through torch's mixed int8 product on the CPU.

`aten::_weight_int8pack_mm` multiplies bfloat16 activations by int8 weights. What was found out about it in torch 2.13:
its float32 form is a scalar loop; in features that are no multiple of 16 are read beyond their end (wrong numbers, or a
crash); for many tokens, converting the weights to bfloat16 and a dense product is faster. Codes are exact in bfloat16
(8 significant bits), and the scale is applied in float32 after the sum: only activations and sums are rounded.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

_MULTIPLE = 16  # of in features, for the kernel
_KERNEL_TOKENS = 32  # with more, converting pays
_CHUNK = 1 << 20  # weights converted at once: 2 MiB of bfloat16


class Int8Linear:
    """y = x W^T with W = code * scale. codes int8 (out, in), scale float32 (out,): kept as given, so pass no views of a
    mapped file. x float32 (tokens, in) -> float32 (tokens, out)."""

    def __init__(self, codes: torch.Tensor, scale: torch.Tensor) -> None:
        self._codes, self._scale = codes.contiguous(), scale.float().contiguous()
        self.out_features, self.in_features = codes.shape

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        x16 = x.bfloat16()
        if self.in_features % _MULTIPLE == 0 and 0 < x.shape[0] <= _KERNEL_TOKENS and x16.is_contiguous():
            one = torch.ones(self.out_features, dtype=torch.bfloat16)
            return torch.ops.aten._weight_int8pack_mm(x16, self._codes, one).float().mul_(self._scale)
        step = max(1, _CHUNK // self.in_features)
        parts = [F.linear(x16, rows.bfloat16()) for rows in self._codes.split(step)]
        return torch.cat(parts, dim=-1).float().mul_(self._scale)

    def nbytes(self) -> int:
        return self._codes.nbytes + self._scale.nbytes

    def twin(self) -> torch.Tensor:
        return self._codes.float() * self._scale[:, None]
