"""Steps on a CUDA device in which every sequence has one new token: all of them at once, through one small table.

A row of the table says all that differs between sequences: the token, the slot for its keys and values, how long the
sequence is, and its blocks. It is the only thing that goes to the device in a step, so the rest can be a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from backend.cache.kv import KVPool
from backend.engine.graphs import SIZES, Graphs, Recorder
from backend.engine.scheduler import Work
from backend.model.llama import Llama

_BLOCKS = 3  # the first column that is a block; before: token, slot, length


class Paged(Protocol):
    """The two kernels of kernels/cuda/paged.py, or their twins of model/paged.py."""

    turn_and_store: Callable[..., torch.Tensor]
    decode: Callable[..., torch.Tensor]


class Decoder:
    """A model and its pool, for steps of one token per sequence."""

    def __init__(self, model: Llama, pool: KVPool, paged: Paged, recorder: Recorder | None) -> None:
        """recorder None: no graphs, because a product needs the host or parts of the model are streamed."""
        self._model, self._pool, self._paged = model, pool, paged
        blocks = min(pool.n_blocks, -(-model.config.context // pool.block_size))  # the most that a sequence has
        self.graphs = Graphs(self._compute, _BLOCKS + blocks, pool.device, recorder)

    def takes(self, work: Sequence[Work]) -> bool:
        """Whether a step is of this kind."""
        return 0 < len(work) <= SIZES[-1] and all(item.evaluated == item.logit_rows == 1 for item in work)

    def run(self, work: Sequence[Work]) -> torch.Tensor:
        """Returns logits, float32 (sequences, vocab), on the device, good until the next step."""
        page = self._pool.block_size
        rows = []
        for request in (item.request for item in work):
            assert request.lease is not None
            at = request.computed
            blocks = request.lease.blocks[: at // page + 1]
            rows.append([request.ids[at], blocks[-1] * page + at % page, at + 1, *blocks])
        longest = max(len(row) for row in rows)
        rows = [row + [0] * (longest - len(row)) for row in rows]
        pinned = self._pool.device.type == "cuda"  # only then is the copy not waited for
        return self.graphs.run(torch.tensor(rows, dtype=torch.int32, pin_memory=pinned))

    def _compute(self, rows: torch.Tensor) -> torch.Tensor:
        """rows int32 (sequences, 3 + blocks) on the device; nothing here looks at their values on the host."""
        model, pool, paged = self._model, self._pool, self._paged
        config = model.config
        slots, lengths, table = rows[:, 1].contiguous(), rows[:, 2].contiguous(), rows[:, _BLOCKS:]

        def attend(layer: int, heads: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
            pairs = torch.view_as_real(turns) if turns.is_complex() else turns
            keys, values = pool.keys[layer], pool.values[layer]
            scales = [None if each is None else each[layer] for each in (pool.key_scales, pool.value_scales)]
            query = paged.turn_and_store(
                heads, pairs, slots, keys, values, config.n_heads, config.rope_interleaved, *scales
            )
            return paged.decode(query, keys, values, table, lengths, pool.block_size, config.sliding_window, *scales)

        every = torch.arange(rows.shape[0], device=rows.device)
        return model.forward(rows[:, 0].long(), lengths.long() - 1, attend, every)
