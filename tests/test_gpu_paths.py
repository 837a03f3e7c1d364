"""What runs on other devices, exercised on the CPU: attention by torch's choice, paged decoding, graph bookkeeping.

The kernels themselves: test_cuda_kernels.py. A real device: test_gpu.py.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch

from backend.cache.kv import KVPool
from backend.checkpoint.open import open_checkpoint
from backend.engine.decode import Decoder
from backend.engine.graphs import SIZES, Graphs
from backend.engine.runner import Runner, _Span
from backend.engine.scheduler import Work
from backend.model import paged
from backend.model.attention import attention_twin, joined_attention
from backend.model.rope import Rope, turned_by_pairs
from backend.placement.load import load_model
from tests.tiny import TinyModel, write_tiny

BLOCK = 32


# attention ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("window", [None, 5, 39, 40, 100])
@pytest.mark.parametrize(("new", "lengths"), [(1, [40]), (13, [30, 7, 3]), (40, [16, 24]), (2, [1, 39])])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2)])
def test_joined_attention_equals_the_formula(heads, kv_heads, new, lengths, window, aligned):
    torch.manual_seed(new)
    query = torch.randn(new, heads, 16)
    keys, values = torch.randn(kv_heads, 40, 16), torch.randn(kv_heads, 40, 16)
    runs = list(zip((k.clone() for k in keys.split(lengths, 1)), (v.clone() for v in values.split(lengths, 1))))
    expected = attention_twin(query, keys, values, window)
    ours = joined_attention(query, runs, window, aligned=aligned)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("interleaved", [True, False])
def test_turning_by_pairs_is_turning_by_complex_numbers(interleaved):
    rope = Rope(16, 10000.0, interleaved=interleaved)
    turns, x = rope.turns(torch.tensor([0, 5, 100_000])), torch.randn(3, 4, 16)
    pairs = torch.view_as_real(turns)
    torch.testing.assert_close(turned_by_pairs(x, pairs, interleaved), rope.apply(x, turns), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rope.apply(x, pairs), rope.apply(x, turns), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("window", [None, 7])
def test_paged_twin_equals_the_formula(window):
    torch.manual_seed(0)
    lengths, page = [1, 32, 70], 32
    keys, values = torch.randn(2, 8 * page, 16), torch.randn(2, 8 * page, 16)
    keys[:, 7 * page :] = values[:, 7 * page :] = float("nan")  # a block that is nobody's
    table = torch.tensor([[5, 7, 7], [2, 7, 7], [6, 0, 3]], dtype=torch.int32)
    query = torch.randn(3, 6, 16)
    found = paged.decode(query, keys, values, table, torch.tensor(lengths, dtype=torch.int32), page, window)
    for row, length in enumerate(lengths):
        slots = [int(table[row, at // page]) * page + at % page for at in range(length)]
        expected = attention_twin(query[row : row + 1], keys[:, slots], values[:, slots], window)
        torch.testing.assert_close(found[row : row + 1].double(), expected, rtol=1e-5, atol=1e-6)


# graphs ---------------------------------------------------------------------------------------------------------------


class Recorder:
    """Replays by computing again, and fails when it is told to."""

    def __init__(self, fails: bool = False) -> None:
        self.fails, self.recorded, self.replayed = fails, 0, 0

    def record(self, compute: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.recorded += 1
        result = compute().clone()

        def replay() -> None:
            self.replayed += 1
            result.copy_(compute())

        return replay, result


@pytest.mark.parametrize("count", range(1, 17))
def test_a_graph_gives_what_computing_gives(count):
    seen: list[torch.Tensor] = []

    def compute(rows: torch.Tensor) -> torch.Tensor:
        seen.append(rows.clone())
        return rows[:, :2].float() * 2

    recorder = Recorder()
    graphs = Graphs(compute, 4, torch.device("cpu"), recorder)
    for turn in range(5):
        rows = torch.arange(count * 3, dtype=torch.int32).view(count, 3) + 100 * turn
        assert torch.equal(graphs.run(rows), rows[:, :2].float() * 2)
    size = min(number for number in SIZES if number >= count)
    assert all(rows.shape == (size, 4) for rows in seen), "one shape for all batches of this size"
    assert torch.equal(seen[-1][count:], seen[-1][:1].expand(size - count, 4)), "filled up with the first row"
    assert (graphs.captured, graphs.replayed) == (1, 4) == (recorder.recorded, recorder.replayed)


def test_sizes_are_captured_one_by_one_on_their_second_use():
    graphs = Graphs(lambda rows: rows.float(), 1, torch.device("cpu"), Recorder())
    counts = []
    for count in (1, 3, 1, 4, 16, 1):
        graphs.run(torch.zeros(count, 1, dtype=torch.int32))
        counts.append((graphs.captured, graphs.replayed))
    assert counts == [(0, 0), (0, 0), (1, 1), (2, 2), (2, 2), (2, 3)]


def test_a_capture_that_fails_is_not_tried_again(caplog):
    graphs = Graphs(lambda rows: rows.float() + 1, 1, torch.device("cpu"), Recorder(fails=True))
    with caplog.at_level(logging.WARNING):
        for count in (1, 1, 1, 2, 2):
            rows = torch.full((count, 1), count, dtype=torch.int32)
            assert torch.equal(graphs.run(rows), rows.float() + 1)
    assert graphs.captured == graphs.replayed == 0
    assert len(caplog.records) == 1
    assert "CUDA graphs cannot be used" in caplog.text


# the decoder ----------------------------------------------------------------------------------------------------------


@dataclass
class Lease:
    blocks: list[int]


@dataclass
class Sequence:
    """What a runner looks at in a request."""

    ids: list[int]
    lease: Lease
    computed: int = 0
    score_prompt: bool = False
    prompt: tuple[int, ...] = ()


@dataclass
class Batch:
    sequences: list[Sequence] = field(default_factory=list)

    def work(self, decode: bool) -> list[Work]:
        return [Work(s, 1 if decode else len(s.ids) - s.computed) for s in self.sequences]  # type: ignore[arg-type]

    def advance(self, logits: torch.Tensor) -> None:
        for sequence, row in zip(self.sequences, logits, strict=True):
            sequence.computed = len(sequence.ids)
            sequence.ids.append(int(row.argmax()))


@pytest.mark.parametrize("kind", [torch.float32, torch.int8])
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("count", [1, 3])
def test_the_decoder_gives_the_logits_of_the_runner(tmp_path, count, window, kind):
    keys = {} if window is None else {"llama.attention.sliding_window": window}
    model = load_model(open_checkpoint(write_tiny(tmp_path / "m.gguf", TinyModel(metadata=keys))), "f32", "tiny").model
    assert model.config.sliding_window == window
    pool = KVPool(model.config, 16, BLOCK, kind)
    runner, recorder = Runner(model, pool), Recorder()
    decoder = Decoder(model, pool, paged, recorder)  # type: ignore[arg-type]
    starts = [[5, 11, 3], [0, 7, 9], [2, 8, 1]][:count]
    batch = Batch([Sequence([9, 8, 7] * (8 * n + 10), Lease(blocks)) for n, blocks in enumerate(starts)])
    assert not decoder.takes(batch.work(False))
    batch.advance(runner.run(batch.work(False)))
    for _ in range(6):
        work = batch.work(True)
        assert decoder.takes(work)
        found = decoder.run(work).clone()
        stored = pool.keys.clone()
        expected = runner.run(work)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        used = [slot for s in batch.sequences for slot in slots(s)]
        same = {"rtol": 1e-4, "atol": 1e-4} if kind == torch.float32 else {"rtol": 0, "atol": 1}  # a code may tip over
        torch.testing.assert_close(stored[:, :, used], pool.keys[:, :, used], **same)
        batch.advance(expected)
    assert (recorder.recorded, recorder.replayed) == (1, 5)


def slots(sequence: Sequence) -> list[int]:
    return [sequence.lease.blocks[at // BLOCK] * BLOCK + at % BLOCK for at in range(sequence.computed + 1)]


def test_what_the_decoder_leaves_to_the_runner(tmp_path):
    model = load_model(open_checkpoint(write_tiny(tmp_path / "m.gguf")), "f32", "tiny").model
    decoder = Decoder(model, KVPool(model.config, 4, BLOCK, torch.float32), paged, None)  # type: ignore[arg-type]
    one = Sequence([1, 2, 3], Lease([0]), 2)
    assert decoder.takes([Work(one, 1)] * 16)  # type: ignore[arg-type]
    assert not decoder.takes([Work(one, 1)] * 17)  # type: ignore[arg-type]
    assert not decoder.takes([])
    assert not decoder.takes([Work(one, 1), Work(Sequence([1, 2, 3], Lease([1])), 1)])  # type: ignore[arg-type]


# devices --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", ["F32", "BF16", "Q4_1", "Q5_0", "Q8_0"])
@pytest.mark.parametrize("weights", ["original", "bf16", "int8", "int4", "nf4"])  # llm-int8 in torch looks at numbers
def test_nothing_of_a_model_stays_behind_on_the_cpu(tmp_path, fmt, weights):
    """The "meta" device has shapes and no numbers; like any other device it refuses to mix with tensors of the CPU."""
    checkpoint = open_checkpoint(write_tiny(tmp_path / "m.gguf", TinyModel(weights=fmt, rope_freqs=True)))
    model = load_model(checkpoint, weights, "tiny", device="meta").model
    pool = KVPool(model.config, 4, BLOCK, torch.float16, "meta")
    runner = Runner(model, pool)
    assert runner.device.type == "meta"
    rows = torch.zeros(2, 5, dtype=torch.int32, device="meta")
    with torch.inference_mode():
        for tokens in (1, 5):
            span = _Span(0, tokens, pool.table([2, 0], 33, 33 + tokens))
            ids, positions, last = (torch.zeros(n, dtype=torch.int64, device="meta") for n in (tokens, tokens, 1))
            logits = model.forward(ids, positions, runner._attend([span]), last)
            assert (logits.device.type, logits.shape) == ("meta", (1, model.config.vocab_size))
        logits = Decoder(model, pool, paged, None)._compute(rows)  # type: ignore[arg-type]
    assert (logits.device.type, logits.shape) == ("meta", (2, model.config.vocab_size))
