"""Evicted blocks in host memory, on real tensors: what comes back is what left, and replies do not change."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from backend.cache.blocks import BlockCopy, BlockPool, BlockRestore, BlockStore
from backend.cache.host import HostTier
from backend.cache.int8 import quantised, values_of
from backend.cache.kv import AT_ONCE, KV_TYPES, KVPool, SequenceSlots
from backend.engine.engine import Engine
from backend.engine.request import Request
from backend.engine.runner import Runner
from backend.kernels.cpu.memory import populate
from backend.model.attention import attention, attention_twin
from backend.model.config import ModelConfig
from backend.params import GenerationParams
from backend.presets import Preset
from backend.runtime import Prepared, Runtime
from tests.real import read

GREEDY = GenerationParams(temperature=0, max_tokens=6)
BLOCK = 32
SHAPE = ModelConfig("llama", "m", 64, 2, 4, 2, 16, 128, 100, 256, 1e-5)


def runtime(path: Path, **keys: object) -> Runtime:
    return Runtime(Prepared(Preset("tier", str(path), speculation="off", **keys), path), max_waiting=8)  # type: ignore[arg-type]


def prompt(number: int, length: int) -> list[int]:
    return [(number * 37 + 7 * at) % 250 for at in range(length)]


# a pool and its tier ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KV_TYPES)
def test_moves_carry_whole_blocks_of_every_array(kind: str) -> None:
    pool = KVPool(SHAPE, 4, BLOCK, KV_TYPES[kind], host_bytes=1 << 20)
    assert pool.host is not None
    assert pool.host.grow() > 3
    for array in pool.arrays:
        array.copy_(torch.randint(-100, 100, array.shape))
    before = [[each.clone() for each in pool.block(number)] for number in range(4)]

    def same(number: int, old: int, tokens: int = BLOCK) -> bool:
        pairs = zip(pool.block(number), before[old], strict=True)
        return all(torch.equal(new[:, :, :tokens], was[:, :, :tokens]) for new, was in pairs)

    # In their order: the block that leaves is overwritten by one that came from it.
    pool.carry_out([BlockStore(1, 3), BlockCopy(2, 1, 9), BlockRestore(3, 0)])
    assert same(0, 1)
    assert same(1, 2, tokens=9)
    assert not same(1, 2)
    assert same(2, 2)
    assert same(3, 3)
    assert pool.nbytes() == 4 * pool.host.block_bytes


def test_a_tier_takes_memory_as_it_grows_and_never_more_than_its_limit() -> None:
    tier = HostTier([((2, 2, 32, 64), torch.float32), ((2, 2, 32), torch.float32)], 200 << 20, pinned=False)
    assert (tier.slots, tier.nbytes()) == (0, 0)
    sizes = [tier.grow() for _ in range(6)]
    assert sizes[0] * tier.block_bytes <= 64 << 20
    assert sizes == sorted(sizes)
    assert sizes[-1] == (200 << 20) // tier.block_bytes
    assert tier.nbytes() == sizes[-1] * tier.block_bytes <= 200 << 20
    assert KVPool(SHAPE, 2, BLOCK, torch.float32, host_bytes=tier.block_bytes // 8).host is None


@pytest.mark.skipif(sys.platform != "linux", reason="not run: pages are asked for on Linux only")
def test_memory_taken_ahead_is_there_and_keeps_what_is_in_it() -> None:
    pool = KVPool(dataclasses.replace(SHAPE, n_layers=3), 2000, BLOCK, torch.float32)
    pool.keys[1, 0, 5:9] = 7.0
    if not pool.take_ahead(populate):
        pytest.skip("not run: a system before Linux 5.14")
    while pool.take_ahead(populate):
        pass
    assert bool((pool.keys[1, 0, 5:9] == 7.0).all())
    begin = _faults()
    for array in pool.arrays:
        array.fill_(1.0)
    assert _faults() - begin < 64, "no page is new"
    assert not pool.take_ahead(populate)


def test_memory_is_taken_ahead_in_pieces_that_huge_pages_fit_in() -> None:
    pool, pieces = KVPool(dataclasses.replace(SHAPE, n_layers=3), 2000, BLOCK, torch.float32), []
    while pool.take_ahead(lambda address, count: pieces.append((address, count)) or True):
        pass
    at = iter(pieces)
    for array in pool.arrays:
        address, end = array.data_ptr(), array.data_ptr() + array.nbytes
        while address < end:
            first, count = next(at)
            assert first == address
            address += count
            assert address % AT_ONCE == 0 or address == end
        assert address == end
    assert next(at, None) is None


def _faults() -> int:
    import resource  # no module of Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def test_where_the_system_gives_no_memory_the_tier_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    tier = HostTier([((2, 2, 32, 64), torch.float32)], 200 << 20, pinned=False)
    had = tier.grow()

    def nothing_left(*_: object, **__: object) -> torch.Tensor:
        raise RuntimeError("can't allocate memory")

    monkeypatch.setattr(torch, "empty", nothing_left)
    assert tier.grow() == had
    monkeypatch.undo()
    assert tier.grow() == had


# replies ----------------------------------------------------------------------------------------------------------

WAYS = {
    "float32, step by step": ({"weights": "F32"}, {"weights": "f32"}),
    "one compiled call": ({"weights": "Q4_1"}, {}),
    "one compiled call, int8": ({"weights": "Q4_1"}, {"kv_cache": "int8"}),
}


@pytest.mark.parametrize(("model", "keys"), WAYS.values(), ids=WAYS.keys())
def test_replies_are_the_same_after_their_blocks_left_and_came_back(
    tiny_path: Callable[..., Path], model: dict[str, object], keys: dict[str, object]
) -> None:
    """A pool for one chat and a bit, four chats in turns: each turn evaluates only what is new."""
    running = runtime(tiny_path(**model), context=256, kv_tokens=256, cache_ram=8 << 20, **keys)
    chats = [prompt(number, 100) for number in range(4)]
    for turn in range(3):
        for number, chat in enumerate(chats):
            reply = running.start_text(chat, GREEDY)
            ids = read(reply)[1]
            alone = running.start_text(chat, GREEDY, use_cache=False)
            assert read(alone)[1] == ids
            # Of the reply, the last token was never evaluated.
            assert reply.stats.evaluated_tokens == (100 if turn == 0 else 10 + 1)
            chats[number] = [*chat, *ids, *prompt(turn + 9, 10)]
    counts = running.blocks.counts
    assert counts.restored > 8
    assert counts.dropped == 0
    assert running.held().ram > 0
    running.close(drain=False)


def test_blocks_that_never_left_give_the_same_bits(tiny_path: Callable[..., Path]) -> None:
    """The logits after a way through the host tier are those of a pool with room for everything."""
    path = tiny_path(weights="Q4_1")
    large, small = runtime(path, kv_tokens=2048), runtime(path, context=256, kv_tokens=256, cache_ram=4 << 20)
    found = []
    for running in (large, small):
        for number in (1, 2, 1, 2):
            chunks = list(running.start_text(prompt(number, 200), GREEDY, top_logprobs=3))
            found.append([top for chunk in chunks for top in chunk.top_logprobs])
        running.close(drain=False)
    assert all(len(each) == 6 for each in found)
    assert small.blocks.counts.restored > 0
    assert large.blocks.counts.evicted == 0
    assert found[:4] == found[4:]


class Listening:
    """Takes tokens and does nothing with them."""

    def on_token(self, token_id: int, logprob: float | None, **_: object) -> bool:
        return False

    def on_finish(self, reason: str, error: Exception | None = None) -> None:
        assert error is None


def test_a_sequence_that_gave_its_blocks_away_goes_on_from_the_host_tier(tiny_path: Callable[..., Path]) -> None:
    """Two that do not fit together: one waits, and when its turn comes it reads nothing again."""
    running = runtime(tiny_path(weights="Q4_1"), context=256)
    model = running.runner.model
    pool = KVPool(model.config, 10, BLOCK, torch.bfloat16, host_bytes=4 << 20)
    blocks = BlockPool(10, BLOCK, pool.host)
    runner = Runner(model, pool)
    for each in (running.runner, runner):
        each.be_uniform()
    engine = Engine(runner, blocks)
    params = GenerationParams(temperature=0, max_tokens=100)
    requests = [Request(tuple(prompt(number, 120)), params, frozenset(), Listening(), 256) for number in range(3)]
    for request in requests:
        engine.submit(request)
    while not engine.idle:
        engine.step()
    assert engine.scheduler.counts.preemptions > 0
    assert all(request.evaluated == 120 for request in requests), "somebody read a part of its prompt twice"
    for request in requests:
        alone = running.start_text(request.prompt, params)
        assert list(request.ids[120:]) == read(alone)[1]
    running.close(drain=False)


def test_the_starter_says_the_same_after_its_blocks_left_and_came_back(starter_path: Path) -> None:
    running = runtime(starter_path, context=64, kv_tokens=64, cache_ram=64 << 20)
    text = "The quick brown fox jumps over the lazy dog, and the dog says: "
    chats = [running.prompting.encode_text(f"{number}. {text}" * 3) for number in range(3)]
    params = GenerationParams(temperature=0, max_tokens=3)
    first = [read(running.start_text(chat, params))[1] for chat in chats]
    again = [running.start_text(chat, params) for chat in chats]
    assert [read(reply)[1] for reply in again] == first
    assert [reply.stats.evaluated_tokens for reply in again] == [0, 0, 0]
    assert running.blocks.counts.restored >= 4
    assert running.held().ram > 0
    running.close(drain=False)


# int8 -------------------------------------------------------------------------------------------------------------


def test_int8_is_off_by_at_most_half_a_step() -> None:
    values = torch.randn(5, 3, 64, generator=torch.Generator().manual_seed(1)) * torch.logspace(-6, 6, 5)[:, None, None]
    codes, scales = quantised(values)
    assert codes.dtype == torch.int8
    largest = values.abs().amax(-1)
    assert torch.equal(codes.abs().amax(-1), torch.full_like(largest, 127, dtype=torch.int8))
    off = (values_of(codes, scales, torch.float32).double() - values.double()).abs().amax(-1)
    assert bool((off <= largest.double() / 254 * (1 + 1e-5)).all())


def test_int8_of_nothing_and_of_what_is_no_number() -> None:
    values = torch.zeros(4, 8)
    values[1, 3], values[2, 3], values[3] = float("nan"), float("-inf"), 1e-38
    codes, scales = quantised(values)
    back = values_of(codes, scales, torch.float32)
    assert torch.equal(back[0], torch.zeros(8))
    assert bool(back[1:3].isnan().all())
    assert torch.equal(back[3], torch.zeros(8))


@pytest.mark.parametrize("window", [None, 40])
def test_attention_over_an_int8_cache_is_that_over_its_values(window: int | None) -> None:
    generator = torch.Generator().manual_seed(2)
    pool = KVPool(SHAPE, 6, BLOCK, torch.int8)
    keys, values = (torch.randn(100, 2, 16, generator=generator) for _ in range(2))
    table = pool.table([4, 1, 2, 5], 0, 100)
    pool.store(1, table, keys, values)
    query = torch.randn(100, 4, 16, generator=generator)[-7:]
    runs = pool.read(1, SequenceSlots(table.all, table.new))
    assert [run.shape[1] for run, _ in runs] == [32, 64, 4]
    seen_keys, seen_values = (torch.cat(each, dim=1) for each in zip(*runs, strict=True))
    for found, wanted in ((seen_keys, keys), (seen_values, values)):
        assert torch.equal(found, values_of(*quantised(wanted.transpose(0, 1)), torch.float32))
    expected = attention_twin(query, seen_keys, seen_values, window)
    assert (attention(query, runs, window) - expected).abs().max() < 1e-5
    exact = attention_twin(query, keys.transpose(0, 1), values.transpose(0, 1), window)
    assert 0 < (expected - exact).abs().max() < 0.03
