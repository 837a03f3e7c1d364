"""Storage formats: decoding against the `gguf` package, packed products against float64, sizes to the byte."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize as reference_dequantize
from gguf.quants import quantize as reference_quantize

from backend.checkpoint.open import open_checkpoint
from backend.model.config import ModelConfig
from backend.placement.load import load_model
from backend.placement.plan import plan, weight_bytes
from backend.presets import WEIGHTS, Preset
from backend.weights.blocks import BY_GGML_ID, BY_NAME, FORMATS, OTHER_GGML_NAMES, Q4_0, Q4_1, Q8_0, BlockFormat
from backend.weights.decode import dequantize
from backend.weights.int4 import Int4Linear, can_pack
from backend.weights.linear import BlockLinear, Embedding, Linear, PlainLinear, SplitLinear

BLOCKS = [Q4_0, Q4_1, Q8_0]
EVERY = pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
PACKED = pytest.mark.parametrize("fmt", BLOCKS, ids=lambda fmt: fmt.name)
BF16_STEP = 2.0**-8  # rounding to 8 significant bits: at most half of 2^-7, relative


def kind(fmt: BlockFormat) -> GGMLQuantizationType:
    return GGMLQuantizationType(fmt.ggml_id)


def random_blocks(fmt: BlockFormat, count: int, seed: int = 0) -> np.ndarray:
    """uint8 (count, bytes): any bytes at all, but scales (and plain values) that are finite numbers."""
    random = np.random.default_rng(seed)
    raw = random.integers(0, 256, (count, fmt.bytes), dtype=np.uint8)
    halves = {"Q4_0": 1, "Q4_1": 2, "Q8_0": 1}.get(fmt.name, 0)
    if halves:
        # Every finite float16: sign and fraction as they are, the exponent below the one of infinity.
        scales = raw[:, : 2 * halves].view(np.uint16)
        scales[(scales & 0x7C00) == 0x7C00] ^= 0x4000
        return raw
    whole = raw.view({"F32": np.uint32, "F16": np.uint16, "BF16": np.uint16}[fmt.name])
    top = {"F32": 0x7F800000, "F16": 0x7C00, "BF16": 0x7F80}[fmt.name]
    whole[(whole & top) == top] ^= {"F32": 0x40000000, "F16": 0x4000, "BF16": 0x4000}[fmt.name]
    return raw


def model_rows(fmt: BlockFormat, rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Rows as a quantiser would write them, of weights of the usual size."""
    values = (np.random.default_rng(seed).standard_normal((rows, columns)) * 0.1).astype(np.float32)
    return torch.from_numpy(reference_quantize(values, kind(fmt)).view(np.uint8).reshape(rows, -1).copy())


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
    assert fmt.row_bytes(96) == 3 * fmt.bytes
    with pytest.raises(ValueError, match=f"33.*{fmt.name}"):
        fmt.row_bytes(33)


# decoding ---------------------------------------------------------------------------------------------------------


@EVERY
def test_a_thousand_random_blocks_to_the_bit(fmt: BlockFormat) -> None:
    raw = random_blocks(fmt, 1000)
    expected = reference_dequantize(raw, kind(fmt)).astype(np.float32)
    found = dequantize(torch.from_numpy(raw), fmt)
    assert found.dtype == torch.float32
    assert found.shape == (1000, fmt.elements)
    assert np.isfinite(expected).all()
    assert np.array_equal(found.numpy(), expected.reshape(1000, -1))


@EVERY
@pytest.mark.parametrize("shift", [1, 2, 3, 5, 34])
def test_bytes_that_begin_anywhere(fmt: BlockFormat, shift: int) -> None:
    raw = random_blocks(fmt, 64, seed=shift)
    memory = torch.zeros(shift + raw.size, dtype=torch.uint8)
    memory[shift:] = torch.from_numpy(raw).flatten()
    rows = memory[shift:].view(8, -1)  # rows of 8 blocks
    assert rows.storage_offset() == shift
    expected = reference_dequantize(raw.reshape(8, -1), kind(fmt)).astype(np.float32)
    assert np.array_equal(dequantize(rows, fmt).numpy(), expected)
    assert np.array_equal(dequantize(rows[3:5], fmt).numpy(), expected[3:5])
    assert np.array_equal(dequantize(rows[::2], fmt).numpy(), expected[::2]), "rows that are not side by side"


def test_decoding_gives_a_copy() -> None:
    raw = torch.zeros(1, 8, dtype=torch.uint8)
    decoded = dequantize(raw, BY_NAME["F32"])
    decoded += 1
    assert not raw.any()


# the packed 4-bit product -------------------------------------------------------------------------------------------


def parameters(raw: torch.Tensor, fmt: BlockFormat) -> tuple[np.ndarray, np.ndarray]:
    """|scale| and |zero| of each value's block as the packed kernel keeps them, float64 (rows, columns)."""
    blocks = raw.numpy().reshape(raw.shape[0], -1, fmt.bytes)
    scale = blocks[..., 0:2].copy().view(np.float16)[..., 0].astype(np.float64)
    zero = np.zeros_like(scale)
    if fmt is Q4_1:
        zero = blocks[..., 2:4].copy().view(np.float16)[..., 0].astype(np.float64) + 8 * scale
    return np.repeat(abs(scale), 32, axis=1), np.repeat(abs(zero), 32, axis=1)


@PACKED
@pytest.mark.parametrize("columns", [32, 64, 96, 160])
def test_packing_keeps_the_codes_and_rounds_scales_to_bf16(fmt: BlockFormat, columns: int) -> None:
    raw = model_rows(fmt, 48, columns, seed=columns)
    twin = Int4Linear.from_blocks(raw, fmt).twin().double().numpy()
    exact = reference_dequantize(raw.numpy(), kind(fmt)).astype(np.float64)
    scale, zero = parameters(raw, fmt)
    # value = (code - 8) scale + zero, codes 0..15, or code * scale with codes up to 128: scale and zero are rounded to
    # bfloat16 once, and so is each plane's product on its way out of the kernel.
    codes = 128 if fmt is Q8_0 else 8
    rounded = codes * scale + zero
    planes = abs(exact) + (8 * 2 * scale if fmt is Q8_0 else 0)
    bound = BF16_STEP * (rounded + planes) + 1e-12
    assert twin.shape == exact.shape
    assert (abs(twin - exact) <= bound).all()
    assert abs(twin - exact).max() > 0, "the bound is about something"


@PACKED
@pytest.mark.parametrize("columns", [32, 96, 256])
@pytest.mark.parametrize("tokens", [1, 2, 7, 33])
def test_packed_products(fmt: BlockFormat, tokens: int, columns: int) -> None:
    raw = model_rows(fmt, 32, columns, seed=tokens)
    linear = Int4Linear.from_blocks(raw, fmt)
    x = torch.from_numpy(np.random.default_rng(tokens).standard_normal((tokens, columns)).astype(np.float32))
    found = linear(x)
    assert found.dtype == torch.float32
    assert found.shape == (tokens, 32)
    check_against(found, x.bfloat16().double(), linear.twin().double(), raw, fmt)
    # And against the file's own values: what bfloat16 may cost in all.
    check_against(found, x.double(), torch.from_numpy(reference_dequantize(raw.numpy(), kind(fmt))).double(), raw, fmt)


def check_against(
    found: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, raw: torch.Tensor, fmt: BlockFormat
) -> None:
    """Each factor is off by at most a bfloat16 rounding, and so is each plane's sum: bounded by what is added up."""
    exact = x @ weight.T
    scale, zero = (torch.from_numpy(part) for part in parameters(raw, fmt))
    # Largest size a product's weight may have inside of a plane; Q8_0's planes are 16 (h - 8) d and (l - 8) d + 8 d.
    weights = weight.abs() + zero + (16 if fmt is Q8_0 else 8) * scale
    bound = 4 * BF16_STEP * (x.abs() @ weights.T) + 1e-6
    assert ((found.double() - exact).abs() <= bound).all()
    # Errors of many roundings mostly cancel: on average the result is far inside of the bound.
    assert (found.double() - exact).abs().mean() < 0.25 * bound.mean()


def test_packed_products_of_numbers_that_need_no_rounding_are_exact() -> None:
    # Scales that are powers of two, and small whole numbers: bfloat16 holds all of it.
    random = np.random.default_rng(0)
    for fmt in BLOCKS:
        raw = random_blocks(fmt, 16 * 2, seed=9).reshape(16, -1).copy()
        blocks = raw.reshape(16, 2, fmt.bytes)
        blocks[..., 0:2] = np.array([0.5], np.float16).view(np.uint8)
        if fmt is Q4_1:
            blocks[..., 2:4] = np.array([-4.0], np.float16).view(np.uint8)
        if fmt is Q8_0:
            blocks[..., 2:] = random.integers(-8, 8, (16, 2, 32)).astype(np.int8).view(np.uint8)
        one_hot = torch.eye(64)[:3] * 2
        expected = one_hot.numpy() @ reference_dequantize(raw, kind(fmt)).T
        assert np.array_equal(Int4Linear.from_blocks(torch.from_numpy(raw), fmt)(one_hot).numpy(), expected)


def test_what_can_be_packed() -> None:
    assert [can_pack(fmt, 32) for fmt in FORMATS] == [fmt in BLOCKS for fmt in FORMATS]
    assert [can_pack(Q4_0, rows) for rows in (8, 15, 16, 17, 576)] == [False, False, True, False, True]
    with pytest.raises(ValueError, match="F16"):
        Int4Linear.from_blocks(torch.zeros(16, 64, dtype=torch.uint8), BY_NAME["F16"])


# the others -------------------------------------------------------------------------------------------------------


@PACKED
def test_block_linear(fmt: BlockFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = model_rows(fmt, 37, 96)
    exact = reference_dequantize(raw.numpy(), kind(fmt)).astype(np.float64)
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(1))
    linear = BlockLinear(raw, fmt)
    raw.zero_()  # its own copy
    for chunk in (1 << 22, 96 * 10, 1):
        monkeypatch.setattr(BlockLinear, "CHUNK_ELEMENTS", chunk)
        np.testing.assert_allclose(linear(x).numpy(), x.double().numpy() @ exact.T, rtol=1e-5, atol=1e-5)
    assert np.array_equal(linear.twin().numpy(), exact.astype(np.float32))
    assert (linear.out_features, linear.in_features, linear.nbytes()) == (37, 96, 37 * 3 * fmt.bytes)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03), (torch.float16, 4e-3)])
def test_plain_linear(dtype: torch.dtype, tolerance: float) -> None:
    random = torch.Generator().manual_seed(2)
    weight, x = torch.randn(7, 33, generator=random).to(dtype), torch.randn(3, 33, generator=random)
    linear = PlainLinear(weight)
    exact = x.to(dtype).double() @ weight.double().T
    assert ((linear(x).double() - exact).abs() <= tolerance * (exact.abs() + 1)).all()
    assert linear(x).dtype == torch.float32
    assert torch.equal(linear.twin(), weight.float())
    assert (linear.out_features, linear.in_features, linear.nbytes()) == (7, 33, 7 * 33 * weight.itemsize)


def test_split_linear() -> None:
    parts: list[Linear] = [
        BlockLinear(model_rows(Q8_0, 5, 64), Q8_0),
        Int4Linear.from_blocks(model_rows(Q4_0, 16, 64), Q4_0),
        PlainLinear(torch.randn(3, 64, generator=torch.Generator().manual_seed(3))),
    ]
    linear = SplitLinear(parts)
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(4))
    out = linear(x)
    assert out.shape == (4, 24)
    for part, columns in zip(parts, (slice(0, 5), slice(5, 21), slice(21, 24))):
        assert torch.equal(out[:, columns], part(x))
        assert torch.equal(linear.twin()[columns], part.twin())
    assert (linear.out_features, linear.in_features) == (24, 64)
    assert linear.nbytes() == 5 * 68 + 16 * 2 * 20 + 3 * 64 * 4


@EVERY
def test_embedding(fmt: BlockFormat) -> None:
    raw = random_blocks(fmt, 20 * 3).reshape(20, -1)
    table = Embedding(torch.from_numpy(raw.copy()), fmt)
    ids = [19, 0, 7, 7]
    expected = reference_dequantize(raw, kind(fmt)).astype(np.float32)[ids]
    assert np.array_equal(table(torch.tensor(ids)).numpy(), expected)
    assert table.nbytes() == raw.size


# sizes ------------------------------------------------------------------------------------------------------------

MODELS: dict[str, dict[str, object]] = {
    **{fmt.name: {"weights": fmt.name} for fmt in FORMATS},
    "rope factors": {"weights": "Q4_0", "rope_freqs": True},
    "mixed in one product": {
        "weights": "Q4_0",
        "formats": {"blk.0.attn_v.weight": "Q8_0", "blk.1.ffn_up.weight": "F16"},
    },
    "some rows do not fit the kernel": {"weights": "Q4_0", "n_heads": 5, "n_kv_heads": 1, "head_dim": 8, "dim": 96},
    "norms in f16": {"weights": "Q8_0", "formats": {"blk.0.attn_norm.weight": "F16", "output_norm.weight": "F16"}},
    "the starter's mix": {"weights": "Q4_1", "formats": {"token_embd.weight": "Q8_0"}},
}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS.keys())
def test_the_plan_knows_the_bytes_of_every_model(
    tiny_path: Callable[..., Path], options: dict[str, object], tied: bool
) -> None:
    if options.get("head_dim") == 8:
        options = options | {"formats": {f"blk.{n}.attn_output.weight": "F32" for n in (0, 1)}}  # 40 columns
    checkpoint = open_checkpoint(tiny_path(tied=tied, **options))
    for weights in WEIGHTS:
        loaded = load_model(checkpoint, weights, "tiny")
        assert weight_bytes(weights, checkpoint.config, checkpoint.tensors) == loaded.weight_bytes
        assert held_bytes(loaded.model) == loaded.weight_bytes


def held_bytes(model: object) -> int:
    """Bytes of all tensors that can be reached from a model, each memory counted once, apart from the rope's table."""
    storages: dict[int, int] = {}
    seen: set[int] = set()

    def walk(value: object) -> None:
        if id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, list | tuple):
            for part in value:
                walk(part)
        elif hasattr(value, "__dict__"):
            for name, part in vars(value).items():
                if name != "rope":
                    walk(part)

    walk(model)
    config = model.config  # type: ignore[attr-defined]
    factors = 4 * config.head_dim // 2 if model.rope._frequencies.sum() < unscaled(config) else 0  # type: ignore[attr-defined]
    return sum(storages.values()) + factors


def unscaled(config: ModelConfig) -> float:
    return sum(config.rope_theta ** (-2 * i / config.head_dim) for i in range(config.head_dim // 2)) - 1e-6


@pytest.mark.parametrize(
    ("preset", "context", "kv_type", "kv_tokens"),
    [
        (Preset("a", "x"), 256, "bf16", 512 + 64),
        (Preset("a", "x", weights="f32"), 256, "f32", 512 + 64),
        (Preset("a", "x", kv_cache="f16", context=64), 64, "f16", 128 + 64),
        (Preset("a", "x", kv_tokens=64), 256, "bf16", 256 + 64),
        (Preset("a", "x", kv_tokens=1000), 256, "bf16", 1024 + 64),
    ],
)
def test_the_cache_in_the_plan(
    tiny_path: Callable[..., Path], preset: Preset, context: int, kv_type: str, kv_tokens: int
) -> None:
    checkpoint = open_checkpoint(tiny_path())
    found = plan(preset, checkpoint.config, checkpoint.tensors)
    assert (found.context, found.kv_type, found.kv_blocks) == (context, kv_type, kv_tokens // 32)
    value = 4 if kv_type == "f32" else 2
    assert found.kv_bytes == kv_tokens * 2 * 2 * 2 * 16 * value  # keys and values, layers, heads, head_dim
    assert found.total_bytes == found.kv_bytes + found.weight_bytes
