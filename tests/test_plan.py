"""The planner: exact sizes from headers alone, places inside a budget, predicted speeds. All on invented machines."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backend.checkpoint.base import TensorInfo
from backend.checkpoint.open import config_alone
from backend.engine.scheduler import PREFILL_TOKENS
from backend.engine.threads import BYTES_PER_THREAD
from backend.model.config import ModelConfig, tensor_shapes
from backend.model.shapes import SHAPES
from backend.placement import budget, speed
from backend.placement.arrange import ATTENTION, FEED_FORWARD, keeping
from backend.placement.machine import Gpu, Machine, Rates
from backend.placement.parts import EMBEDDING, OUTPUT, PRODUCTS, RING_BUFFERS, Product, Weight, ring_bytes
from backend.placement.plan import Plan, plan, weight_bytes
from backend.placement.sizes import products
from backend.presets import PLACEMENTS, WEIGHTS, Preset
from backend.weights.blocks import BF16, Q4_1, BlockFormat

GB = 10**9
FORMS = ("bf16", "f16", "f32", "int8", "llm-int8", "int4", "nf4")


def infos(config: ModelConfig, fmt: BlockFormat = BF16) -> dict[str, TensorInfo]:
    return {
        name: TensorInfo(name, shape, fmt if len(shape) > 1 else BF16, math.prod(shape[:-1]) * fmt.row_bytes(shape[-1]))
        for name, shape in tensor_shapes(config).items()
    }


def box(ram: float, cpu: float, vram: float = 24, gpu: float = 857, link: float = 25, host: float = 1000) -> Machine:
    """A machine by its GB/s, GB of VRAM and of host memory."""
    rates = Rates(gpu * GB, dict.fromkeys(FORMS, gpu * GB))
    device = Gpu("cuda:0", "test", int(vram * GB), int(vram * GB), link * GB, rates)
    host_rates = Rates(ram * GB, dict.fromkeys(FORMS, cpu * GB))
    slow = dict.fromkeys((*FORMS, "Q4_1"), 8.0 * GB)
    return Machine(int(host * GB), int(host * GB), 0, 8, host_rates, 0.5, slow, 2.0 * GB, (device,) if vram else ())


A, B = box(42, 38), box(72, 66)  # reference/performance.md, section 4.3
CPU_ONLY = box(42, 38, vram=0)
SHAPE, TENSORS = SHAPES["llama-2-7b"], infos(SHAPES["llama-2-7b"])


def made(machine: Machine, shape: str = "llama-2-7b", **keys: object) -> Plan:
    config = SHAPES[shape]
    return plan(Preset("p", "m", **keys), config, infos(config), machine)  # type: ignore[arg-type]


# sizes ------------------------------------------------------------------------------------------------------------

# params.json as Meta published them, and the number of parameters (facebookresearch/llama, meta-llama model cards).
PUBLISHED = {
    "7B": ({"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-6}, 6_738_415_616),
    "13B": ({"dim": 5120, "multiple_of": 256, "n_heads": 40, "n_layers": 40, "norm_eps": 1e-6}, 13_015_864_320),
    "33B": ({"dim": 6656, "multiple_of": 256, "n_heads": 52, "n_layers": 60, "norm_eps": 1e-6}, 32_528_943_616),
    "65B": ({"dim": 8192, "multiple_of": 256, "n_heads": 64, "n_layers": 80, "norm_eps": 1e-5}, 65_285_660_672),
    "70B": (
        {
            "dim": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3, "n_heads": 64, "n_kv_heads": 8, "n_layers": 80,
            "norm_eps": 1e-5,
        },
        68_976_648_192,
    ),
    "Llama 3 8B": (
        {
            "dim": 4096, "multiple_of": 1024, "ffn_dim_multiplier": 1.3, "n_heads": 32, "n_kv_heads": 8, "n_layers": 32,
            "norm_eps": 1e-5, "rope_theta": 500000.0, "vocab_size": 128256,
        },
        8_030_261_248,
    ),
    "Llama 3 70B": (
        {
            "dim": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3, "n_heads": 64, "n_kv_heads": 8, "n_layers": 80,
            "norm_eps": 1e-5, "rope_theta": 500000.0, "vocab_size": 128256,
        },
        70_553_706_496,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("params", "parameters"), PUBLISHED.values(), ids=PUBLISHED.keys())
def test_exact_bytes_from_params_json_alone(tmp_path: Path, params: dict[str, object], parameters: int) -> None:
    (tmp_path / "params.json").write_text(json.dumps(params))
    config = config_alone(tmp_path)
    assert config is not None
    assert config.parameters() == parameters
    norms = config.dim * (2 * config.n_layers + 1)
    for weights, each in (("f16", 2), ("bf16", 2), ("f32", 4)):
        found = plan(Preset("p", "m", weights=weights), config, infos(config))
        assert found.weight_bytes == each * (parameters - norms) + 4 * norms
        assert sum(part.bytes for part in found.parts) == each * (parameters - norms)
    # In tiles 8 bits and a float16 for each 32 columns of the layers, as rows 8 bits and a float32 for each row;
    # embedding and output stay bfloat16.
    rows = config.n_layers * sum(tensor_shapes(config)[f"layers.0.{kind}"][0] for stack in PRODUCTS for kind in stack)
    tables = 2 * config.vocab_size * config.dim
    layers = parameters - norms - tables
    for tiled, packed in ((True, layers * 34 // 32), (False, layers + 4 * rows)):
        assert weight_bytes("int8", config, infos(config), tiled) == packed + 2 * tables + 4 * norms


def test_the_same_from_config_json_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256,
            "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
        })
    )  # fmt: skip
    config = config_alone(tmp_path)
    assert config is not None
    assert config.parameters() == 8_030_261_248


def test_numbers_that_are_the_engines() -> None:
    """The planner imports nothing of the engine, so what it restates is held equal here."""
    assert budget.CHUNK_TOKENS == PREFILL_TOKENS == Plan.chunk_tokens
    assert speed.BYTES_PER_THREAD == BYTES_PER_THREAD


# speeds: reference/performance.md, tables 4.2 and 4.3 -----------------------------------------------------------------

# bytes per token, of a layer; machine; GB of VRAM for weights; llama.cpp's way, streaming only, hybrid: tokens/s
SEVEN, THIRTEEN = (13.2, 0.405), (25.7, 0.634)
TABLE = [
    (SEVEN, A, 4, 4.0, 2.5, 4.1), (SEVEN, A, 8, 6.8, 4.1, 6.7), (SEVEN, A, 12, 22, 12, 18),
    (THIRTEEN, A, 4, 1.7, 1.1, 1.8), (THIRTEEN, A, 8, 2.1, 1.3, 2.2), (THIRTEEN, A, 12, 2.7, 1.7, 2.7),
    (THIRTEEN, A, 22, 8.1, 5.0, 7.7), (SEVEN, B, 4, 6.9, 2.5, 6.9), (SEVEN, B, 8, 11, 4.1, 11),
    (SEVEN, B, 12, 31, 12, 27), (THIRTEEN, B, 8, 3.6, 1.3, 3.6), (THIRTEEN, B, 22, 12, 5, 12),
]  # fmt: skip
# 7B on weak CPU kernels: all VRAM of the seed's runs, of which 0.7 GB are no layers; llama.cpp's way; hybrid.
SEEDS, BESIDE = [(1.8, 1.2, 3.1), (5.6, 1.8, 4.3), (9.6, 3.4, 7.5)], 0.7


@pytest.mark.parametrize(("model", "machine", "vram", "halved", "streaming", "hybrid"), TABLE)
def test_the_formula_gives_the_table(
    model: tuple[float, float], machine: Machine, vram: float, halved: float, streaming: float, hybrid: float
) -> None:
    size, layer = model
    gpu = machine.gpus[0]
    resident = min(size, vram - 2 * layer)
    seconds = speed.hybrid_seconds(resident * GB, (size - resident) * GB, machine, gpu, "bf16")
    assert 1 / seconds == pytest.approx(hybrid, rel=0.07)
    assert 1 / _seconds({"resident": vram, "cpu": size - vram}, machine) == pytest.approx(halved, rel=0.07)
    assert 1 / _seconds({"resident": resident, "streamed": size - resident}, machine) == pytest.approx(
        streaming, rel=0.07
    )


@pytest.mark.parametrize(("vram", "halved", "hybrid"), SEEDS)
def test_the_seeds_budgets_with_a_weak_processor(vram: float, halved: float, hybrid: float) -> None:
    machine, (size, layer) = box(42, 15), SEVEN
    resident = vram - BESIDE - 2 * layer
    seconds = speed.hybrid_seconds(resident * GB, (size - resident) * GB, machine, machine.gpus[0], "bf16")
    assert 1 / seconds == pytest.approx(hybrid, rel=0.05)
    vram -= BESIDE
    assert 1 / _seconds({"resident": vram, "cpu": size - vram}, machine) == pytest.approx(halved, rel=0.05)


def _seconds(places: dict[str, float], machine: Machine) -> float:
    """`speed.step` of products with so many GB in each place."""
    placed = []
    for place, size in places.items():
        product = Product((Weight(f"layers.0.{place}", int(size * GB), "bf16"),))
        placed.append((product, place))
    found = speed.step(placed, 32, machine, machine.gpus[0])  # type: ignore[arg-type]
    assert found is not None
    return found.seconds


@pytest.mark.parametrize(("model", "machine", "vram", "halved", "streaming", "hybrid"), TABLE)
def test_a_plan_is_as_fast_as_the_best_of_them(
    model: tuple[float, float], machine: Machine, vram: float, halved: float, streaming: float, hybrid: float
) -> None:
    """With a ring of three parts instead of two layers, and the embedding in host memory, it may be somewhat faster."""
    shape = "llama-2-7b" if model is SEVEN else "llama-2-13b"
    # What the table does not count: CUDA's own, the cache, workspace.
    beside = made(machine, shape, weights="bf16", context=512, vram=24 * GB)
    more = beside.vram_bytes - beside.placed("resident") - beside.ring_bytes
    found = made(machine, shape, weights="bf16", context=512, vram=int(vram * GB) + more)
    best = max(halved, streaming, hybrid)
    assert found.fits == "now"
    assert found.tokens_per_second is not None
    assert 0.93 * best < found.tokens_per_second < (1.35 if vram < 12 else 2.2) * best


def test_limits_are_named() -> None:
    assert made(A, weights="bf16", context=512).bound_by == "vram bandwidth"
    assert made(A, weights="bf16", context=512, placement="offload-all").bound_by == "link"
    assert made(A, weights="bf16", context=512, vram=4 * GB).bound_by in ("ram bandwidth", "link")
    assert made(CPU_ONLY, weights="bf16").bound_by == "ram bandwidth"
    assert made(box(42, 15, vram=0), weights="bf16").bound_by == "cpu"
    assert made(CPU_ONLY, weights="bf16", placement="offload-all").bound_by == "disk"
    unmeasured = made(Machine(ram_total=64 * GB, ram_free=64 * GB), weights="bf16")
    assert (unmeasured.tokens_per_second, unmeasured.bound_by, unmeasured.fits) == (None, "", "now")


def test_offload_modes_against_the_formula() -> None:
    """7B: the seed's three modes at the link's full speed; it reached 1.81, 2.66 and 5.06 tokens/s."""
    moved = {"offload-all": 12.95, "offload-ff": 8.66, "offload-attention": 4.29}  # GB a token, section 4
    for placement, size in moved.items():
        found = made(A, weights="bf16", context=512, placement=placement)
        assert found.placed("streamed") == pytest.approx(size * GB, rel=0.01)
        assert found.tokens_per_second == pytest.approx(25 / size, rel=0.01)


def test_a_small_model_is_bound_by_what_is_done_beside_products() -> None:
    machine = dataclasses.replace(CPU_ONLY, rates=dataclasses.replace(CPU_ONLY.rates, layer_seconds=1e-3))
    found = made(machine, "smollm2-135m", weights="bf16")
    assert found.bound_by == "cpu"
    assert found.tokens_per_second is not None
    assert found.tokens_per_second < 1 / (30 * 1e-3)


def test_short_rows_cost_more_for_their_bytes() -> None:
    rates = dataclasses.replace(CPU_ONLY.rates, row_seconds={"bf16": 1e-7})
    config = SHAPES["smollm2-135m"]
    rows = sum(shape[0] for name, shape in tensor_shapes(config).items() if len(shape) > 1)
    before, after = (
        1 / (made(machine, "smollm2-135m", weights="bf16").tokens_per_second or 0)
        for machine in (CPU_ONLY, dataclasses.replace(CPU_ONLY, rates=rates, one_core=1.0))
    )
    assert after - before == pytest.approx(rows * 1e-7, rel=0.01)


def test_a_step_in_one_call_costs_little_beside_its_products() -> None:
    """Tiles, all threads, no operation of torch between; with one plain or streamed product it is as it was."""
    config, tables = SHAPES["smollm2-135m"], (*EMBEDDING, *OUTPUT)
    rates = dataclasses.replace(CPU_ONLY.rates, layer_seconds=1e-3)
    machine = dataclasses.replace(CPU_ONLY, rates=rates, one_core=0.25, step_seconds=1e-5)
    packed, plain = infos(config, Q4_1), infos(config, BF16)

    def seconds(tensors: dict[str, TensorInfo], machine: Machine, stays: tuple[str, ...]) -> float:
        placed = keeping(products("original", config, tensors, tiled=True), stays, gpu=False)
        told = speed.step(placed, config.n_layers, machine, None)
        assert told is not None
        return told.seconds

    everything = (*tables, *ATTENTION, *FEED_FORWARD)
    read = sum(each.bytes for each in products("original", config, packed, tiled=True) if each.read) / (38 * GB)
    assert seconds(packed, machine, everything) == pytest.approx(30 * 1e-5 + read, rel=0.01)
    # One core for the layers, all for the output.
    by_torch = seconds(packed, dataclasses.replace(machine, step_seconds=0.0), everything)
    assert 30 * 1e-3 + read < by_torch < 30 * 1e-3 + 4 * read
    mixed = packed | {"layers.3.w2": plain["layers.3.w2"]}
    assert seconds(mixed, machine, everything) == pytest.approx(by_torch, rel=0.05)
    assert seconds(packed, machine, (*tables, *ATTENTION)) > 30 * 1e-3


@pytest.mark.parametrize("machine", [A, CPU_ONLY], ids=["gpu", "cpu"])
def test_where_parts_are_streamed_a_step_takes_more_of_a_prompt(machine: Machine) -> None:
    whole = made(machine, weights="bf16", context=512)
    streamed = made(machine, weights="bf16", context=512, placement="offload-all")
    assert streamed.chunk_tokens == budget.LONG_CHUNK_TOKENS
    if machine is CPU_ONLY:  # there always: weights are decoded once for all tokens of a step
        assert whole.chunk_tokens == budget.LONG_CHUNK_TOKENS
        return
    assert whole.chunk_tokens == budget.CHUNK_TOKENS

    def beside(found: Plan) -> int:
        size = found.vram_bytes or found.extra_ram_bytes - budget.host_bytes(SHAPE)
        return size - found.placed("resident") - found.ring_bytes - found.kv_bytes

    more = budget.workspace_bytes(SHAPE, 512) - budget.workspace_bytes(SHAPE, 128)
    assert beside(streamed) - beside(whole) == more > 100_000_000
    # A table that is only looked up in is no reason: its rows are read one by one.
    table = made(machine, weights="bf16", context=512, placement=(*OUTPUT, *ATTENTION, *FEED_FORWARD))
    assert table.chunk_tokens == budget.CHUNK_TOKENS


def test_a_shorter_step_where_memory_is_short() -> None:
    keys: dict[str, object] = {"weights": "bf16", "context": 512, "kv_tokens": 512, "placement": "offload-all"}
    most = made(A, **keys)
    less = made(A, **keys, vram=most.vram_bytes - 1)
    more = budget.workspace_bytes(SHAPE, 512) - budget.workspace_bytes(SHAPE, 128)
    assert (less.fits, less.chunk_tokens, less.vram_bytes) == ("now", 128, most.vram_bytes - more)


# places ---------------------------------------------------------------------------------------------------------------


def whole(found: Plan, config: ModelConfig) -> None:
    """What must be true of every plan: each weight in one part, stacked in order, and the sums right."""
    names = [name for part in found.parts for name in part.names]
    expected = [name for name, shape in tensor_shapes(config).items() if len(shape) > 1]
    assert sorted(names) == sorted(expected) or sorted(names) == sorted([*expected, "output"])
    in_order = [
        n for layer in range(config.n_layers) for stack in PRODUCTS for n in (f"layers.{layer}.{k}" for k in stack)
    ]
    assert [name for name in names if name.startswith("layers.")] == in_order
    assert found.ring_bytes == ring_bytes(found.parts)


def kinds(found: Plan, place: str) -> set[str]:
    return {name.rpartition(".")[2] for part in found.parts if part.place == place for name in part.names}


@pytest.mark.parametrize("machine", [A, CPU_ONLY], ids=["gpu", "cpu"])
def test_places_by_name(machine: Machine) -> None:
    for placement, streamed in {
        "offload-all": {*ATTENTION, *FEED_FORWARD},
        "offload-ff": {*FEED_FORWARD},
        "offload-attention": {*ATTENTION},
        "gpu": set(),
        ("w1", "w2", "w3", "output", "tok_embeddings"): {*ATTENTION},
        ("wk", "w2", "output", "tok_embeddings"): {"wq", "wv", "wo", "w1", "w3"},
    }.items():
        found = made(machine, weights="bf16", context=512, placement=placement)
        whole(found, SHAPE)
        assert kinds(found, "streamed") == streamed
        assert kinds(found, "resident") == {*ATTENTION, *FEED_FORWARD, *EMBEDDING, *OUTPUT} - streamed
    mixed = made(machine, weights="bf16", context=512, placement=("wk", "output", "tok_embeddings"))
    assert [part.names for part in mixed.parts[1:4]] == [("layers.0.wq",), ("layers.0.wk",), ("layers.0.wv",)]


def test_a_table_that_is_looked_up_in_is_never_brought_whole() -> None:
    on_gpu = made(A, weights="bf16", context=512, placement=("w1", "w2", "w3"))
    assert (on_gpu.parts[0].place, on_gpu.parts[-1].place) == ("cpu", "streamed")
    on_cpu = made(CPU_ONLY, weights="bf16", context=512, placement=("w1", "w2", "w3"))
    assert on_cpu.parts[0].place == "streamed"  # read row by row from the file
    assert on_cpu.ring_bytes == RING_BUFFERS * max(part.bytes for part in on_cpu.parts[1:] if part.place == "streamed")
    # The table of a tied model of plain values is the output too: brought, like any product.
    tied = made(A, "llama-3.2-1b", weights="bf16", context=512, placement=("w1",))
    assert tied.parts[0].place == "streamed"
    assert tied.parts[-1].names != OUTPUT
    assert made(A, "llama-3.2-1b", weights="bf16", context=512, placement=("output",)).parts[0].place == "resident"


def test_placement_cpu_and_device_cpu_leave_the_gpu_alone() -> None:
    for keys in ({"placement": "cpu"}, {"device": "cpu"}):
        found = made(A, weights="bf16", **keys)
        assert (found.device, found.vram_bytes, kinds(found, "streamed")) == ("cpu", 0, set())
        assert found.ram_bytes > found.weight_bytes


@settings(max_examples=60, deadline=None)
@given(
    vram=st.integers(1 * GB, 30 * GB),
    weights=st.sampled_from(WEIGHTS),
    placement=st.sampled_from(PLACEMENTS),
    shape=st.sampled_from(["llama-2-7b", "llama-3-8b", "tinyllama-1.1b", "smollm2-135m"]),
    context=st.sampled_from([None, 512, 2048]),
)
def test_any_budget(vram: int, weights: str, placement: str, shape: str, context: int | None) -> None:
    found = made(A, shape, weights=weights, placement=placement, vram=vram, context=context)
    whole(found, SHAPES[shape])
    if found.fits == "now":
        assert found.vram_bytes <= vram or found.device == "cpu"
        assert found.context <= found.max_context or found.device == "cpu"
    else:
        assert found.reason
        assert "\n" not in found.reason


def test_more_vram_is_never_slower() -> None:
    speeds = [made(A, weights="bf16", context=512, vram=size * GB).tokens_per_second or 0 for size in range(3, 20)]
    assert all(later >= 0.98 * earlier for earlier, later in zip(speeds, speeds[1:]))
    assert speeds[-1] > 60


def test_parts_take_turns() -> None:
    """A small ring can only keep the link busy when streamed parts and others alternate."""
    found = made(A, weights="bf16", context=512, vram=8 * GB)
    streamed = [number for number, part in enumerate(found.parts) if part.place == "streamed"]
    gaps = [later - earlier for earlier, later in zip(streamed, streamed[1:])]
    assert max(gaps) < 12
    assert found.parts[-1].place == "resident"
