"""Causal grouped-query attention over keys and values that are already in the cache.

The cache hands them over as runs: pieces that follow each other in the sequence and lie apart in memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

Run = tuple[torch.Tensor, torch.Tensor]  # keys, values: (n_kv_heads, tokens, head_dim) in the cache's type


def attention(query: torch.Tensor, runs: Sequence[Run]) -> torch.Tensor:
    """The last `new` of all tokens look at everything up to themselves.

    query (new, n_heads, head_dim). Returns float32 (new, n_heads, head_dim). Query head h uses key-value head
    h // (n_heads / n_kv_heads).
    """
    new, n_heads, head_dim = query.shape
    n_kv_heads = runs[0][0].shape[0]
    group = n_heads // n_kv_heads
    # The heads that share keys become rows of one query, so keys are read once: (1, n_kv_heads, new * group, head_dim).
    grouped = query.view(new, n_kv_heads, group, head_dim).transpose(0, 1).reshape(1, n_kv_heads, -1, head_dim)
    grouped = grouped.to(runs[0][0].dtype)
    if new == 1 and len(runs) > 1:
        mixed = _merged(grouped, runs)
    else:
        keys, values = runs[0] if len(runs) == 1 else (torch.cat(parts, dim=1) for parts in zip(*runs, strict=True))
        mask = None if new == 1 else _causal_rows(new, keys.shape[1], group, keys.device)
        mixed = F.scaled_dot_product_attention(grouped, keys[None], values[None], attn_mask=mask)
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


def _merged(grouped: torch.Tensor, runs: Sequence[Run]) -> torch.Tensor:
    """Attention over each run by itself, mixed by how much of the softmax each run has (its log-sum-exp).

    Exact, and without the copy that would make one run of many: at 8,000 tokens the copy costs more than the rest.
    """
    outs, weights = [], []
    for keys, values in runs:
        out, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(grouped, keys[None], values[None])
        outs.append(out.float())
        weights.append(log_sum.float())  # (1, n_kv_heads, rows)
    share = torch.softmax(torch.stack(weights), dim=0)
    return (torch.stack(outs) * share[..., None]).sum(dim=0)


def _causal_rows(new: int, total: int, group: int, device: torch.device) -> torch.Tensor:
    """bool (new * group, total): row r belongs to token r // group and sees `total - new + token + 1` keys."""
    last_seen = torch.arange(total - new, total, device=device).repeat_interleave(group)
    return torch.arange(total, device=device)[None, :] <= last_seen[:, None]
