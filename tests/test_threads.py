"""Threads are chosen by what a step has to do, the same way every time."""

from __future__ import annotations

import pytest
import torch

from backend.engine.threads import BYTES_PER_THREAD, LARGE_PRODUCT, AllThreads, Threads
from backend.model.llama import Llama


@pytest.mark.parametrize(
    ("cores", "size", "few"),
    [(1, 1, 1), (2, 1, 1), (2, BYTES_PER_THREAD, 1), (2, BYTES_PER_THREAD + 1, 2), (16, 4_000_000_000, 16)],
)
def test_few_tokens_use_as_many_threads_as_have_work(cores, size, few):
    assert Threads(cores, size).few == few


def test_a_long_step_uses_all():
    before = torch.get_num_threads()
    try:
        threads = Threads(2, 1)
        threads.use(1)
        assert torch.get_num_threads() == 1
        threads.use(100)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_large_output_brings_its_own_threads():
    seen = []

    def multiply(x):
        seen.append(torch.get_num_threads())
        return x

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        AllThreads(multiply, 2)(torch.zeros(1))
        assert seen == [2]
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_only_a_large_output_is_fitted():
    model = Llama(None, None, (), None, lambda x: x, None)
    assert Threads(2, 1).fitted(model, LARGE_PRODUCT - 1) is model
    assert Threads(2, 2 * BYTES_PER_THREAD).fitted(model, LARGE_PRODUCT) is model  # all threads anyway
    assert isinstance(Threads(2, 1).fitted(model, LARGE_PRODUCT).output, AllThreads)
