"""The planner where memory is short: what gives way, what does not fit, which device."""

from __future__ import annotations

import dataclasses

import pytest

from backend.errors import PresetError
from backend.model.shapes import SHAPES
from backend.placement import budget
from backend.placement.machine import RAM_MARGIN, VRAM_MARGIN, Gpu
from backend.placement.parts import EMBEDDING, OUTPUT
from backend.placement.plan import BLOCK_TOKENS, Plan, nearest_that_fits, plan
from backend.placement.sizes import Tensors
from backend.presets import Preset
from backend.weights.blocks import Q4_1
from tests.test_plan import CPU_ONLY, GB, A, box, infos, kinds, made

# memory: cache, context, budgets --------------------------------------------------------------------------------------


def tokens(found: Plan) -> int:
    return (found.kv_blocks - budget.SPARE_BLOCKS) * BLOCK_TOKENS


def test_auto_gives_way_in_order() -> None:
    """All of it; then one chat's cache; then a shorter context; only then weights go elsewhere."""
    plenty = made(box(42, 38, vram=24), weights="bf16")
    assert (plenty.context, tokens(plenty)) == (4096, 8192)
    one = made(box(42, 38, vram=18), weights="bf16")
    assert one.context == 4096
    assert 4096 <= tokens(one) < 8192
    assert not kinds(one, "streamed")
    less = made(box(42, 38, vram=16), weights="bf16")
    assert 2048 <= less.context < 4096
    assert tokens(less) == less.context
    assert not kinds(less, "streamed")
    little = made(box(42, 38, vram=8), weights="bf16")
    assert little.context == 2048
    assert kinds(little, "streamed") | kinds(little, "cpu")
    asked = made(box(42, 38, vram=16), weights="bf16", context=4096)
    assert asked.context == 4096
    assert kinds(asked, "streamed") | kinds(asked, "cpu")


def test_auto_leaves_a_margin_and_a_number_does_not() -> None:
    auto = made(box(42, 38, vram=10), weights="bf16", context=512)
    assert 9.4 * GB - VRAM_MARGIN < auto.vram_bytes <= 10 * GB - VRAM_MARGIN
    exact = made(box(42, 38, vram=10), weights="bf16", context=512, vram=10 * GB)
    assert 9.9 * GB < exact.vram_bytes <= 10 * GB


def test_a_cpu_with_less_memory_than_the_model_reads_the_rest_from_the_file() -> None:
    small = made(box(42, 38, vram=0, host=8), weights="bf16", context=512)
    assert small.fits == "now"
    assert small.extra_ram_bytes <= 8 * GB - RAM_MARGIN
    assert small.placed("streamed") > 5 * GB
    assert small.bound_by == "disk"
    asked = made(CPU_ONLY, weights="bf16", context=512, ram=8 * GB)
    kept = asked.placed("resident") + asked.ring_bytes + asked.kv_bytes
    assert 7.5 * GB < kept <= 8 * GB
    none = made(CPU_ONLY, weights="bf16", context=512, ram=300_000_000)
    assert none.fits == "no"
    assert "ram is 300 MB" in none.reason


def test_what_does_not_fit_says_so() -> None:
    found = made(A, "llama-2-70b", weights="bf16", placement="gpu", context=512)
    assert found.fits == "no"
    assert found.reason.startswith("needs 1")
    found = made(A, weights="bf16", vram=48 * GB, placement="gpu", context=512)
    assert found.fits == "now"  # the budget is larger than needed
    found = made(A, "llama-2-13b", weights="bf16", vram=48 * GB, context=512)
    assert (found.fits, "24.0 GB are free" in found.reason) == ("no", True)
    found = made(A, weights="bf16", placement="offload-all", vram=500_000_000, context=512)
    assert (found.fits, "vram is 500 MB" in found.reason) == ("no", True)
    poor = box(42, 38, host=6)
    found = made(poor, "llama-2-13b", weights="bf16", context=512)  # 26 GB of weights, 24 and 6 GB of memory
    assert found.fits == "now"  # the rest fits into host memory
    assert made(poor, "llama-2-70b", weights="bf16", context=512).fits == "no"


def test_devices() -> None:
    two = dataclasses.replace(A, gpus=(A.gpus[0], dataclasses.replace(A.gpus[0], name="cuda:1")))
    assert [made(two, device=name, context=512).device for name in ("auto", "cuda", "cuda:1")] == [
        "cuda:0", "cuda:0", "cuda:1"
    ]  # fmt: skip
    for machine, name in ((CPU_ONLY, "cuda"), (A, "cuda:3"), (A, "mps")):
        missing = made(machine, device=name, context=512)
        assert missing.fits == "no"
        assert missing.reason == f"device is {name}, which this machine does not have"
        assert missing.vram_bytes > missing.weight_bytes  # what it would take is known all the same
        assert missing.tokens_per_second is None
    apple = dataclasses.replace(CPU_ONLY, gpus=(Gpu("mps", "Apple GPU", 16 * GB, 16 * GB),))
    assert made(apple, context=512).device == "mps"
    assert made(apple, context=512).fits == "now"
    assert made(apple, "llama-2-13b", context=512).fits == "no"  # one memory: there is nothing to stream from


def test_a_context_longer_than_the_models() -> None:
    with pytest.raises(PresetError, match="context is 8192 tokens, the model was made for 4096"):
        made(A, context=8192)


def test_max_context() -> None:
    found = made(box(42, 38, vram=24), "llama-3.1-8b", weights="bf16", context=512)
    longer = made(box(42, 38, vram=24), "llama-3.1-8b", weights="bf16", context=found.max_context)
    assert found.max_context > 20_000
    assert not kinds(longer, "streamed")
    assert kinds(made(box(42, 38, vram=24), "llama-3.1-8b", weights="bf16", context=found.max_context + 64), "cpu")


def test_the_nearest_that_fits() -> None:
    def row(name: str, size: int, fits: str, model: str = "m") -> Plan:
        return dataclasses.replace(base, preset=name, weight_bytes=size, fits=fits, model=model)  # type: ignore[arg-type]

    base = made(A, context=512)
    rows = [row("a", 100, "now"), row("b", 60, "now"), row("c", 55, "no"), row("d", 50, "now", "other")]
    near = nearest_that_fits(row("x", 50, "no"), rows)
    assert near is not None
    assert near.preset == "b"
    other = nearest_that_fits(row("x", 50, "no", "third"), rows)
    assert other is not None
    assert other.preset == "d"
    assert nearest_that_fits(row("x", 50, "no"), []) is None


def test_packed_tied_tables_are_two_parts() -> None:
    config = SHAPES["smollm2-135m"]
    tensors: Tensors = infos(config, Q4_1)
    found = plan(Preset("p", "m"), config, tensors, CPU_ONLY)
    assert found.parts[0].names == EMBEDDING
    assert found.parts[-1].names == OUTPUT
    assert found.tokens_per_second is not None


# the cache's host tier ------------------------------------------------------------------------------------------------


def test_beside_a_gpu_evicted_blocks_may_take_a_quarter_of_what_is_left() -> None:
    """Up to a limit, in whole blocks, and counted in what the plan takes."""
    found = made(box(42, 38, vram=24, host=16), weights="bf16", context=2048)
    without = made(box(42, 38, vram=24, host=16), weights="bf16", context=2048, cache_ram=0)
    block = found.kv_bytes // found.kv_blocks
    left = 16 * GB - RAM_MARGIN - without.extra_ram_bytes
    assert without.host_cache_bytes == 0
    assert left // 4 - block < found.host_cache_bytes <= left // 4
    assert found.host_cache_bytes % block == 0
    assert found.extra_ram_bytes == without.extra_ram_bytes + found.host_cache_bytes
    assert found.vram_bytes == without.vram_bytes
    large = made(box(42, 38, vram=24, host=512), weights="bf16", context=2048)
    assert budget.MOST_HOST_CACHE - block < large.host_cache_bytes <= budget.MOST_HOST_CACHE
    none = made(box(42, 38, vram=24, host=0.3), weights="bf16", context=2048)
    assert none.host_cache_bytes == 0


def test_on_a_cpu_the_tier_is_for_those_who_ask_for_it() -> None:
    assert made(CPU_ONLY, weights="bf16", context=512).host_cache_bytes == 0
    plain = made(CPU_ONLY, weights="int4", context=512, ram=8 * GB, kv_tokens=1024)
    asked = made(CPU_ONLY, weights="int4", context=512, ram=8 * GB, kv_tokens=1024, cache_ram=GB)
    block = asked.kv_bytes // asked.kv_blocks
    assert GB - block < asked.host_cache_bytes <= GB
    assert asked.extra_ram_bytes == plain.extra_ram_bytes + asked.host_cache_bytes
    # It is a part of what `ram` allows.
    assert plain.placed("streamed") == 0
    assert made(CPU_ONLY, weights="int4", context=512, ram=8 * GB, cache_ram=4 * GB).placed("streamed") > 0


def test_an_int8_cache_holds_more_and_is_counted_with_what_attention_decodes() -> None:
    short, wide = (made(box(42, 38, vram=16), weights="bf16", kv_cache=kind) for kind in ("int8", "bf16"))
    assert short.context > wide.context
    assert short.vram_bytes <= 16 * GB
    exact, codes = (
        made(box(42, 38, vram=24), weights="bf16", context=2048, kv_cache=kind) for kind in ("bf16", "int8")
    )
    decoded = 2 * 2048 * 32 * 128 * 2  # keys and values of one layer in bfloat16
    assert codes.vram_bytes == exact.vram_bytes - exact.kv_bytes + codes.kv_bytes + decoded
    assert codes.kv_bytes * 64 == exact.kv_bytes * 33
