"""Keys and values of all layers in one pool of blocks, and views of them by sequence."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from backend.cache.blocks import BlockCopy
from backend.model.config import ModelConfig


class KVPool:
    """Two tensors (layers, n_kv_heads, slots, head_dim); slot = block * block_size + place in the block.

    On the CPU the memory is reserved, not touched: the operating system gives a page when the first token is stored in
    it. On another device it is taken at once.
    """

    def __init__(
        self,
        config: ModelConfig,
        n_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (config.n_layers, config.n_kv_heads, n_blocks * block_size, config.head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.n_blocks, self.block_size = n_blocks, block_size

    @property
    def device(self) -> torch.device:
        return self.keys.device

    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def copy(self, order: BlockCopy) -> None:
        """Carry out a lease's copy: the beginning of one block into another, in all layers."""
        source, target = order.source * self.block_size, order.target * self.block_size
        for pool in (self.keys, self.values):
            pool[:, :, target : target + order.tokens] = pool[:, :, source : source + order.tokens]

    def table(self, blocks: Sequence[int], start: int, end: int) -> SequenceSlots:
        """Where tokens `start` to `end` of a sequence in these blocks are stored, and everything before them."""
        return SequenceSlots(_runs(blocks, self.block_size, 0, end), _runs(blocks, self.block_size, start, end))

    def store(self, layer: int, slots: SequenceSlots, keys: torch.Tensor, values: torch.Tensor) -> None:
        """keys, values (new tokens, n_kv_heads, head_dim) -> their slots."""
        at = 0
        for start, length in slots.new:
            self.keys[layer, :, start : start + length] = keys[at : at + length].transpose(0, 1)
            self.values[layer, :, start : start + length] = values[at : at + length].transpose(0, 1)
            at += length

    def read(self, layer: int, slots: SequenceSlots) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """All keys and values of the sequence, one pair of views (n_kv_heads, tokens, head_dim) for each run."""
        keys, values = self.keys[layer], self.values[layer]
        return [(keys[:, at : at + length], values[:, at : at + length]) for at, length in slots.all]


class SequenceSlots:
    """Runs (first slot, length) of a whole sequence so far, and of the tokens being added."""

    def __init__(self, all: list[tuple[int, int]], new: list[tuple[int, int]]) -> None:
        self.all, self.new = all, new


def _runs(blocks: Sequence[int], size: int, start: int, end: int) -> list[tuple[int, int]]:
    runs: list[tuple[int, int]] = []
    at = start
    while at < end:
        place = at % size
        slot, length = blocks[at // size] * size + place, min(size - place, end - at)
        if runs and runs[-1][0] + runs[-1][1] == slot:
            runs[-1] = (runs[-1][0], runs[-1][1] + length)
        else:
            runs.append((slot, length))
        at += length
    return runs
