"""Threads are chosen by what a step has to do, the same way every time."""

from __future__ import annotations

import pytest
import torch

from backend.engine.threads import BYTES_PER_THREAD, Threads


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
