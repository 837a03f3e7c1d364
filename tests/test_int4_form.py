"""`weights: int4`: 4-bit codes that a file has are kept, anything else is quantised; and the open layout of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from backend.checkpoint.open import open_checkpoint
from backend.kernels.cpu import quantise
from backend.placement.linears import build
from backend.weights import int4_grouped
from backend.weights.blocks import Q4_0, Q4_1, Q4_K, Q8_0, BlockFormat
from backend.weights.bnb import Codebook4
from backend.weights.decode import dequantize
from backend.weights.encode import quantize
from backend.weights.grouped import AwqCodes, Grouped, Grouping, WordCodes
from backend.weights.int4_grouped import GroupedInt4Linear
from backend.weights.linear import PlainLinear
from backend.weights.nf4 import NF4, CodebookLinear
from backend.weights.nf4 import quantise as quantise_nf4
from backend.weights.planes import block_planes
from backend.weights.stored import Blocks, Plain, Stored
from tests.cpuvariants import VARIANTS, WITHOUT, choose
from tests.forward import Session


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def grouped(codes: str) -> Grouped:
    """64 rows, 256 columns, groups of 64; GPTQ words, with columns in groups of any order, or AWQ words."""
    generator = torch.Generator().manual_seed(1)
    scale, zero = (torch.rand(64, 4) * 0.01 + 0.01).half().float(), torch.randint(0, 16, (64, 4)).float()
    if codes == "AWQ":
        words = torch.randint(-(2**31), 2**31, (256, 8), generator=generator).int()
        return Grouped(AwqCodes(words), scale, zero, Grouping.even(256, 4, 64))
    words = torch.randint(-(2**31), 2**31, (32, 64), generator=generator).int()
    order = torch.randperm(256, generator=generator) // 64
    grouping = Grouping.listed(order, 4) if codes == "act-order" else Grouping.even(256, 4, 64)
    return Grouped(WordCodes(words, 4), scale, zero, grouping)


def sources() -> dict[str, Stored]:
    values = random(64, 256) * 0.1
    blocks = {fmt.name: Blocks(quantize(values, fmt), fmt) for fmt in (Q4_0, Q4_1, Q4_K)}
    return {**blocks, **{name: grouped(name) for name in ("GPTQ", "act-order", "AWQ")}}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", sources())
def test_4bit_codes_of_a_file_are_kept(name: str, device: str) -> None:
    """Exactly, but for scales: the open layout has 11 significant bits of them, torch's product on the CPU 8."""
    source = sources()[name]
    linear, original = build([source, source], "int4", device), build([source, source], "original", device)
    exact = torch.cat([source.float32(), source.float32()])
    assert torch.equal(linear.twin(), original.twin())
    assert linear.nbytes() == original.nbytes()
    if device != "cpu":
        assert isinstance(linear, GroupedInt4Linear)
        largest = exact.abs().amax(1, keepdim=True)
        assert bool(((linear.twin() - exact).abs() <= 2**-10 * largest).all())
    else:
        assert bool(((linear.twin() - exact).abs() <= 2**-6 * exact.abs().amax(1, keepdim=True)).all())
    x = random(5, 256, seed=2)
    expected = x.double() @ exact.double().T
    bound = 2**-6 * (x.double().abs() @ exact.double().abs().amax(1)[None].T.expand(128, 256).T)
    assert bool(((linear(x).double() - expected).abs() <= bound).all())
    copies = [tensor.clone() for tensor in linear.tensors()]
    assert torch.equal(linear.with_tensors(copies)(x), linear(x))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "Q8_0", "nf4"])
def test_anything_else_is_quantised_with_little_error(kind: str, device: str) -> None:
    values = random(64, 256) * 0.1
    packed, absmax = quantise_nf4(values)
    source: Stored = {
        "float32": Plain(values),
        "bfloat16": Plain(values.bfloat16()),
        "Q8_0": Blocks(quantize(values, Q8_0), Q8_0),
        "nf4": Codebook4(packed.flatten(), (64, 256), torch.tensor(NF4), absmax.flatten(), 64),
    }[kind]
    linear = build([source], "int4", device)
    assert linear.nbytes() * 8 <= 5.01 * values.numel(), "4 bits, and 32 for each 32"
    exact = source.float32()
    # Rounding to 16 steps between the ends of 32 normal numbers: about 8 percent; the search takes a tenth off.
    assert float((linear.twin() - exact).norm() / exact.norm()) < 0.074


def test_rows_that_are_no_whole_groups_become_bfloat16() -> None:
    values = random(32, 40)
    for weights in ("int4", "nf4"):
        linear = build([Plain(values)], weights)
        assert isinstance(linear, PlainLinear)
        assert torch.equal(linear.twin(), values.bfloat16().float())


# the quantiser ------------------------------------------------------------------------------------------------------


def hard_rows() -> torch.Tensor:
    values = random(40, 416) * 0.02  # 13 groups a row: no multiple of what is done side by side
    values[1] = 0
    values[2] *= 1e-6
    values[3] *= 1e6  # beyond what float16 scales hold
    values[4, ::32] = 50
    values[5] = -3
    values[6] += 5
    values[7] = 1
    return values


@pytest.mark.parametrize("way", [*VARIANTS, WITHOUT])
def test_the_compiled_search_finds_what_its_twin_finds(monkeypatch: pytest.MonkeyPatch, folder: Path, way: str) -> None:
    choose(monkeypatch, quantise, "quantise", way, folder)
    values = hard_rows()
    found, expected = int4_grouped.quantise(values), quantize(values, Q4_1)
    assert float((found == expected).double().mean()) > 0.999
    errors = [(dequantize(raw, Q4_1) - values).norm(dim=1) for raw in (found, expected)]
    assert bool((errors[0] <= 1.001 * errors[1] + 1e-12).all())
    by_gguf = gguf.quants.dequantize(found.numpy(), gguf.GGMLQuantizationType.Q4_1)
    np.testing.assert_array_equal(dequantize(found, Q4_1).numpy(), by_gguf)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_refused(bad: float) -> None:
    values = random(4, 64)
    values[2, 5] = bad
    with pytest.raises(ValueError, match="not finite"):
        int4_grouped.quantise(values)


# the open layout ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", [Q4_0, Q4_1, Q8_0], ids=lambda fmt: fmt.name)
def test_the_open_layout_is_what_its_description_says(fmt: BlockFormat) -> None:
    raw = quantize(random(6, 64) * 0.1, fmt)
    planes = block_planes(raw, fmt)
    assert planes is not None
    linear = GroupedInt4Linear.of_planes([planes])
    assert len(linear.planes) == fmt.planes
    total = np.zeros((6, 64))
    for plane in linear.planes:
        for row in range(6):
            for column in range(64):
                byte = int(plane.codes[row, column // 2])
                code = byte >> 4 if column % 2 else byte & 15
                total[row, column] += (code - 8) * float(plane.scale[row, column // 32]) + float(
                    plane.zero[row, column // 32]
                )
    np.testing.assert_allclose(linear.twin().numpy(), total, atol=1e-6)
    np.testing.assert_allclose(total, dequantize(raw, fmt).numpy(), atol=3e-3 * float(abs(total).max()))
    assert linear.nbytes() == sum(tensor.nbytes for tensor in linear.tensors()) == 6 * 64 * 5 // 8 * fmt.planes


# whole models -------------------------------------------------------------------------------------------------------


def test_code_books_of_a_file_are_kept() -> None:
    values = random(64, 256)
    packed, absmax = quantise_nf4(values)
    stored = Codebook4(packed.flatten(), (64, 256), torch.tensor(NF4), absmax.flatten(), 64)
    for weights in ("original", "nf4"):
        linear = build([stored, stored], weights)
        assert isinstance(linear, CodebookLinear)
        assert torch.equal(linear.packed, torch.cat([packed, packed]))
        assert torch.equal(linear.absmax, torch.cat([absmax, absmax]))
    mixed = build([stored, Plain(values)], "nf4")
    torch.testing.assert_close(mixed.twin(), torch.cat([stored.float32()] * 2))


@pytest.mark.parametrize(("weights", "bound"), [("int8", 0.03), ("llm-int8", 0.04), ("int4", 0.25), ("nf4", 0.35)])
def test_a_model_in_every_form_answers_nearly_as_in_float32(
    tiny_path: Callable[..., Path], weights: str, bound: float
) -> None:
    checkpoint, ids = open_checkpoint(tiny_path(weights="F32", tied=False, ffn_dim=128)), [5, 77, 130, 2, 9, 41]
    expected = Session(checkpoint, "f32").logits(ids)
    found = Session(checkpoint, weights).logits(ids)
    assert float((found - expected).norm() / expected.norm()) < bound
    assert not torch.equal(found, expected)
