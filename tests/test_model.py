"""The parts of the model against formulas written out in float64."""

from __future__ import annotations

import math

import pytest
import torch

from backend.model.attention import attention, attention_twin
from backend.model.config import ModelConfig, tensor_shapes
from backend.model.rope import Rope


def cut(tensor: torch.Tensor, lengths: list[int]) -> list[torch.Tensor]:
    """Pieces that lie apart in memory."""
    return [piece.clone() for piece in tensor.split(lengths, dim=1)]


@pytest.mark.parametrize("lengths", [[40], [16, 24], [1, 7, 32], [30, 7, 3]])
@pytest.mark.parametrize("new", [1, 2, 13, 40])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (9, 3), (8, 1)])
def test_attention_equals_the_formula(heads, kv_heads, new, lengths):
    torch.manual_seed(heads + new + len(lengths))
    total = sum(lengths)
    query = torch.randn(new, heads, 16)
    keys, values = torch.randn(kv_heads, total, 16), torch.randn(kv_heads, total, 16)
    expected = attention_twin(query, keys, values)
    ours = attention(query, list(zip(cut(keys, lengths), cut(values, lengths))))
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-6)
    for dtype, bound in ((torch.bfloat16, 3e-2), (torch.float16, 4e-3)):
        small = attention(query, list(zip(cut(keys.to(dtype), lengths), cut(values.to(dtype), lengths))))
        assert (small.double() - expected).abs().max() < bound * expected.abs().max()


@pytest.mark.parametrize("lengths", [[40], [16, 24], [1, 7, 32], [30, 7, 3]])
@pytest.mark.parametrize("new", [1, 2, 13, 40])
@pytest.mark.parametrize("window", [1, 5, 16, 39, 40, 100])
def test_a_sliding_window_equals_the_formula(window, new, lengths):
    torch.manual_seed(window + new)
    query = torch.randn(new, 6, 16)
    keys, values = torch.randn(2, 40, 16), torch.randn(2, 40, 16)
    expected = attention_twin(query, keys, values, window)
    ours = attention(query, list(zip(cut(keys, lengths), cut(values, lengths))), window)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-6)
    if window < 40:
        assert not torch.allclose(expected, attention_twin(query, keys, values)), "the window changes something"


def test_attention_with_one_huge_score():
    query, keys = torch.zeros(1, 1, 8), torch.zeros(1, 5, 8)
    values = torch.arange(40, dtype=torch.float32).view(1, 5, 8)
    query[..., 0], keys[0, 3, 0] = 1e3, 1e3
    ours = attention(query, list(zip(cut(keys, [2, 3]), cut(values, [2, 3]))))
    torch.testing.assert_close(ours[0, 0], values[0, 3])


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("factors", [None, torch.tensor([1.0, 2.0, 4.0, 8.0])])
def test_rope_turns_each_pair_by_its_angle(interleaved, factors):
    rope = Rope(8, 10000.0, interleaved=interleaved, factors=2 * (torch.ones(4) if factors is None else factors))
    positions = [0, 1, 77, 100_000]
    x = torch.randn(len(positions), 3, 8)
    ours = rope.apply(x, rope.turns(torch.tensor(positions)))
    for row, position in enumerate(positions):
        for head in range(3):
            for pair in range(4):
                a, b = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + 4)
                angle = position / 2.0 * 10000.0 ** (-2 * pair / 8)
                if factors is not None:
                    angle /= float(factors[pair])
                first, second = float(x[row, head, a]), float(x[row, head, b])
                expected_first = first * math.cos(angle) - second * math.sin(angle)
                expected_second = first * math.sin(angle) + second * math.cos(angle)
                assert float(ours[row, head, a]) == pytest.approx(expected_first, abs=1e-5)
                assert float(ours[row, head, b]) == pytest.approx(expected_second, abs=1e-5)


def test_scores_depend_on_distance_only():
    rope = Rope(16, 500.0)
    q, k = torch.randn(1, 1, 16), torch.randn(1, 1, 16)

    def score(at_q: int, at_k: int) -> float:
        turned = [rope.apply(x, rope.turns(torch.tensor([at]))) for x, at in ((q, at_q), (k, at_k))]
        return float((turned[0] * turned[1]).sum())

    assert score(5, 2) == pytest.approx(score(1005, 1002), abs=1e-4)


def test_parameter_counts():
    # Published: Llama 2 7B has 6,738,415,616 weights, Llama 3 8B 8,030,261,248.
    llama2 = ModelConfig("llama", "7b", 4096, 32, 32, 32, 128, 11008, 32000, 4096, 1e-5)
    llama3 = ModelConfig("llama", "8b", 4096, 32, 32, 8, 128, 14336, 128256, 8192, 1e-5)
    assert llama2.parameters() == 6_738_415_616
    assert llama3.parameters() == 8_030_261_248
    for config in (llama2, llama3):
        assert sum(math.prod(shape) for shape in tensor_shapes(config).values()) == config.parameters()
    assert llama2.kv_bytes_per_token(2) == 524_288  # the FAQ's 0.5 MB a token
