"""Every type of today's files: sizes and decoding, against the `gguf` package."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize as reference_dequantize

from backend.weights.blocks import BY_GGML_ID, BY_NAME, F64, FORMATS, OTHER_GGML_NAMES, Q4_K, BlockFormat
from backend.weights.decode import dequantize

EVERY = pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
PACKED = pytest.mark.parametrize("fmt", [fmt for fmt in FORMATS if not fmt.plain], ids=lambda fmt: fmt.name)

# Where in a block the exponents are that could spell infinity: (byte, bits of that byte to clear when all are set).
# Little-endian float16: its second byte. IQ1_M's d is spread over the top nibbles of four numbers; MXFP4's is a byte.
HALF = 0x7C
EXPONENTS: dict[str, tuple[tuple[int, int], ...]] = {
    "F32": ((3, 0x7F),), "F16": ((1, HALF),), "BF16": ((1, 0x7F),), "F64": ((7, 0x7F),),
    "Q4_0": ((1, HALF),), "Q4_1": ((1, HALF), (3, HALF)), "Q5_0": ((1, HALF),), "Q5_1": ((1, HALF), (3, HALF)),
    "Q8_0": ((1, HALF),), "Q2_K": ((81, HALF), (83, HALF)), "Q3_K": ((109, HALF),),
    "Q4_K": ((1, HALF), (3, HALF)), "Q5_K": ((1, HALF), (3, HALF)), "Q6_K": ((209, HALF),),
    "IQ4_NL": ((1, HALF),), "IQ4_XS": ((1, HALF),), "IQ2_XXS": ((1, HALF),), "IQ2_XS": ((1, HALF),),
    "IQ3_XXS": ((1, HALF),), "IQ1_S": ((1, HALF),), "IQ3_S": ((1, HALF),), "IQ2_S": ((1, HALF),),
    "IQ1_M": ((55, 0x70),), "TQ1_0": ((53, HALF),), "TQ2_0": ((65, HALF),), "MXFP4": ((0, 0xF0),), "NVFP4": (),
}  # fmt: skip


def kind(fmt: BlockFormat) -> GGMLQuantizationType:
    return GGMLQuantizationType(fmt.ggml_id)


def random_blocks(fmt: BlockFormat, count: int, seed: int = 0) -> np.ndarray:
    """uint8 (count, bytes): any bytes at all, but scales (and plain values) that are finite numbers."""
    raw = np.random.default_rng(seed).integers(0, 256, (count, fmt.bytes), dtype=np.uint8)
    for at, bits in EXPONENTS[fmt.name]:
        top = raw[:, at]
        top[(top & bits) == bits] ^= 0x40
    return raw


def reference(raw: np.ndarray, fmt: BlockFormat) -> np.ndarray:
    """What the `gguf` package makes of the bytes, float32; it leaves float64 out."""
    if fmt is F64:
        with np.errstate(over="ignore"):
            return raw.view(np.float64).astype(np.float32)
    return reference_dequantize(raw, kind(fmt)).astype(np.float32)


# facts ------------------------------------------------------------------------------------------------------------


@EVERY
def test_sizes_are_those_of_the_gguf_package(fmt: BlockFormat) -> None:
    from gguf import GGML_QUANT_SIZES

    assert (fmt.elements, fmt.bytes) == GGML_QUANT_SIZES[kind(fmt)]
    assert kind(fmt).name == fmt.name
    assert BY_GGML_ID[fmt.ggml_id] is BY_NAME[fmt.name] is fmt


def test_the_names_of_other_ids_are_right() -> None:
    for number, name in OTHER_GGML_NAMES.items():
        assert GGMLQuantizationType(number).name == name
        assert number not in BY_GGML_ID


@PACKED
def test_a_row_is_whole_blocks(fmt: BlockFormat) -> None:
    assert fmt.row_bytes(3 * fmt.elements) == 3 * fmt.bytes
    with pytest.raises(ValueError, match=f"{fmt.elements + 1}.*{fmt.name}"):
        fmt.row_bytes(fmt.elements + 1)


def test_every_type_the_package_decodes_can_be_opened() -> None:
    missing = {number.name for number in GGMLQuantizationType} - set(BY_NAME)
    assert missing == set(OTHER_GGML_NAMES.values())
    for name in missing:
        with pytest.raises(NotImplementedError):
            reference_dequantize(np.zeros((1, 1024), np.uint8), GGMLQuantizationType[name])


# decoding ---------------------------------------------------------------------------------------------------------


@EVERY
def test_a_thousand_random_blocks_to_the_bit(fmt: BlockFormat) -> None:
    raw = random_blocks(fmt, 1000)
    expected = reference(raw, fmt)
    found = dequantize(torch.from_numpy(raw), fmt)
    assert found.dtype == torch.float32
    assert found.shape == (1000, fmt.elements)
    assert fmt is F64 or np.isfinite(expected).all()
    assert np.array_equal(found.numpy().view(np.uint32), expected.reshape(1000, -1).view(np.uint32))


@EVERY
@pytest.mark.parametrize("shift", [1, 2, 3, 5, 34])
def test_bytes_that_begin_anywhere(fmt: BlockFormat, shift: int) -> None:
    raw = random_blocks(fmt, 64, seed=shift)
    memory = torch.zeros(shift + raw.size, dtype=torch.uint8)
    memory[shift:] = torch.from_numpy(raw).flatten()
    rows = memory[shift:].view(8, -1)  # rows of 8 blocks
    assert rows.storage_offset() == shift
    expected = reference(raw.reshape(8, -1), fmt)
    assert np.array_equal(dequantize(rows, fmt).numpy(), expected)
    assert np.array_equal(dequantize(rows[3:5], fmt).numpy(), expected[3:5])
    assert np.array_equal(dequantize(rows[::2], fmt).numpy(), expected[::2]), "rows that are not side by side"


def test_decoding_gives_a_copy() -> None:
    raw = torch.zeros(1, 8, dtype=torch.uint8)
    decoded = dequantize(raw, BY_NAME["F32"])
    decoded += 1
    assert not raw.any()


def test_more_than_one_slice_of_work() -> None:
    """Long matrices are decoded in slices: seams, a last one that is short, and nothing at all."""
    raw = random_blocks(Q4_K, 2 * 1024 + 7).reshape(5, -1)[:, : 400 * Q4_K.bytes]
    rows = torch.from_numpy(np.ascontiguousarray(raw))
    assert np.array_equal(dequantize(rows, Q4_K).numpy(), reference(rows.numpy(), Q4_K))
    one = torch.from_numpy(random_blocks(Q4_K, 3000).reshape(1, -1))
    assert np.array_equal(dequantize(one, Q4_K).numpy(), reference(one.numpy(), Q4_K))
    assert dequantize(one[:0], Q4_K).shape == (0, 3000 * 256)
