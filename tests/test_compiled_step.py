"""A decoder step in one call: the formulas of model/llama.py, and the same bits however the work is cut."""

from __future__ import annotations

import ctypes
import dataclasses
import math
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from backend.cache.int8 import quantised, values_of
from backend.cache.kv import KVPool
from backend.checkpoint.open import open_checkpoint
from backend.engine.admission import MAX_RUNNING
from backend.engine.compiled import TURNS_AT_ONCE, CompiledStep, Tokens, _Turns
from backend.engine.runner import Runner
from backend.kernels.cpu import build, steps
from backend.model.attention import attention, attention_twin
from backend.model.llama import Llama
from backend.model.rope import Rope
from backend.placement.budget import CHUNK_TOKENS, workspace_bytes
from backend.placement.load import load_model
from backend.weights.linear import BiasedLinear, PlainLinear
from tests.forward import float64_logits

needs_compiler = pytest.mark.skipif(build._compiler() is None, reason="not run: there is no C compiler")
pytestmark = needs_compiler

MODELS: dict[str, dict[str, object]] = {
    "the starter's kind": {"weights": "Q4_1", "formats": {"token_embd.weight": "Q8_0"}},
    "untied": {"weights": "Q4_0", "tied": False},
    "several formats in one product": {"weights": "Q4_0", "formats": {"blk.0.attn_v.weight": "Q8_0"}},
    "grouped heads of an odd size": {"weights": "Q8_0", "n_heads": 6, "n_kv_heads": 2, "head_dim": 48, "dim": 96},
    "tiles with a plain output": {"weights": "Q8_0", "tied": False, "formats": {"output.weight": "BF16"}},
    "every head its own keys": {"weights": "Q8_0", "n_heads": 2, "n_kv_heads": 2, "head_dim": 128, "dim": 160},
}


def loaded(path: Path, kv: torch.dtype = torch.float32, blocks: int = 24) -> tuple[Llama, KVPool, CompiledStep]:
    model = load_model(open_checkpoint(path), "original", "test").model
    pool = KVPool(model.config, blocks, steps.BLOCK_TOKENS, kv)
    compiled = CompiledStep.of(model, pool)
    assert compiled is not None
    return model, pool, compiled


def by_torch(model: Llama, ids: list[int]) -> torch.Tensor:
    """The same products with torch's operations between them, without a cache."""

    def attend(layer: int, heads: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
        query, key, value = model.turned(heads, turns)
        run = key.transpose(0, 1).contiguous(), value.transpose(0, 1).contiguous()
        return attention(query, [run], model.config.sliding_window)

    with torch.inference_mode():
        every = torch.arange(len(ids))
        return model.forward(torch.tensor(ids), every, attend, every)


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Root mean square of the difference, as a share of what was wanted."""
    return float((found.double() - wanted.double()).pow(2).mean().sqrt() / wanted.double().pow(2).mean().sqrt())


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS.keys())
def test_it_computes_what_the_model_says(tiny_path: Callable[..., Path], options: dict[str, object]) -> None:
    path = tiny_path(**options)
    model, _, compiled = loaded(path)
    ids = [(7 * n) % 250 for n in range(70)]
    long = compiled.run(ids, [Tokens(0, 70, 0, [5, 2, 9], prompt=True)], range(70), threads=2)
    found = in_pieces(compiled, ids, 14, [4, 1, 8])
    # The same rounding of activations: what is left is the order of sums, and now and then a code that it tips over.
    # bfloat16, where there is AMX, is coarser.
    assert distance(long, by_torch(model, ids)) < 0.005
    assert distance(found[:14], by_torch(model, ids[:14])) < (0.005 if "BF16" in str(options) else 0.002)
    assert distance(found, long) < 0.015
    # Decoded weights and no rounding at all.
    checkpoint = open_checkpoint(path)
    values = {name: checkpoint.read(name).float32() for name in checkpoint.tensors}
    values = {
        name: value.flatten() if len(checkpoint.tensors[name].shape) == 1 else value for name, value in values.items()
    }
    assert distance(found, float64_logits(values, model.config, ids)) < 0.002
    assert distance(long, float64_logits(values, model.config, ids)) < 0.015


def in_pieces(compiled: CompiledStep, ids: list[int], length: int, blocks: list[int]) -> torch.Tensor:
    """Logits of all tokens, read in steps of so many."""
    pieces = [(at, ids[at : at + length]) for at in range(0, len(ids), length)]
    return torch.cat(
        [compiled.run(part, [Tokens(0, len(part), at, blocks)], range(len(part)), threads=2) for at, part in pieces]
    )


@pytest.mark.parametrize("kv", steps.KINDS)
@pytest.mark.parametrize("window", [None, 20])
def test_a_token_has_the_same_bits_however_the_work_is_cut(
    tiny_path: Callable[..., Path], kv: torch.dtype, window: int | None
) -> None:
    model, pool, _ = loaded(tiny_path(weights="Q4_1"), kv)
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, sliding_window=window))
    compiled = CompiledStep.of(model, pool)
    assert compiled is not None
    ids = [(11 * n) % 250 for n in range(90)]
    whole = in_pieces(compiled, ids, 16, [3, 1, 8])
    for length in (1, 5, 9):
        assert torch.equal(whole, in_pieces(compiled, ids, length, [4, 6, 5]))
    # Beside another sequence, and beside the prompt of one.
    beside = [*ids[:11], *ids[11:24], *ids[:50]]
    compiled.run(ids[:11], [Tokens(0, 11, 0, [10, 12])], [10], threads=2)
    parts = [Tokens(0, 11, 0, [14, 15]), Tokens(11, 13, 11, [10, 12]), Tokens(24, 50, 0, [16, 17], prompt=True)]
    rest = compiled.run(beside, parts, range(74), threads=3)
    assert torch.equal(rest[:24], torch.cat([whole[:11], whole[11:24]]))
    # A prompt: the same on any number of threads, in any blocks, whatever is beside.
    long = compiled.run(ids, [Tokens(0, 90, 0, [4, 6, 5], prompt=True)], range(90), threads=1)
    assert torch.equal(long, compiled.run(ids, [Tokens(0, 90, 0, [20, 21, 22], prompt=True)], range(90), threads=3))
    assert torch.equal(rest[24:], long[:50])
    assert distance(long, whole) < 0.02


def test_biases_are_added(tiny_path: Callable[..., Path]) -> None:
    model, pool, _ = loaded(tiny_path(weights="Q8_0"))
    layers = tuple(
        dataclasses.replace(layer, wqkv=BiasedLinear(layer.wqkv, torch.linspace(-1, 1, layer.wqkv.out_features)))  # type: ignore[attr-defined, arg-type]
        for layer in model.layers
    )
    model = dataclasses.replace(model, layers=layers)
    compiled = CompiledStep.of(model, pool)
    assert compiled is not None
    ids = list(range(40))
    parts = [Tokens(0, 40, 0, [0, 1], prompt=True)]
    assert distance(compiled.run(ids, parts, range(40), 1), by_torch(model, ids)) < 0.0005


def test_nothing_that_is_not_finite_is_lost(tiny_path: Callable[..., Path]) -> None:
    model, pool, _ = loaded(tiny_path(weights="Q8_0"))
    model.layers[1].ffn_norm[3] = float("nan")
    compiled = CompiledStep.of(model, pool)
    assert compiled is not None
    assert compiled.run([1, 2], [Tokens(0, 2, 0, [0])], [1], 1).isnan().any()


def test_it_says_where_it_does_not_apply(tiny_path: Callable[..., Path]) -> None:
    model, pool, compiled = loaded(tiny_path(weights="Q8_0"))
    assert CompiledStep.of(dataclasses.replace(model, output=PlainLinear(torch.zeros(8, 64))), pool) is None
    plain = load_model(open_checkpoint(tiny_path(weights="F16")), "original", "test").model
    assert CompiledStep.of(plain, pool) is None
    assert CompiledStep.of(model, KVPool(model.config, 4, 16, torch.float32)) is None
    compiled.run([1], [Tokens(0, 1, 0, [0])], [0], 1)
    few = compiled.workspace_bytes()
    compiled.run([1] * 64, [Tokens(0, 64, 0, [0, 1])], [0], 1)
    assert compiled.workspace_bytes() > few > 0


def test_an_int8_cache_has_the_codes_of_the_twin(tiny_path: Callable[..., Path]) -> None:
    """What the step stores, and what it reads: the twin's codes and scales, and logits near those of the torch path."""
    model, pool, compiled = loaded(tiny_path(weights="Q8_0", head_dim=40, n_heads=4, n_kv_heads=2), torch.int8)
    exact = KVPool(model.config, 24, steps.BLOCK_TOKENS, torch.float32)
    reference = CompiledStep.of(model, exact)
    assert reference is not None
    assert pool.key_scales is not None
    assert pool.value_scales is not None
    ids = [(7 * n) % 250 for n in range(70)]
    parts = [Tokens(0, 70, 0, [5, 2, 9], prompt=True)]
    wanted = reference.run(ids, parts, range(70), threads=2)
    found = compiled.run(ids, parts, range(70), threads=2)
    slots = [block * 32 + at for block in (5, 2, 9) for at in range(32)][:70]
    # The first layer's keys and values come from the same numbers in both.
    for codes, scales, values in (
        (pool.keys, pool.key_scales, exact.keys),
        (pool.values, pool.value_scales, exact.values),
    ):
        twin_codes, twin_scales = quantised(values[0][:, slots])
        assert torch.equal(codes[0][:, slots], twin_codes)
        assert torch.equal(scales[0][:, slots], twin_scales)
    assert 0 < distance(found, wanted) < 0.02
    by_torch_pool = KVPool(model.config, 24, steps.BLOCK_TOKENS, torch.int8)
    runner = Runner(model, by_torch_pool, compiled=False)
    assert distance(found, runner.score(ids, 0, [5, 2, 9], range(70))) < 0.003


def test_an_int8_cache_loses_nothing_that_is_not_finite(tiny_path: Callable[..., Path]) -> None:
    model, pool, _ = loaded(tiny_path(weights="Q8_0"), torch.int8)
    model.layers[1].attention_norm[3] = float("nan")
    compiled = CompiledStep.of(model, pool)
    assert compiled is not None
    assert compiled.run([1, 2], [Tokens(0, 2, 0, [0])], [1], 1).isnan().any()


@pytest.mark.parametrize("kv", [torch.float32, torch.bfloat16, torch.int8])
def test_a_step_may_be_set_aside_at_any_moment(tiny_path: Callable[..., Path], kv: torch.dtype) -> None:
    """Another step in between changes nothing, to the bit, and every call does some more: at least a phase of a layer,
    of its attention a job for each thread."""
    path = tiny_path(weights="Q8_0", n_layers=3)
    prompt, other = [(7 * n) % 250 for n in range(70)], [(11 * n) % 250 for n in range(90)]
    parts = [Tokens(0, 40, 0, [5, 2], prompt=True), Tokens(40, 30, 0, [9], prompt=True)]
    _, _, compiled = loaded(path, kv)
    expected = compiled.run(prompt, parts, [39, 69], threads=2)
    after = compiled.run([3], [Tokens(0, 1, 40, [5, 2])], [0], threads=2)
    beside = compiled.run(other, [Tokens(0, 90, 0, [7, 1, 3], prompt=True)], [89], threads=2)
    _, _, compiled = loaded(path, kv)
    going, places = compiled.begin(prompt, parts, [39, 69]), [(0, 0, 0)]
    while (found := compiled.go_on(going, 2, seconds=0.0)) is None:
        places.append((going.step.layer, going.step.phase, going.step.job))
        between = compiled.run(other, [Tokens(0, 90, 0, [7, 1, 3], prompt=True)], [89], threads=2)
        assert torch.equal(between, beside)
    assert sorted(set(places)) == places
    assert {place[:2] for place in places} == {(layer, phase) for layer in range(3) for phase in range(4)}
    assert {job for layer, phase, job in places if phase == 1} > {0, 2}, "attention is not done at once"
    assert torch.equal(found, expected)
    assert torch.equal(compiled.run([3], [Tokens(0, 1, 40, [5, 2])], [0], threads=2), after)
    _, _, compiled = loaded(path, kv)
    given_up, going = (compiled.begin(prompt, parts, [39, 69]) for _ in range(2))
    with pytest.raises(AssertionError):
        compiled.go_on(given_up, 2)
    found = compiled.go_on(going, 2, seconds=60.0)
    assert found is not None, "all of it, where there is time"
    assert torch.equal(found, expected)


@pytest.mark.parametrize("start", [0, 900])
def test_its_workspace_is_in_the_plan(tiny_path: Callable[..., Path], start: int) -> None:
    shape = {"dim": 256, "n_heads": 4, "n_kv_heads": 2, "head_dim": 64, "ffn_dim": 512, "context": 2048}
    model, pool, compiled = loaded(tiny_path(weights="Q8_0", **shape), blocks=40)
    prompt = [1] * CHUNK_TOKENS, [Tokens(0, CHUNK_TOKENS, start, range(40), prompt=True)], [CHUNK_TOKENS - 1]
    compiled.run(*prompt, 2)
    aside = compiled.begin(*prompt)
    assert compiled.go_on(aside, 2, seconds=0.0) is None
    compiled.run([1] * MAX_RUNNING, [Tokens(n, 1, start, range(40)) for n in range(MAX_RUNNING)], range(MAX_RUNNING), 2)
    assert compiled.go_on(aside, 2) is not None
    beside = 4 * CHUNK_TOKENS * (model.config.dim + model.config.head_dim)  # the residual stream and rope's turns
    assert compiled.workspace_bytes() + beside <= workspace_bytes(model.config)


# attention by itself -----------------------------------------------------------------------------------------------

FLAGS = {
    "this processor": (),
    "AVX2": ("-mno-avx512f",),
    "SSE2": ("-mno-avx512f", "-mno-avx2", "-mno-avx", "-mno-fma"),
}


@pytest.fixture(scope="module", params=FLAGS)
def probe(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if request.param != "this processor" and b"avx512f" not in build._processor():
        pytest.skip("not run: for processors with AVX-512, to try the code of lesser ones")
    compiler = build._compiler()
    assert compiler is not None
    library = tmp_path_factory.mktemp("probe") / "probe.so"
    folder = Path(build.__file__).parent
    source = Path(__file__).parent / "attention_probe.c"
    flags = ["-shared", *build.FLAGS, *build.MORE_FLAGS["step"], *FLAGS[request.param], "-w"]
    subprocess.run([compiler, *flags, f"-I{folder}", "-o", str(library), str(source)], check=True)
    return ctypes.CDLL(str(library))


def probed(
    probe: ctypes.CDLL, query: torch.Tensor, spans: list[tuple[int, int, int]], tables: list[list[int]],
    cached: list[torch.Tensor], window: int | None, threads: int,
) -> torch.Tensor:  # fmt: skip
    """cached: keys and values (n_kv_heads, slots, head_dim), and their scales where they are int8."""
    keys, values, *scales = cached
    tools, whole = steps.tools(), ctypes.c_int64
    out, scaled = torch.empty_like(query), (query / math.sqrt(query.shape[2])).contiguous()
    described = torch.tensor(spans, dtype=torch.int64)
    most = max(map(len, tables))
    blocks = torch.tensor([table + [0] * (most - len(table)) for table in tables], dtype=torch.int32)
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (scaled, out, described, blocks, keys, values)]
    a, b, c, d, e, f = pointers
    g, h = [ctypes.c_void_p(scale.data_ptr()) for scale in scales] if scales else (None, None)
    sizes = [whole(size) for size in (query.shape[1], keys.shape[0], query.shape[2], window or 0)]
    done = probe.probe(
        a, b, c, whole(len(spans)), d, whole(most), e, f, g, h, whole(keys.stride(0) * keys.itemsize),
        ctypes.c_int(steps.KINDS[keys.dtype]), *sizes, ctypes.c_void_p(tools.suri_parallel), ctypes.c_int(threads),
    )  # fmt: skip
    assert done
    return out


SHAPES = [
    (64, 9, 3, torch.bfloat16),
    (128, 4, 4, torch.bfloat16),
    (96, 8, 1, torch.bfloat16),
    (128, 4, 4, torch.float16),
    (100, 4, 2, torch.float32),
    (16, 32, 1, torch.bfloat16),
    (64, 9, 3, torch.int8),
    (100, 4, 2, torch.int8),
]


@pytest.mark.parametrize(("head_dim", "heads", "kv_heads", "kind"), SHAPES)
@pytest.mark.parametrize("window", [None, 40])
def test_attention_is_that_of_the_formula(
    probe: ctypes.CDLL, head_dim: int, heads: int, kv_heads: int, kind: torch.dtype, window: int | None
) -> None:
    random = torch.Generator().manual_seed(1)
    keys, values = (torch.randn(kv_heads, 40 * 32, head_dim, generator=random) for _ in range(2))
    keys[:, 39 * 32 :] = float("nan")  # a block nobody has
    places = torch.randperm(39, generator=random).tolist()
    spans, tables = (
        [(0, 1, 600), (1, 5, 30), (6, 9, 250), (15, 1, 0)],
        [places[:22], places[22:24], places[24:33], [places[33]]],
    )
    for (_, count, start), table in zip(spans, tables, strict=True):
        for at in range(start + count, len(table) * 32):  # nor has anybody written to a last block's end
            keys[:, table[at // 32] * 32 + at % 32] = values[:, table[at // 32] * 32 + at % 32] = float("nan")
    if kind == torch.int8:
        (keys, key_scales), (values, value_scales) = quantised(keys), quantised(values)
        cached = [keys, values, key_scales, value_scales]
        keys, values = values_of(keys, key_scales, torch.float32), values_of(values, value_scales, torch.float32)
    else:
        cached = [keys, values] = [keys.to(kind), values.to(kind)]
    query = 2 * torch.randn(16, heads, head_dim, generator=random)
    found = probed(probe, query, spans, tables, cached, window, threads=1)
    assert torch.equal(found, probed(probe, query, spans, tables, cached, window, threads=8))
    for (first, count, start), table in zip(spans, tables, strict=True):
        slots = torch.tensor([block * 32 + at for block in table for at in range(32)])[: start + count]
        expected = attention_twin(query[first : first + count], keys[:, slots], values[:, slots], window)
        assert (found[first : first + count] - expected).abs().max() < 2e-5
        last = query[first + count - 1 : first + count].contiguous()
        alone = probed(probe, last, [(0, 1, start + count - 1)], [table], cached, window, threads=2)
        assert torch.equal(alone[0], found[first + count - 1])


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.int8])
@pytest.mark.parametrize(("head_dim", "heads", "kv_heads"), [(64, 9, 3), (128, 4, 4), (32, 8, 1)])
@pytest.mark.parametrize("window", [None, 40])
def test_attention_of_prompts_is_that_of_the_formula(
    probe: ctypes.CDLL, head_dim: int, heads: int, kv_heads: int, kind: torch.dtype, window: int | None
) -> None:
    """In bfloat16 where there is AMX. Among one another, beside few tokens, on any number of threads."""
    random = torch.Generator().manual_seed(1)
    keys, values = (torch.randn(kv_heads, 40 * 32, head_dim, generator=random) for _ in range(2))
    keys[:, 39 * 32 :] = values[:, 39 * 32 :] = float("nan")  # a block nobody has
    places = torch.randperm(39, generator=random).tolist()
    spans = [(0, 3, 20), (3, 40, 300), (43, 100, 0), (143, 17, 511)]
    tables = [places[:1], places[1:12], places[12:16], places[16:33]]
    for (_, count, start), table in zip(spans, tables, strict=True):
        for at in range(start + count, len(table) * 32):  # nor has anybody written to a last block's end
            keys[:, table[at // 32] * 32 + at % 32] = values[:, table[at // 32] * 32 + at % 32] = float("nan")
    if kind == torch.int8:
        (keys, key_scales), (values, value_scales) = quantised(keys), quantised(values)
        cached = [keys, values, key_scales, value_scales]
        keys, values = values_of(keys, key_scales, torch.float32), values_of(values, value_scales, torch.float32)
    else:
        cached = [keys, values] = [keys.to(kind), values.to(kind)]
    query = 2 * torch.randn(160, heads, head_dim, generator=random)
    query[7, 0] = float("nan")
    found = probed(probe, query, spans, tables, cached, window, threads=1)
    assert torch.equal(found[8:], probed(probe, query, spans, tables, cached, window, threads=8)[8:])
    assert found[7, 0].isnan().all()
    query[7, 0], found[7, 0] = 0.0, 0.0
    for (first, count, start), table in zip(spans, tables, strict=True):
        slots = torch.tensor([block * 32 + at for block in table for at in range(32)])[: start + count]
        expected = attention_twin(query[first : first + count], keys[:, slots], values[:, slots], window)
        own = found[first : first + count]
        if first == 3:
            own[4, 0] = expected[4, 0]
        assert (own - expected).abs().max() < (2e-5 if count <= 16 else 0.03)
        coarse = 0.004 if kind == torch.bfloat16 else 0.008
        assert (own - expected).pow(2).mean().sqrt() < coarse * expected.pow(2).mean().sqrt()


def test_turns_are_those_of_the_rope_wherever_a_sequence_stands() -> None:
    rope = Rope(8, 10_000.0)
    turns = _Turns(rope, 8, 2 * TURNS_AT_ONCE + 7)
    for end in (1, 6, TURNS_AT_ONCE, TURNS_AT_ONCE + 1, 3, 2 * TURNS_AT_ONCE + 7):
        expected = torch.view_as_real(rope.turns(torch.arange(end))).flatten(1)
        assert torch.equal(turns.until(end)[:end], expected)
    with pytest.raises(IndexError):
        turns.until(2 * TURNS_AT_ONCE + 8)
