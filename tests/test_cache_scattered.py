"""Keys and values of a sequence whose blocks lie apart: read where they lie while they are few, else as one copy."""

from __future__ import annotations

import pytest
import torch

from backend.cache.kv import KV_TYPES, KVPool
from backend.model.attention import attention, attention_twin
from backend.model.config import ModelConfig

BLOCK, BLOCKS, HEADS, KV_HEADS, SIZE = 32, 40, 4, 2, 16
CONFIG = ModelConfig(
    architecture="llama", name="", dim=64, n_layers=2, n_heads=HEADS, n_kv_heads=KV_HEADS, head_dim=SIZE, ffn_dim=64,
    vocab_size=64, context=2048, norm_eps=1e-5,
)  # fmt: skip
TOGETHER = list(range(3, 23))
SCATTERED = [(7 * n) % BLOCKS for n in range(20)]
TOKENS = 20 * BLOCK - 5


def stored(kind: str, blocks: list[int]) -> tuple[KVPool, torch.Tensor, torch.Tensor]:
    """A pool with a sequence in the second layer, and what was stored: float32 (tokens, n_kv_heads, head_dim)."""
    pool = KVPool(CONFIG, BLOCKS, BLOCK, KV_TYPES[kind])
    for array in pool.arrays:
        array.fill_(7)  # nobody's
    keys, values = torch.randn(2, TOKENS, KV_HEADS, SIZE, generator=torch.Generator().manual_seed(1))
    for start in range(0, TOKENS, 100):
        end = min(TOKENS, start + 100)
        pool.store(1, pool.table(blocks, start, end), keys[start:end], values[start:end])
    return pool, keys, values


@pytest.mark.parametrize("kind", KV_TYPES)
def test_both_ways_give_the_same_numbers(kind: str) -> None:
    pool, keys, values = stored(kind, SCATTERED)
    found = pool.read(1, pool.table(SCATTERED, TOKENS - 3, TOKENS))
    whole, _, _ = stored(kind, TOGETHER)
    (expected,) = whole.read(1, whole.table(TOGETHER, TOKENS - 3, TOKENS))
    assert len(found) == 1
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found[0], expected, strict=True))
    query = torch.randn(3, HEADS, SIZE, generator=torch.Generator().manual_seed(2))
    wanted = attention_twin(query, keys.transpose(0, 1), values.transpose(0, 1))
    tolerance = {"f32": 1e-5, "f16": 2e-3}.get(kind, 2e-2)
    assert torch.allclose(attention(query, found).double(), wanted, atol=tolerance)


def test_what_lies_together_is_not_copied() -> None:
    pool, _, _ = stored("f32", TOGETHER)
    ((keys, values),) = pool.read(1, pool.table(TOGETHER, TOKENS - 1, TOKENS))
    assert keys.data_ptr() == pool.keys[1, :, TOGETHER[0] * BLOCK :].data_ptr()
    assert values.data_ptr() == pool.values[1, :, TOGETHER[0] * BLOCK :].data_ptr()


def test_long_runs_of_large_heads_are_read_where_they_lie() -> None:
    """Two long runs of 32 heads of 128 numbers: 32 MiB, which nobody wants to copy for one token."""
    large = ModelConfig(
        architecture="llama", name="", dim=4096, n_layers=1, n_heads=32, n_kv_heads=32, head_dim=128, ffn_dim=64,
        vocab_size=64, context=2048, norm_eps=1e-5,
    )  # fmt: skip
    pool = KVPool(large, BLOCKS, BLOCK, torch.bfloat16)
    blocks = [*range(10, 30), *range(2, 10)]
    tokens = len(blocks) * BLOCK
    found = pool.read(0, pool.table(blocks, tokens - 1, tokens))
    assert [keys.shape[1] for keys, _ in found] == [20 * BLOCK, 8 * BLOCK]
    assert found[0][0].data_ptr() == pool.keys[0, :, 10 * BLOCK :].data_ptr()
    # What hundreds of queries find in each run costs more than the copy does.
    many = KVPool(large, BLOCKS, BLOCK, torch.bfloat16).table(SCATTERED, 0, 512)
    assert many.blocks is not None
    assert many.blocks.tolist() == SCATTERED[:16]
