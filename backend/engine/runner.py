"""One step of work on the model: a flat batch of tokens in, logits of the sequences that want them out."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from backend.cache.blocks import BlockCopy
from backend.cache.kv import KVPool, SequenceSlots
from backend.engine.scheduler import Work
from backend.engine.threads import Threads
from backend.model.attention import attention
from backend.model.llama import Attend, Llama


class Runner:
    """Owns nothing but references: the model and the pool of keys and values."""

    def __init__(self, model: Llama, pool: KVPool, threads: Threads | None = None) -> None:
        self.model, self.pool = model, pool
        self._threads = threads
        self.tokens_evaluated = 0  # all tokens that ever went through the model
        self.steps = 0

    def copy_blocks(self, orders: Sequence[BlockCopy]) -> None:
        for order in orders:
            self.pool.copy(order)

    def run(self, work: Sequence[Work]) -> torch.Tensor:
        """Evaluate the step. Returns logits, float32 (works that give logits, vocab), in the order of `work`."""
        ids: list[int] = []
        positions: list[int] = []
        rows: list[int] = []
        spans: list[_Span] = []
        for item in work:
            request, start = item.request, item.request.computed
            end = start + item.tokens
            assert request.lease is not None
            spans.append(_Span(len(ids), item.tokens, self.pool.table(request.lease.blocks, start, end)))
            ids += request.ids[start:end]
            positions += range(start, end)
            if item.gives_logits:
                rows.append(len(ids) - 1)
        self.tokens_evaluated += len(ids)
        self.steps += 1
        if self._threads is not None:
            self._threads.use(len(ids))
        with torch.inference_mode():
            return self.model.forward(
                torch.tensor(ids), torch.tensor(positions), self._attend(spans), torch.tensor(rows, dtype=torch.int64)
            )

    def _attend(self, spans: Sequence[_Span]) -> Attend:
        pool, window = self.pool, self.model.config.sliding_window

        def attend(layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            mixed = []
            for span in spans:
                part = slice(span.start, span.start + span.length)
                pool.store(layer, span.slots, key[part], value[part])
                mixed.append(attention(query[part], pool.read(layer, span.slots), window))
            return mixed[0] if len(mixed) == 1 else torch.cat(mixed)

        return attend


class _Span:
    """One sequence's tokens in the flat batch, and where its keys and values live."""

    def __init__(self, start: int, length: int, slots: SequenceSlots) -> None:
        self.start, self.length, self.slots = start, length, slots
