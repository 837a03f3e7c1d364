"""The Triton kernels against torch: in Triton's interpreter on the CPU (TRITON_INTERPRET=1), or on a GPU.

test_cuda_kernels.py and test_gpu.py run this file in a process of its own, because the interpreter has to be asked for
before Triton is imported. The interpreter cannot multiply bfloat16 matrices and cuts float32 off where a device rounds
it to bfloat16. So activations here are numbers that bfloat16 holds exactly, and weights are bfloat16 on a GPU only.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from backend.cache.int8 import quantised, values_of
from backend.kernels.cuda.available import Kernels, load
from backend.model import paged
from backend.model.attention import attention_twin
from backend.model.operations import add_norm, gated
from backend.model.rope import Rope
from backend.weights import llm_int8, nf4
from backend.weights.int4_grouped import GroupedInt4Linear, GroupedPlane

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return load()


@pytest.fixture(autouse=True)
def seeded_on_the_device() -> Iterator[None]:
    torch.manual_seed(0)
    torch.set_default_device(DEVICE)
    yield
    torch.set_default_device("cpu")


def agree(found: torch.Tensor, expected: torch.Tensor, rtol: float, atol: float) -> None:
    """Within these bounds where all is float32; on a GPU, weights are rounded to 8 bits for matrix units."""
    if INTERPRETED:
        torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)
    else:
        assert (found - expected).abs().max() <= 1e-2 * expected.abs().max()


def short(*shape: int) -> torch.Tensor:
    """Random float32 numbers that bfloat16 holds exactly."""
    return torch.randn(*shape).bfloat16().float()


def module(kernels: Kernels, tokens: int):
    return kernels.gemv if tokens <= kernels.gemv.MOST else kernels.skinny


@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rows", "columns"), [(40, 200), (16, 64), (3, 1500)])
def test_plain_weights(kernels, tokens, dtype, rows, columns):
    x, weight = short(tokens, columns), torch.randn(rows, columns).to(dtype)
    found = module(kernels, tokens).rows(x, weight)
    assert found.dtype == torch.float32
    agree(found, x.to(dtype).float() @ weight.float().T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", [1, 3, 5, 16])
@pytest.mark.parametrize(("rows", "columns"), [(40, 200), (5, 2100)])
def test_int8_by_row(kernels, tokens, rows, columns):
    x, codes, scale = short(tokens, columns), torch.randint(-127, 128, (rows, columns)).to(torch.int8), torch.rand(rows)
    found = module(kernels, tokens).rows(x, codes, scale)
    agree(found, x @ (codes.float() * scale[:, None]).T, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 16])
@pytest.mark.parametrize(("rows", "columns", "group"), [(20, 256, 32), (7, 384, 128), (33, 96, 16), (4, 5120, 64)])
def test_grouped_int4(kernels, tokens, rows, columns, group):
    codes = torch.randint(0, 256, (rows, columns // 2)).to(torch.uint8)
    scale, zero = torch.rand(rows, columns // group).half(), torch.randn(rows, columns // group).half()
    x = short(tokens, columns)
    twin = GroupedInt4Linear([GroupedPlane(codes, scale, zero)]).twin()
    found = module(kernels, tokens).grouped4(x, codes, scale, zero)
    agree(found, x @ twin.T, rtol=1e-4, atol=2e-2)
    dense = kernels.dense.decode(codes, scale, zero, None, torch.float32)
    torch.testing.assert_close(dense, twin, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 16])
@pytest.mark.parametrize(("rows", "columns"), [(20, 256), (5, 4160)])
def test_code_books(kernels, tokens, rows, columns):
    packed, absmax = (tensor.to(DEVICE) for tensor in nf4.quantise(torch.randn(rows, columns, device="cpu")))
    book = nf4.book_tensor(nf4.NF4, DEVICE)
    x, twin = short(tokens, columns), nf4.dequantise(packed, absmax, book)
    found = module(kernels, tokens).looked_up4(x, packed, absmax, book)
    agree(found, x @ twin.T, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(kernels.dense.decode(packed, absmax, None, book, torch.float32), twin)


@pytest.mark.parametrize("tokens", [1, 2, 3, 16])
@pytest.mark.parametrize("planted", [(), (3,), (0, 77, 199)])
def test_llm_int8(kernels, tokens, planted):
    x, codes, scale = torch.randn(tokens, 200), *llm_int8.quantise(torch.randn(40, 200))
    for column in planted:
        x[0, column] = 20.0 + column
    expected = llm_int8.product(x, codes, scale)
    found = kernels.outliers.llm_int8(x, codes, scale, llm_int8.THRESHOLD)
    # The second half of an outlier is cut off at 16 bits by the interpreter, hence not tighter.
    agree(found, expected, rtol=1e-4, atol=1e-4)
    if planted:
        nothing = kernels.outliers.llm_int8(x, codes, scale, float("inf"))
        assert not torch.allclose(nothing[0], expected[0], rtol=1e-3, atol=1e-3), "the outliers make a difference"


def test_llm_int8_rounds_halves_to_even_and_adds_exactly(kernels):
    columns = 2048  # 2048 * 127 * 127 does not fit the 24 bits of float32
    x = torch.full((1, columns), 5.0)
    x[0, 1::2] = 5.0 * 2.5 / 127  # 2.5 steps
    codes, scale = torch.full((16, columns), 127, dtype=torch.int8), torch.ones(16)
    whole = llm_int8.quantise_activations_twin(x)[0]
    expected = (whole.double() @ codes.double().T * (x.half().double().max() / 127)).float()
    torch.testing.assert_close(kernels.outliers.llm_int8(x, codes, scale, 6.0), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("tokens", [1, 2])
def test_what_is_no_number_stays_none(kernels, tokens, value):
    """The engine looks at the logits: a product must not lose a NaN on the way."""
    x = torch.randn(tokens, 64)
    x[0, 5] = value
    codes, scale = torch.randint(1, 128, (16, 64)).to(torch.int8), torch.rand(16) + 0.1
    results = [
        module(kernels, tokens).rows(x, codes, scale),
        kernels.outliers.llm_int8(x, codes, scale, 6.0),
        module(kernels, tokens).rows(x, torch.randn(16, 64)),
    ]
    for result in results:
        assert not torch.isfinite(result[0]).any()
    _, finite = kernels.between.greedy(torch.cat([x, torch.zeros(1, 64)]))
    assert finite.tolist() == [0] + [1] * tokens


@pytest.mark.parametrize("width", [64, 96, 1000])
@pytest.mark.parametrize("tokens", [1, 3])
def test_between_the_products(kernels, width, tokens):
    x, delta, weight = torch.randn(tokens, width), torch.randn(tokens, width), torch.randn(width)
    for added in (None, delta):
        for found, expected in zip(kernels.between.add_norm(x, added, weight, 1e-5), add_norm(x, added, weight, 1e-5)):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    both = torch.cat([x, delta], dim=1) * 4
    torch.testing.assert_close(kernels.between.gated(both), gated(both), rtol=1e-5, atol=1e-6)


def test_greedy_takes_the_lowest_of_equals(kernels):
    logits = torch.randn(4, 5000)
    logits[1, [4100, 4, 9]] = 50.0
    logits[2, :] = 1.0
    tokens, finite = kernels.between.greedy(logits)
    assert tokens.tolist() == [int(logits[0].argmax()), 4, 0, int(logits[3].argmax())]
    assert finite.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_turn_and_store(kernels, interleaved, dtype):
    tokens, heads, n_kv, head_dim = 3, 6, 2, 12  # 12: not a power of two
    rope = Rope(head_dim, 10000.0, interleaved=interleaved)
    turns = rope.turns(torch.tensor([0, 9, 4000]))
    x = torch.randn(tokens, heads + 2 * n_kv, head_dim)
    keys, values = (torch.full((n_kv, 50, head_dim), 7.0, dtype=dtype) for _ in range(2))
    slots = torch.tensor([4, 49, 0], dtype=torch.int32)
    pairs = torch.view_as_real(turns)
    query = kernels.paged.turn_and_store(x, pairs, slots, keys, values, heads, interleaved)
    turned = rope.apply(x[:, : heads + n_kv], turns)
    torch.testing.assert_close(query, turned[:, :heads], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(keys[:, slots.long()].transpose(0, 1), turned[:, heads:].to(dtype))
    torch.testing.assert_close(values[:, slots.long()].transpose(0, 1), x[:, heads + n_kv :].to(dtype))
    assert ((keys == 7).all(-1).sum(1) == 47).all(), "nothing else is written"


@pytest.mark.parametrize("interleaved", [True, False])
def test_turn_and_store_in_int8(kernels, interleaved):
    tokens, heads, n_kv, head_dim = 4, 6, 2, 12
    rope = Rope(head_dim, 10000.0, interleaved=interleaved)
    pairs = torch.view_as_real(rope.turns(torch.tensor([0, 9, 4000, 7])))
    x = torch.randn(tokens, heads + 2 * n_kv, head_dim)
    x[1], x[2, :, 5], x[3, :, 2] = 0.0, float("nan"), float("inf")
    slots = torch.tensor([4, 49, 0, 7], dtype=torch.int32)

    def stored(module):
        keys, values = (torch.full((n_kv, 50, head_dim), 7, dtype=torch.int8) for _ in range(2))
        scales = [torch.full((n_kv, 50), 0.5) for _ in range(2)]
        module.turn_and_store(x, pairs, slots, keys, values, heads, interleaved, *scales)
        return keys, values, *scales

    for found, expected in zip(stored(kernels.paged)[:2], stored(paged)[:2]):
        # A turn may round otherwise, and so tip a code that lies between two; no number, no code.
        assert (found[:, [4, 49]].int() - expected[:, [4, 49]].int()).abs().max() <= 1
        assert (found[:, 4] != expected[:, 4]).sum() <= 1
        assert ((found == 7).all(-1).sum(1) == 46).all(), "nothing else is written"
    for found, expected in zip(stored(kernels.paged)[2:], stored(paged)[2:]):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0, equal_nan=True)
        assert found[:, [0, 7]].isnan().all()


@pytest.mark.parametrize(
    ("heads", "n_kv", "head_dim", "dtype"),
    [
        (4, 4, 16, torch.float32), (6, 2, 64, torch.float16), (8, 1, 20, torch.bfloat16), (2, 2, 128, torch.bfloat16),
        (6, 2, 64, torch.int8), (8, 1, 20, torch.int8),
    ],
)  # fmt: skip
@pytest.mark.parametrize(("window", "programs"), [(None, 1), (None, 12), (1, 12), (40, 1), (40, 12)])
def test_attention_over_blocks(kernels, monkeypatch, heads, n_kv, head_dim, dtype, window, programs):
    monkeypatch.setattr(kernels.paged, "_FILL", programs)  # 1: a sequence is not split; otherwise fewer than on a GPU
    page, blocks = 32, 12
    lengths = [1, 33, 110]
    keys, values = (torch.randn(n_kv, blocks * page, head_dim) for _ in range(2))
    if dtype == torch.int8:
        (keys, one), (values, other) = quantised(keys), quantised(values)
        stored = keys, values, one, other
        keys, values = values_of(keys, one, torch.float32), values_of(values, other, torch.float32)
    else:
        keys, values = stored = keys.to(dtype), values.to(dtype)
    order = torch.randperm(blocks)
    table, taken = torch.zeros(3, 6, dtype=torch.int32), 0
    for row, length in enumerate(lengths):
        count = -(-length // page)
        table[row, :count] = order[taken : taken + count]
        taken += count
    query = short(3, heads, head_dim)
    pool, scales = stored[:2], stored[2:] or (None, None)
    whole = torch.tensor(lengths, dtype=torch.int32)
    found = kernels.paged.decode(query, *pool, table, whole, page, window, *scales)
    twin = paged.decode(query, *pool, table, whole, page, window, *scales)
    torch.testing.assert_close(found, twin, rtol=1e-2, atol=1e-2)
    for row, length in enumerate(lengths):
        slots = [int(table[row, at // page]) * page + at % page for at in range(length)]
        expected = attention_twin(query[row : row + 1], keys[:, slots], values[:, slots], window)
        torch.testing.assert_close(found[row : row + 1].double(), expected, rtol=2e-3, atol=2e-3)


def test_attention_says_when_a_key_is_no_number(kernels, monkeypatch):
    monkeypatch.setattr(kernels.paged, "_FILL", 4)
    keys, values = torch.randn(1, 64, 16), torch.randn(1, 64, 16)
    keys[0, 40, 3] = float("nan")
    table, lengths = torch.tensor([[0, 1]], dtype=torch.int32), torch.tensor([50], dtype=torch.int32)
    assert kernels.paged.decode(torch.randn(1, 2, 16), keys, values, table, lengths, 32).isnan().all()
