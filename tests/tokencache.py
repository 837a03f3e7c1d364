"""A model without weights whose cache holds tokens in place of keys and values, for tests of who may write where.

It sees nothing of a sequence but what the blocks of its lease hold, and asserts that these are its own tokens: nothing
was left behind by a wrong guess, by another sequence or by an evicted block.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence

import numpy as np
import torch

from backend.cache.blocks import BlockCopy, Move
from backend.engine.scheduler import Work

Model = Callable[[Sequence[int]], torch.Tensor]  # all ids so far -> logits float32 (vocab,)
EMPTY = -1


class TokenCache:
    """Takes the runner's place. No host tier."""

    def __init__(self, model: Model, vocabulary: int, n_blocks: int, block_size: int) -> None:
        self._model, self._vocabulary, self._size = model, vocabulary, block_size
        self.slots = np.full((n_blocks, block_size), EMPTY)
        self.steps = self.tokens_evaluated = 0
        self.work: list[Work] = []  # of the latest step

    def copy_blocks(self, moves: Sequence[Move]) -> None:
        for move in moves:
            assert isinstance(move, BlockCopy)
            self.slots[move.target, : move.tokens] = self.slots[move.source, : move.tokens]
            self.slots[move.target, move.tokens :] = EMPTY

    def run(self, work: Sequence[Work]) -> torch.Tensor:
        self.steps += 1
        self.work = list(work)
        rows = []
        for item in work:
            request = item.request
            assert request.lease is not None
            start = request.computed
            new = [*request.ids[start : start + item.tokens], *item.drafts]
            self.tokens_evaluated += len(new)
            for position, token in enumerate(new, start):
                self.slots[request.lease.blocks[position // self._size], position % self._size] = token
            length = start + len(new)
            seen = self.slots[request.lease.blocks].reshape(-1)[:length].tolist()
            assert seen == [*request.ids, *item.drafts][:length]
            rows += [self._model(seen[: end + 1]) for end in range(length - item.logit_rows, length)]
        return torch.stack(rows) if rows else torch.zeros(0, self._vocabulary)


def scattered(vocabulary: int, reach: int = 3, scale: float = 1.0) -> Model:
    """Logits that any of the last `reach` ids changes: short, so that texts repeat themselves."""

    def model(ids: Sequence[int]) -> torch.Tensor:
        seed = zlib.crc32(np.asarray(ids[-reach:], dtype=np.int64).tobytes())
        values = np.random.default_rng(seed).standard_normal(vocabulary) * scale
        return torch.tensor(values, dtype=torch.float32)

    return model
