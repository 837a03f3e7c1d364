"""Block layouts of old ggml files (ggml, ggmf, ggjt v1 and v2) that differ from today's. History: docs/formats.md.

* "v1": ggml, ggmf, ggjt v1. Nibbles are interleaved: byte j holds elements 2 j (low) and 2 j + 1 (high).
* "v2": ggjt v2. Nibbles in half order as today; Q4_0, Q4_1 and Q8_0 still have float32 scales.
* "v3": ggjt v3, today's blocks.

Source of the layouts: `ggml.c` of llama.cpp at 2023-04-26 (v1) and 2023-05-12 (v2).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from backend.weights.blocks import F16, F32, Q2_K, Q3_K, Q4_0, Q4_1, Q4_K, Q5_0, Q5_1, Q5_K, Q6_K, Q8_0, BlockFormat
from backend.weights.codes import Codes, bits, halves, nibbles, singles

V1_Q4_0 = BlockFormat("Q4_0 (v1)", planes=1, elements=32, bytes=20)
V1_Q4_1 = BlockFormat("Q4_1 (v1)", planes=1, elements=32, bytes=24)
V1_Q4_2 = BlockFormat("Q4_2 (v1)", planes=2, elements=16, bytes=10)
V1_Q4_3 = BlockFormat("Q4_3 (v1)", elements=16, bytes=12)
V1_Q5_0 = BlockFormat("Q5_0 (v1)", planes=2, elements=32, bytes=22)
V1_Q5_1 = BlockFormat("Q5_1 (v1)", planes=2, elements=32, bytes=24)
V2_Q4_0 = BlockFormat("Q4_0 (v2)", planes=1, elements=32, bytes=20)
V2_Q4_1 = BlockFormat("Q4_1 (v2)", planes=1, elements=32, bytes=24)
OLD_Q8_0 = BlockFormat("Q8_0 (before v3)", planes=2, elements=32, bytes=36)

LEGACY: tuple[BlockFormat, ...] = (
    V1_Q4_0, V1_Q4_1, V1_Q4_2, V1_Q4_3, V1_Q5_0, V1_Q5_1, V2_Q4_0, V2_Q4_1, OLD_Q8_0,
)  # fmt: skip
V1: dict[int, BlockFormat] = {
    0: F32, 1: F16, 2: V1_Q4_0, 3: V1_Q4_1, 4: V1_Q4_2, 5: V1_Q4_3, 6: V1_Q5_0, 7: V1_Q5_1, 8: OLD_Q8_0,
}  # fmt: skip
V2: dict[int, BlockFormat] = {0: F32, 1: F16, 2: V2_Q4_0, 3: V2_Q4_1, 6: Q5_0, 7: Q5_1, 8: OLD_Q8_0}
V3: dict[int, BlockFormat] = {
    0: F32, 1: F16, 2: Q4_0, 3: Q4_1, 6: Q5_0, 7: Q5_1, 8: Q8_0, 10: Q2_K, 11: Q3_K, 12: Q4_K, 13: Q5_K, 14: Q6_K,
}  # fmt: skip
LAYOUTS: dict[str, dict[int, BlockFormat]] = {"v1": V1, "v2": V2, "v3": V3}


def legacy_format(version: str, type_id: int) -> BlockFormat | None:
    """The format behind a tensor's type id in a file of layout "v1", "v2" or "v3"; None: there was no such type."""
    return LAYOUTS[version].get(type_id)


def _split_v1_q4_0(blocks: torch.Tensor) -> Codes:
    return Codes(_interleaved(blocks[:, 4:])[:, None], singles(blocks[:, :4]), offset=8)


def _split_v1_q4_1(blocks: torch.Tensor) -> Codes:
    scale = singles(blocks[:, :8])
    return Codes(_interleaved(blocks[:, 8:])[:, None], scale[:, :1], minimum=scale[:, 1:])


def _split_v1_q4_2(blocks: torch.Tensor) -> Codes:
    return Codes(_interleaved(blocks[:, 2:])[:, None], halves(blocks[:, :2]), offset=8)


def _split_v1_q4_3(blocks: torch.Tensor) -> Codes:
    scale = halves(blocks[:, :4])
    return Codes(_interleaved(blocks[:, 4:])[:, None], scale[:, :1], minimum=scale[:, 1:])


def _split_v1_q5_0(blocks: torch.Tensor) -> Codes:
    codes = _interleaved(blocks[:, 6:])
    codes |= bits(blocks[:, 2:6], 16)  # bit = number of the element, whatever the order of the nibbles
    return Codes(codes[:, None], halves(blocks[:, :2]), offset=16)


def _split_v1_q5_1(blocks: torch.Tensor) -> Codes:
    codes, scale = _interleaved(blocks[:, 8:]), halves(blocks[:, :4])
    codes |= bits(blocks[:, 4:8], 16)
    return Codes(codes[:, None], scale[:, :1], minimum=scale[:, 1:])


def _split_v2_q4_0(blocks: torch.Tensor) -> Codes:
    return Codes(nibbles(blocks[:, 4:])[:, None], singles(blocks[:, :4]), offset=8)


def _split_v2_q4_1(blocks: torch.Tensor) -> Codes:
    scale = singles(blocks[:, :8])
    return Codes(nibbles(blocks[:, 8:])[:, None], scale[:, :1], minimum=scale[:, 1:])


def _split_old_q8_0(blocks: torch.Tensor) -> Codes:
    return Codes((blocks[:, 4:] ^ 128)[:, None], singles(blocks[:, :4]), offset=128)


def _interleaved(packed: torch.Tensor) -> torch.Tensor:
    """(n, m) bytes -> (n, 2 m) values 0..15, the low and the high half of each byte side by side."""
    out = packed.new_empty(packed.shape[0], packed.shape[1], 2)
    torch.bitwise_and(packed, 15, out=out[..., 0])
    torch.bitwise_right_shift(packed, 4, out=out[..., 1])
    return out.flatten(1)


SPLIT_LEGACY: dict[BlockFormat, Callable[[torch.Tensor], Codes]] = {
    V1_Q4_0: _split_v1_q4_0, V1_Q4_1: _split_v1_q4_1, V1_Q4_2: _split_v1_q4_2, V1_Q4_3: _split_v1_q4_3,
    V1_Q5_0: _split_v1_q5_0, V1_Q5_1: _split_v1_q5_1, V2_Q4_0: _split_v2_q4_0, V2_Q4_1: _split_v2_q4_1,
    OLD_Q8_0: _split_old_q8_0,
}  # fmt: skip
