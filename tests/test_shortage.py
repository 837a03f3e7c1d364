"""Memory that runs out in a step: smaller pieces, then one request less; the others go on and say the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from backend.engine.shortage import SMALLEST_PIECE
from backend.params import GenerationParams
from tests.real import read, tiny_runtime
from tests.tiny import write_tiny

LONG = GenerationParams(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, max_tokens=40, seed=3)
ERRORS = [
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
]


@pytest.fixture
def runtime(tmp_path: Path):
    runtime = tiny_runtime(write_tiny(tmp_path / "tiny.gguf"), speculation="off")  # the steps are counted
    yield runtime
    runtime.close(drain=False)


class Memory:
    """Stands before a runner: a step of more than `tokens` tokens, or with more than `sequences`, has no memory."""

    def __init__(self, runtime, error: Exception, tokens: int = 10**9, sequences: int = 10**9) -> None:
        self._run, self.error, self.tokens, self.sequences = runtime.runner.run, error, tokens, sequences
        self.steps: list[int] = []
        runtime.runner.run = self.run

    def run(self, work):
        tokens = sum(item.tokens for item in work)
        if tokens > self.tokens or len(work) > self.sequences:
            raise self.error
        self.steps.append(tokens)
        return self._run(work)


@pytest.mark.parametrize("error", ERRORS, ids=["MemoryError", "CPU", "CUDA"])
def test_a_long_prompt_is_read_in_smaller_pieces(runtime, error):
    prompt = list(range(3, 153))
    expected = read(runtime.start(prompt, LONG, use_cache=False))[1]
    memory = Memory(runtime, error, tokens=40)
    _, ids, last = read(runtime.start(prompt, LONG, use_cache=False))
    assert (ids, last.finish_reason) == (expected, "length")
    assert memory.steps[0] in (32, 37)  # 128, or all 150 where that is quick; half was too much as well
    assert sum(memory.steps) == len(prompt) + 39
    assert runtime.blocks.in_use == 0


def test_what_cannot_be_made_smaller_costs_the_largest_request_only(runtime):
    prompts = [list(range(3, 60)), list(range(3, 90)), list(range(100, 110))]
    params = GenerationParams.from_mapping({"max_tokens": 60}, LONG)
    expected = [read(runtime.start(prompt, params, use_cache=False))[1] for prompt in prompts]
    replies = [runtime.start(prompt, params, use_cache=False) for prompt in prompts]
    while any(not reply.stats.completion_tokens for reply in replies):
        pass
    Memory(runtime, ERRORS[1], sequences=2)
    ends = [read(reply) for reply in replies]
    assert [last.finish_reason for _, _, last in ends] == ["length", "error", "length"]
    assert [ends[0][1], ends[2][1]] == [expected[0], expected[2]]
    error = ends[1][2].error
    assert error.code == "out_of_memory"
    assert error.extra["free_bytes"] > 0
    assert "shorten the chat" in error.message
    assert runtime.blocks.in_use == 0


def test_without_any_memory_every_request_ends_and_the_next_one_works(runtime):
    memory = Memory(runtime, ERRORS[0], tokens=0)
    ends = [read(runtime.start(list(range(3, 60)), LONG))[2] for _ in range(2)]
    assert [(end.finish_reason, end.error.code) for end in ends] == [("error", "out_of_memory")] * 2
    memory.tokens = SMALLEST_PIECE
    assert read(runtime.start(list(range(3, 60)), LONG))[2].finish_reason == "length"
    assert runtime.blocks.in_use == 0


def test_another_failure_is_not_taken_for_a_lack_of_memory(runtime):
    Memory(runtime, RuntimeError("shapes cannot be multiplied"), tokens=0)
    assert read(runtime.start([5, 6, 7], LONG))[2].error.code == "engine_error"
