"""The blocks of old ggml files, against a decoding value by value in plain Python."""

from __future__ import annotations

import struct
from collections.abc import Callable

import numpy as np
import pytest
import torch

from backend.weights.blocks import BY_GGML_ID, FORMATS, BlockFormat
from backend.weights.decode import dequantize
from backend.weights.legacy import LEGACY, legacy_format

Decode = Callable[[bytes], list[float]]


def interleaved(packed: bytes) -> list[int]:
    return [packed[i // 2] >> (4 * (i % 2)) & 15 for i in range(2 * len(packed))]


def halved(packed: bytes) -> list[int]:
    n = len(packed)
    return [packed[i % n] >> (4 * (i // n)) & 15 for i in range(2 * n)]


def four_bit(head: str, offset: int, order: Callable[[bytes], list[int]]) -> Decode:
    def decode(block: bytes) -> list[float]:
        size = struct.calcsize(head)
        d, m = (*struct.unpack(head, block[:size]), 0.0)[:2]
        return [(q - offset) * d + m for q in order(block[size:])]

    return decode


def five_bit(head: str, offset: int) -> Decode:
    def decode(block: bytes) -> list[float]:
        size = struct.calcsize(head)
        d, m = (*struct.unpack(head, block[:size]), 0.0)[:2]
        (high,) = struct.unpack("<I", block[size : size + 4])
        low = interleaved(block[size + 4 :])
        return [((low[i] | (high >> i & 1) << 4) - offset) * d + m for i in range(32)]

    return decode


def eight_bit(block: bytes) -> list[float]:
    d, *codes = struct.unpack("<f32b", block)
    return [code * d for code in codes]


# layout, type id -> bytes of the scales' fields (struct), decoding
BY_HAND: dict[tuple[str, int], tuple[str, Decode]] = {
    ("v1", 2): ("<f", four_bit("<f", 8, interleaved)),
    ("v1", 3): ("<ff", four_bit("<ff", 0, interleaved)),
    ("v1", 4): ("<e", four_bit("<e", 8, interleaved)),
    ("v1", 5): ("<ee", four_bit("<ee", 0, interleaved)),
    ("v1", 6): ("<e", five_bit("<e", 16)),
    ("v1", 7): ("<ee", five_bit("<ee", 0)),
    ("v1", 8): ("<f", eight_bit),
    ("v2", 2): ("<f", four_bit("<f", 8, halved)),
    ("v2", 3): ("<ff", four_bit("<ff", 0, halved)),
    ("v2", 8): ("<f", eight_bit),
}
SIZES = {2: (32, 20), 3: (32, 24), 4: (16, 10), 5: (16, 12), 6: (32, 22), 7: (32, 24), 8: (32, 36)}


@pytest.mark.parametrize(("layout", "number"), BY_HAND, ids=str)
def test_old_blocks_by_hand(layout: str, number: int) -> None:
    fmt = legacy_format(layout, number)
    assert fmt is not None
    assert (fmt.elements, fmt.bytes) == SIZES[number]
    assert fmt.ggml_id is None
    head, decode = BY_HAND[layout, number]
    random = np.random.default_rng(number)
    blocks = [
        struct.pack(head, *random.normal(size=len(head) - 1)) + random.bytes(fmt.bytes - struct.calcsize(head))
        for _ in range(60)
    ]
    exact = np.array([decode(block) for block in blocks])  # float64
    # A row may begin at any byte of the file.
    for shift in (0, 1, 2):
        raw = torch.frombuffer(bytearray(shift) + bytearray(b"".join(blocks)), dtype=torch.uint8)[shift:].view(4, -1)
        found = dequantize(raw, fmt)
        assert found.dtype == torch.float32
        assert found.shape == (4, 15 * fmt.elements)
        np.testing.assert_allclose(found.numpy().reshape(exact.shape), exact, rtol=2e-7, atol=5e-7)


def test_what_existed_when() -> None:
    names = {
        layout: [fmt and fmt.name.split()[0] for fmt in (legacy_format(layout, n) for n in range(16))]
        for layout in ("v1", "v2", "v3")
    }
    fives = ["Q5_0", "Q5_1", "Q8_0"]
    assert names["v1"] == ["F32", "F16", "Q4_0", "Q4_1", "Q4_2", "Q4_3", *fives, *[None] * 7]
    assert names["v2"] == ["F32", "F16", "Q4_0", "Q4_1", None, None, *fives, *[None] * 7]
    k_types = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
    assert names["v3"] == ["F32", "F16", "Q4_0", "Q4_1", None, None, *fives, None, *k_types, None]
    for number in range(64):
        assert legacy_format("v3", number) in (None, BY_GGML_ID.get(number)), "v3 has today's blocks"
        # Nibbles in half order and float16 scales: from v2 on for the types of five bits.
        if number in (6, 7):
            assert legacy_format("v2", number) is BY_GGML_ID[number]


def test_formats_are_told_apart() -> None:
    every: list[BlockFormat] = [*FORMATS, *LEGACY]
    assert len({fmt.name for fmt in every}) == len(set(every)) == len(every)
