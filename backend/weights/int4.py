"""4-bit and 8-bit blocks of 32 through torch's packed 4-bit product on the CPU.

`aten::_weight_int4pack_mm_for_cpu` multiplies bfloat16 activations by 4-bit weights with one bfloat16 scale and zero
per group of 32: value = (quant - 8) * scale + zero. It is fast in bfloat16 only (its float32 and float16 forms are
scalar loops), so scales and zeros are rounded to bfloat16 here: 8 significant bits, as a bf16 copy of the weights has.
The 4-bit codes themselves are kept exactly.

* Q4_0: value = (q - 8) d            -> scale d, zero 0
* Q4_1: value = q d + m              -> scale d, zero m + 8 d
* Q8_0: value = q d, q = 16 h + l - 128 with h, l in 0..15, so two 4-bit products whose sum is exact in the codes:
        (h - 8) 16 d  +  ((l - 8) d + 8 d)
"""

from __future__ import annotations

import torch

from backend.weights.blocks import Q4_0, Q4_1, Q8_0, BlockFormat
from backend.weights.decode import split_q4_0, split_q4_1, split_q8_0

GROUP = 32
_ROW_TILE = 16  # the kernel's rows per tile


def can_pack(fmt: BlockFormat, rows: int) -> bool:
    """Whether a weight of this format and number of rows has an exact place in the packed kernel."""
    return fmt in (Q4_0, Q4_1, Q8_0) and rows % _ROW_TILE == 0


class Int4Linear:
    """y = x W^T with W as 4-bit codes, one or two planes of them."""

    def __init__(self, planes: list[tuple[torch.Tensor, torch.Tensor]], out_features: int, in_features: int) -> None:
        self._planes = planes  # (packed codes uint8, scales and zeros bfloat16 (groups, out, 2))
        self.out_features, self.in_features = out_features, in_features

    @classmethod
    def from_blocks(cls, raw: torch.Tensor, fmt: BlockFormat) -> Int4Linear:
        """Repack whole rows, uint8 (rows, bytes per row), of Q4_0, Q4_1 or Q8_0."""
        if fmt is Q4_0:
            scale, quants = split_q4_0(raw)
            planes = [_plane(quants, scale, torch.zeros_like(scale))]
        elif fmt is Q4_1:
            scale, minimum, quants = split_q4_1(raw)
            planes = [_plane(quants, scale, minimum + 8 * scale)]
        elif fmt is Q8_0:
            scale, signed = split_q8_0(raw)
            code = signed.view(torch.uint8) ^ 128  # q + 128
            # Round once, so that both planes use the same value and their sum stays q times one scale.
            scale = scale.bfloat16().float()
            planes = [_plane(code >> 4, 16 * scale, torch.zeros_like(scale)), _plane(code & 15, scale, 8 * scale)]
        else:
            raise ValueError(f"{fmt.name} has no exact place in the 4-bit kernel")
        return cls(planes, raw.shape[0], raw.shape[1] // fmt.bytes * fmt.elements)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        x16 = x.bfloat16()
        total = _multiply(x16, *self._planes[0])
        for plane in self._planes[1:]:
            total += _multiply(x16, *plane)
        return total

    def nbytes(self) -> int:
        return sum(codes.nbytes + scales.nbytes for codes, scales in self._planes)

    def twin(self) -> torch.Tensor:
        # The kernel's own layout is private to torch; multiplying the identity gives back the codes' values.
        eye = torch.eye(self.in_features, dtype=torch.bfloat16)
        return sum(_multiply(eye, *plane) for plane in self._planes).T.contiguous()  # type: ignore[union-attr]


def _plane(quants: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """quants (rows, groups, 32) 0..15, scale and zero float32 (rows, groups) -> the kernel's two tensors."""
    codes = torch.ops.aten._convert_weight_to_int4pack_for_cpu(quants.flatten(1).int(), 1)
    scales = torch.stack([scale, zero], dim=-1).transpose(0, 1).contiguous().bfloat16()  # (groups, rows, 2)
    return codes, scales


def _multiply(x16: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x16, codes, GROUP, scales).float()
