"""What every block format of ours comes down to: whole-number codes, with a scale and perhaps a minimum per group.

    value = (code - offset) * scale + minimum        (float32: one rounding for the product, one for the sum)

Here are that form, its decoding to float32 and its bits and bytes; the layouts are in `decode`, `decode_k`, `decode_iq`
and `legacy`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Codes:
    """Some blocks: codes uint8 (blocks, groups, group size); scale and minimum float32 (blocks, groups).

    `offset` is what is taken off each code; code - offset fits in int8.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    offset: int = 0
    minimum: torch.Tensor | None = None

    def decode(self, out: torch.Tensor) -> None:
        """Write the values to `out`, float32 (blocks, elements)."""
        signed = (self.codes - self.offset).view(torch.int8) if self.offset else self.codes  # uint8 wraps around
        values = out.view(self.codes.shape)
        values.copy_(signed)
        values *= self.scale[..., None]
        if self.minimum is not None:
            values += self.minimum[..., None]


def halves(pairs: torch.Tensor) -> torch.Tensor:
    """(..., 2 n) bytes -> (..., n) float32 of the float16 they spell."""
    # A clone in one piece: a slice may begin at an odd byte, where no wider view can be made.
    return pairs.clone(memory_format=torch.contiguous_format).view(torch.float16).float()


def singles(quads: torch.Tensor) -> torch.Tensor:
    """(..., 4 n) bytes -> (..., n) float32 that they spell."""
    return quads.clone(memory_format=torch.contiguous_format).view(torch.float32)


def nibbles(packed: torch.Tensor) -> torch.Tensor:
    """(..., n) bytes -> (..., 2 n) values 0..15: the low halves of all of them, then the high halves."""
    whole = packed.contiguous()  # twice as fast as taking sixteen bytes here and sixteen there, twice
    return torch.cat([whole & 15, whole >> 4], dim=-1)


def bits(packed: torch.Tensor, value: int) -> torch.Tensor:
    """(..., n) bytes -> (..., 8 n): `value` where a bit is set, lowest bit first, else 0."""
    byte, bit = torch.arange(256, device=packed.device), torch.arange(8, device=packed.device)
    spread = (byte[:, None] >> bit & 1).to(torch.uint8) * value
    words = spread.view(torch.int64).view(256)  # eight bytes at once
    return words[packed.int()].view(torch.uint8)
