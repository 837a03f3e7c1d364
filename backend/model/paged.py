"""Attention of one new token per sequence over blocks of a cache, in plain torch: the twin of kernels/cuda/paged.py.

Token t of sequence s is in slot table[s, t // page] * page + t % page of the pool. Works on any device, with
shapes that depend on nothing but those of its inputs. It copies the keys and values it looks at; a kernel does not.
"""

from __future__ import annotations

import math

import torch

from backend.cache.int8 import quantised
from backend.model.rope import turned_by_pairs


def turn_and_store(
    heads: torch.Tensor,
    turns: torch.Tensor,
    slots: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    n_heads: int,
    interleaved: bool,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """Turn queries and keys; write keys and values into their slots; return the queries, float32.

    heads float32 (tokens, n_heads + 2 n_kv_heads, head_dim); turns float32 (tokens, 1, head_dim / 2, 2), cosine and
    sine; slots int32 (tokens,); keys, values (n_kv_heads, slots of the pool, head_dim), one layer of it; scales
    float32 (n_kv_heads, slots) where they are int8.
    """
    both = n_heads + keys.shape[0]
    turned = turned_by_pairs(heads[:, :both], turns, interleaved)
    at = slots.long()
    for pool, scales, new in ((keys, key_scales, turned[:, n_heads:]), (values, value_scales, heads[:, both:])):
        kept = new.transpose(0, 1)
        if scales is not None:
            kept, steps = quantised(kept)
            scales.index_copy_(1, at, steps)
        pool.index_copy_(1, at, kept.to(pool.dtype))
    return turned[:, :n_heads]


def decode(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    table: torch.Tensor,
    lengths: torch.Tensor,
    page: int,
    window: int | None = None,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """One token of each sequence looks at all of its sequence, itself included, or at the last `window` of it.

    query float32 (sequences, n_heads, head_dim); keys, values (n_kv_heads, slots, head_dim), scales float32
    (n_kv_heads, slots) where they are int8; table int32 (sequences, blocks), lengths int32 (sequences,). Returns
    float32 (sequences, n_heads, head_dim).
    """
    sequences, n_heads, head_dim = query.shape
    place = torch.arange(table.shape[1] * page, device=query.device)
    slots = table.long().repeat_interleave(page, dim=1) * page + place % page  # (sequences, places)
    seen = place < lengths[:, None]
    if window is not None:
        seen &= place >= lengths[:, None] - window

    def seen_in(pool: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
        own = pool[:, slots.flatten()].float()
        if scales is not None:
            own = own * scales[:, slots.flatten(), None]
        return own.unflatten(1, slots.shape).transpose(0, 1)

    k, v = seen_in(keys, key_scales), seen_in(values, value_scales)
    grouped = query.unflatten(1, (keys.shape[0], -1))  # (sequences, n_kv_heads, group, head_dim)
    scores = grouped @ k.transpose(-1, -2) / math.sqrt(head_dim)
    share = scores.masked_fill(~seen[:, None, None, :], float("-inf")).softmax(-1)
    # What was never written may be NaN, and nothing times NaN is NaN.
    return (share @ v.masked_fill(~seen[:, None, :, None], 0.0)).reshape(sequences, n_heads, head_dim)
