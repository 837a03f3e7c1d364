"""Loading: the plan knows the bytes beforehand, values arrive where they belong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from backend.cache.kv import KV_TYPES, KVPool
from backend.checkpoint.open import open_checkpoint
from backend.engine.runner import Runner
from backend.model.config import ModelConfig
from backend.placement.arrange import resident
from backend.placement.load import load_model
from backend.placement.plan import BLOCK_TOKENS, plan, weight_bytes
from backend.placement.sizes import products
from backend.placement.speed import is_one_call
from backend.presets import WEIGHTS, Preset

# sizes ------------------------------------------------------------------------------------------------------------

MODELS: dict[str, dict[str, object]] = {
    **{name: {"weights": name} for name in ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")},
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
        # And whether a step of it is one compiled call, which its speed depends on.
        placed = resident(products(weights, checkpoint.config, checkpoint.tensors))
        assert (
            is_one_call(placed)
            == Runner(loaded.model, KVPool(checkpoint.config, 1, BLOCK_TOKENS, torch.float32)).in_one_call
        )


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
        (Preset("a", "x", kv_cache="int8"), 256, "int8", 512 + 64),
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
    head = {"f32": 4 * 16, "bf16": 2 * 16, "f16": 2 * 16, "int8": 16 + 4}[kv_type]  # 16 numbers, and a scale
    assert found.kv_bytes == kv_tokens * 2 * 2 * 2 * head  # keys and values, layers, heads
    assert found.kv_bytes == KVPool(checkpoint.config, found.kv_blocks, BLOCK_TOKENS, KV_TYPES[kv_type]).nbytes()
    assert found.total_bytes == found.kv_bytes + found.weight_bytes
