"""Keys and values of all layers in one pool of blocks, and views of them by sequence."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from backend.cache.host import HostTier, copy_block
from backend.cache.int8 import quantised, values_of
from backend.cache.places import BlockCopy, BlockStore, Move
from backend.model.config import ModelConfig

AT_ONCE = 2 << 20  # bytes taken ahead at a time: a huge page; one to ten milliseconds

# What it costs to attend to one run more, in bytes of a layer that are copied in that time, on the CPU. Measured for
# one token with 125 runs: 31 us, or 130 KiB, with 3 heads of 64; 45 us, or 300 KiB, with 8 of 128. Rather too little,
# so that a copy is surely faster. Besides, what each query has found in a run is kept apart until it is known of all.
BYTES_PER_RUN = 75 << 10

# Values of the preset's key `kv_cache`, without `auto`.
KV_TYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "int8": torch.int8}


class KVPool:
    """Two tensors (layers, n_kv_heads, slots, head_dim); slot = block * block_size + place in the block.

    In int8 there are two more, `key_scales` and `value_scales`, float32 (layers, n_kv_heads, slots): see `int8.py`. On
    the CPU the memory is reserved, not touched: the operating system gives a page when the first token is stored in it,
    or before that by `take_ahead`. On another device it is taken at once.
    """

    def __init__(
        self,
        config: ModelConfig,
        n_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        host_bytes: int = 0,
    ) -> None:
        """host_bytes: the limit of the host tier, `host`; there is none where not even one block fits in it."""
        shape = (config.n_layers, config.n_kv_heads, n_blocks * block_size, config.head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.key_scales: torch.Tensor | None = None
        self.value_scales: torch.Tensor | None = None
        if dtype == torch.int8:
            self.key_scales = torch.empty(shape[:3], dtype=torch.float32, device=device)
            self.value_scales = torch.empty(shape[:3], dtype=torch.float32, device=device)
        self.n_blocks, self.block_size = n_blocks, block_size
        self._query_bytes = config.n_heads * config.head_dim * 4
        self._token_bytes = 2 * config.n_kv_heads * config.head_dim * dtype.itemsize  # of one layer
        pinned = self.keys.device.type == "cuda"
        tier = HostTier([(array.shape, array.dtype) for array in self.block(0)], host_bytes, pinned=pinned)
        self.host = tier if host_bytes >= tier.block_bytes else None
        self._untaken = iter(_parts(self.arrays) if self.device.type == "cpu" else ())

    @property
    def device(self) -> torch.device:
        return self.keys.device

    @property
    def arrays(self) -> list[torch.Tensor]:
        """All tensors of the pool; slots are their third dimension."""
        found = (self.keys, self.values, self.key_scales, self.value_scales)
        return [array for array in found if array is not None]

    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)

    def take_ahead(self, populate: Callable[[int, int], bool]) -> bool:
        """Some more of its memory on the CPU, while there is time. False: there is no more, or it cannot be had so.
        `populate`: has the system give the pages of so many bytes at an address: `kernels.cpu.memory.populate`.

        The first token of a block stores into hundreds of pages that nobody has touched, one for each layer and head.
        Where the system is a guest itself, that takes longer than to compute the token.
        """
        part = next(self._untaken, None)
        return part is not None and populate(*part)

    def block(self, number: int) -> list[torch.Tensor]:
        """Views of one block, (layers, n_kv_heads, block_size, ...), one for each of `arrays`."""
        start = number * self.block_size
        return [array[:, :, start : start + self.block_size] for array in self.arrays]

    def carry_out(self, moves: Sequence[Move]) -> None:
        """What the block pool has written down, in its order. On CUDA it is begun here and done before whatever is
        computed next on the same stream."""
        for move in moves:
            if isinstance(move, BlockCopy):
                tokens = move.tokens
                source, target = self.block(move.source), self.block(move.target)
                source, target = [each[:, :, :tokens] for each in source], [each[:, :, :tokens] for each in target]
            else:
                assert self.host is not None
                block, slot = self.block(move.block), self.host.block(move.slot)
                source, target = (block, slot) if isinstance(move, BlockStore) else (slot, block)
            for here, there in zip(source, target, strict=True):
                copy_block(there, here)

    def table(self, blocks: Sequence[int], start: int, end: int) -> SequenceSlots:
        """Where tokens `start` to `end` of a sequence in these blocks are stored, and everything before them."""
        every, new = _runs(blocks, self.block_size, 0, end), _runs(blocks, self.block_size, start, end)
        if not self._scattered(len(every), end, end - start):
            return SequenceSlots(every, new)
        used = torch.tensor(blocks[: -(-end // self.block_size)], dtype=torch.int64).to(self.device)
        return SequenceSlots(every, new, used)

    def _scattered(self, runs: int, tokens: int, new: int) -> bool:
        """Whether runs are so many, and so short, that it is faster to copy them into one. Other devices than the CPU
        copy faster than they begin anything, so there it always is."""
        if self.device.type != "cpu":
            return runs > 1
        return runs > 1 and runs * (BYTES_PER_RUN + new * self._query_bytes) > tokens * self._token_bytes

    def store(self, layer: int, slots: SequenceSlots, keys: torch.Tensor, values: torch.Tensor) -> None:
        """keys, values (new tokens, n_kv_heads, head_dim) -> their slots."""
        for pool, scales, new in ((self.keys, self.key_scales, keys), (self.values, self.value_scales, values)):
            heads = new.transpose(0, 1)  # (n_kv_heads, new tokens, head_dim)
            steps = None
            if scales is not None:
                heads, steps = quantised(heads.float())
            at = 0
            for start, length in slots.new:
                pool[layer, :, start : start + length] = heads[:, at : at + length]
                if scales is not None and steps is not None:
                    scales[layer, :, start : start + length] = steps[:, at : at + length]
                at += length

    def read(self, layer: int, slots: SequenceSlots) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """All keys and values of the sequence, one pair (n_kv_heads, tokens, head_dim) for each run.

        Views, or one copy where they are scattered; what is in int8 is decoded, to bfloat16 on CUDA, whose attention
        needs 16 bits to be fast.
        """
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32

        def seen(pool: torch.Tensor, scales: torch.Tensor | None, run: tuple[int, int]) -> torch.Tensor:
            found = self._slots(pool[layer], slots, run)
            return found if scales is None else values_of(found, self._slots(scales[layer], slots, run), dtype)

        runs = slots.all if slots.blocks is None else [(0, slots.tokens)]
        return [(seen(self.keys, self.key_scales, run), seen(self.values, self.value_scales, run)) for run in runs]

    def _slots(self, array: torch.Tensor, slots: SequenceSlots, run: tuple[int, int]) -> torch.Tensor:
        """Of an array (n_kv_heads, slots, ...) those of a run; of scattered blocks those of the sequence's tokens."""
        at, length = run
        if slots.blocks is not None:
            array = array.unflatten(1, (self.n_blocks, self.block_size)).index_select(1, slots.blocks).flatten(1, 2)
        return array[:, at : at + length]


class SequenceSlots:
    """Runs (first slot, length) of a whole sequence so far, and of the tokens being added."""

    def __init__(
        self, all: list[tuple[int, int]], new: list[tuple[int, int]], blocks: torch.Tensor | None = None
    ) -> None:
        """blocks: numbers of all its blocks, int64, where they are so scattered that one copy of all is faster."""
        self.all, self.new, self.blocks = all, new, blocks

    @property
    def tokens(self) -> int:
        return sum(length for _, length in self.all)


def _parts(arrays: Sequence[torch.Tensor]) -> Iterator[tuple[int, int]]:
    """Address and bytes of all their memory, piece by piece: cut where huge pages begin."""
    for array in arrays:
        at, end = array.data_ptr(), array.data_ptr() + array.nbytes
        while at < end:
            after = min(end, (at // AT_ONCE + 1) * AT_ONCE)
            yield at, after - at
            at = after


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
