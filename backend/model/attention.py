"""Causal grouped-query attention over keys and values that are already in the cache."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


def attention(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The last `new` of `total` tokens look at everything up to themselves.

    query (new, n_heads, head_dim); keys, values (n_kv_heads, total, head_dim) in the cache's type. Returns float32
    (new, n_heads, head_dim). Query head h uses key-value head h // (n_heads / n_kv_heads).
    """
    new, n_heads, head_dim = query.shape
    n_kv_heads, total, _ = keys.shape
    group = n_heads // n_kv_heads
    # The heads that share keys become rows of one query, so keys are read once: (n_kv_heads, new * group, head_dim).
    grouped = query.view(new, n_kv_heads, group, head_dim).transpose(0, 1).reshape(1, n_kv_heads, -1, head_dim)
    mask = None if new == 1 else _causal_rows(new, total, group, keys.device)
    mixed = F.scaled_dot_product_attention(grouped.to(keys.dtype), keys[None], values[None], attn_mask=mask)
    mixed = mixed.view(n_kv_heads, new, group, head_dim).transpose(0, 1)
    return mixed.reshape(new, n_heads, head_dim).float()


def attention_twin(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The same by the formula, one head at a time in float64: softmax(q k^T / sqrt(head_dim)) v."""
    new, n_heads, head_dim = query.shape
    n_kv_heads, total, _ = keys.shape
    out = torch.empty(new, n_heads, head_dim, dtype=torch.float64)
    for head in range(n_heads):
        k, v = (tensor[head // (n_heads // n_kv_heads)].double() for tensor in (keys, values))
        for row in range(new):
            seen = total - new + row + 1
            scores = k[:seen] @ query[row, head].double() / math.sqrt(head_dim)
            out[row, head] = torch.softmax(scores, dim=0) @ v[:seen]
    return out


def _causal_rows(new: int, total: int, group: int, device: torch.device) -> torch.Tensor:
    """bool (new * group, total): row r belongs to token r // group and sees `total - new + token + 1` keys."""
    last_seen = torch.arange(total - new, total, device=device).repeat_interleave(group)
    return torch.arange(total, device=device)[None, :] <= last_seen[:, None]
