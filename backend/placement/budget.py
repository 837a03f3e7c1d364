"""Memory beside the weights: the cache of keys and values, workspace, the tokenizer; and what a budget leaves. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from backend.model.config import ModelConfig
from backend.placement.machine import MIB
from backend.placement.sizes import kv_token_bytes

BLOCK_TOKENS = 32
# Tokens of prompts in one step. More where parts are streamed, since every step brings all of them, however few its
# tokens; and on the CPU, where weights are decoded once for all tokens of a step, if such a step is not too slow.
CHUNK_TOKENS, LONG_CHUNK_TOKENS = 128, 512
SPARE_BLOCKS = 2  # a chat that begins like another one needs a block of its own where they part
USEFUL_CONTEXT = 2048  # tokens; a shorter context is not worth keeping all weights resident for
LEAST_CONTEXT = 512
MOST_HOST_CACHE = 8 << 30  # bytes that `cache_ram: auto` takes at most
_TOKEN_BYTES = 650  # of a tokenizer's tables, for each entry of the vocabulary: measured
_FIRST_USE = 24 * MIB  # pages of torch's libraries that the first products touch: measured
_HEAP = 4 * MIB  # what the C library's allocator keeps of the memory that loading used and gave back: measured


@dataclass(frozen=True)
class Cache:
    """Keys and values of all chats together."""

    type: str
    context: int  # tokens of one chat
    blocks: int
    token_bytes: int

    @property
    def bytes(self) -> int:
        return self.blocks * BLOCK_TOKENS * self.token_bytes


def cache(
    config: ModelConfig, kv_type: str, context: int | None, kv_tokens: int | None, weights: int, room: int | None
) -> Cache:
    """The cache for a preset's `context` and `kv_tokens` (None: auto), beside weights of `weights` bytes.

    Without limits the context is the model's and the cache holds twice that: two full chats at once, or one and what
    others left behind to be found again. Where `room` bytes do not hold both, `auto` gives way: first the second chat,
    then the context. Only what is asked for by number is worth moving weights elsewhere for.
    """
    token_bytes = kv_token_bytes(config, kv_type)
    wanted = context or config.context

    def of(tokens: int, held: int | None = None) -> Cache:
        blocks = -(-max(held or 0, tokens) // BLOCK_TOKENS) + SPARE_BLOCKS
        return Cache(kv_type, tokens, blocks, token_bytes)

    if kv_tokens is not None:
        return of(wanted, kv_tokens)
    both = of(wanted, 2 * wanted)
    if room is None or weights + both.bytes <= room:
        return both
    left = whole_tokens(room - weights, token_bytes)
    if left >= wanted:
        return of(wanted, left)
    if context is not None:
        return of(wanted)
    if left >= min(USEFUL_CONTEXT, wanted):
        return of(left)
    quarter = whole_tokens(room // 4, token_bytes)
    return of(min(wanted, USEFUL_CONTEXT, max(quarter, LEAST_CONTEXT)))


def host_cache(asked: int | None, on_gpu: bool, free: int, block_bytes: int) -> int:
    """Bytes of the cache's host tier, in whole blocks: what evicted blocks may take of host memory.

    `asked`: a preset's `cache_ram`; None: beside a GPU a quarter of the `free` bytes that the plan leaves, on a CPU
    nothing, because there the cache itself is in host memory and `kv_tokens` can make it larger.
    """
    if asked is None:
        asked = min(MOST_HOST_CACHE, max(0, free) // 4) if on_gpu else 0
    return asked // block_bytes * block_bytes


def whole_tokens(room: int, token_bytes: int) -> int:
    """Tokens of one chat that a cache of `room` bytes holds, in whole blocks; 0 where it holds none."""
    return max(0, room // (BLOCK_TOKENS * token_bytes) - SPARE_BLOCKS) * BLOCK_TOKENS


def workspace_bytes(config: ModelConfig, chunk: int = CHUNK_TOKENS) -> int:
    """What one step of `chunk` tokens of a prompt works with, and logits.

    By torch: the widest activations in float32 and in the products' type. A compiled step's arrays (step.c) are fewer,
    but stay until the model goes, beside what torch has for its input: covered by the same number.
    """
    widest = 4 * config.dim + 2 * (config.n_heads + 2 * config.n_kv_heads) * config.head_dim + 5 * config.ffn_dim
    return chunk * 4 * widest + 8 * 4 * config.vocab_size


def decoded_bytes(config: ModelConfig, context: int, value_bytes: int) -> int:
    """What attention through torch decodes of an int8 cache: keys and values of one sequence in one layer."""
    return 2 * context * config.n_kv_heads * config.head_dim * value_bytes


def host_bytes(config: ModelConfig, *, shape_only: bool = False) -> int:
    """What a model takes in this process beside weights, cache and workspace. shape_only: it has no vocabulary."""
    vocabulary = 0 if shape_only else _TOKEN_BYTES * config.vocab_size
    return vocabulary + _FIRST_USE + min(_HEAP, 16 * config.dim * config.ffn_dim)
