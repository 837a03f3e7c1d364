"""Causal grouped-query attention over keys and values that are already in the cache.

The cache hands them over as runs: pieces that follow each other in the sequence and lie apart in memory. On the CPU
runs are read where they lie; on other devices, which copy faster than they start small pieces of work, they are joined
first and torch chooses a kernel (flash attention on CUDA, for float16 and bfloat16).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

Run = tuple[torch.Tensor, torch.Tensor]  # keys, values: (n_kv_heads, tokens, head_dim) in the cache's type


def attention(query: torch.Tensor, runs: Sequence[Run], window: int | None = None) -> torch.Tensor:
    """The last `new` of all tokens look at everything up to themselves, or at the `window` tokens that end there.

    query (new, n_heads, head_dim). Returns float32 (new, n_heads, head_dim). Query head h uses key-value head
    h // (n_heads / n_kv_heads). Sliding window: Mistral 7B (arXiv:2310.06825), section 2.
    """
    if not query.is_cpu:
        return joined_attention(query, runs, window, aligned=query.device.type == "cuda")
    new, n_heads, head_dim = query.shape
    n_kv_heads = runs[0][0].shape[0]
    group = n_heads // n_kv_heads
    # The heads that share keys become rows of one query, so keys are read once: (1, n_kv_heads, new * group, head_dim).
    grouped = query.view(new, n_kv_heads, group, head_dim).transpose(0, 1).reshape(1, n_kv_heads, -1, head_dim)
    grouped = grouped.to(runs[0][0].dtype)
    total = sum(keys.shape[1] for keys, _ in runs)
    if window is not None and total > window:
        seen = _last(runs, min(total, window + new - 1))
        if new == 1:
            parts = [_part(grouped, run) for run in seen]
        else:
            run = _joined(seen)
            parts = [_part(grouped, run, _band(new, window, run[0].shape[1], group, grouped))]
    elif new == 1:
        parts = [_part(grouped, run) for run in runs]
    else:
        # Everybody sees all of the past, so only the new tokens among themselves need a mask: a small one.
        past, latest = _split(runs, new)
        parts = [_part(grouped, run) for run in past] + [_part(grouped, latest, _causal(new, group, grouped))]
    mixed = _merged(parts).view(n_kv_heads, new, group, head_dim).transpose(0, 1)
    return mixed.reshape(new, n_heads, head_dim)


def joined_attention(
    query: torch.Tensor, runs: Sequence[Run], window: int | None = None, *, aligned: bool
) -> torch.Tensor:
    """The same through torch's own choice of kernel, on any device.

    aligned: say "causal, aligned at the end" without writing the mask down, which lets CUDA use flash attention; other
    devices want it written.
    """
    new, n_heads, head_dim = query.shape
    keys, values = _joined(runs if window is None else _last(runs, window + new - 1))
    total, group = keys.shape[1], n_heads // keys.shape[0]
    if aligned and new > 1 and (window is None or total <= window):
        from torch.nn.attention.bias import causal_lower_right  # brings torch's compiler with it: two seconds

        bias = causal_lower_right(new, total)
        heads = query.to(keys.dtype).transpose(0, 1)[None]  # (1, n_heads, new, head_dim)
        mixed = F.scaled_dot_product_attention(heads, keys[None], values[None], attn_mask=bias, enable_gqa=group > 1)
        return mixed[0].transpose(0, 1).float()
    grouped = query.view(new, -1, group, head_dim).transpose(0, 1).reshape(1, -1, new * group, head_dim)
    grouped = grouped.to(keys.dtype)
    mask = None if new == 1 else _band(new, window or total, total, group, grouped)
    mixed = F.scaled_dot_product_attention(grouped, keys[None], values[None], attn_mask=mask)
    return mixed[0].unflatten(1, (new, group)).transpose(0, 1).reshape(new, n_heads, head_dim).float()


def attention_twin(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, window: int | None = None
) -> torch.Tensor:
    """The same by the formula, one head at a time in float64: softmax(q k^T / sqrt(head_dim)) v."""
    new, n_heads, head_dim = query.shape
    n_kv_heads, total, _ = keys.shape
    out = torch.empty(new, n_heads, head_dim, dtype=torch.float64)
    for head in range(n_heads):
        k, v = (tensor[head // (n_heads // n_kv_heads)].double() for tensor in (keys, values))
        for row in range(new):
            seen = total - new + row + 1
            first = max(0, seen - window) if window else 0
            scores = k[first:seen] @ query[row, head].double() / math.sqrt(head_dim)
            out[row, head] = torch.softmax(scores, dim=0) @ v[first:seen]
    return out


def _part(grouped: torch.Tensor, run: Run, mask: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over one run by itself: (1, n_kv_heads, rows, head_dim) and the log-sum-exp of its scores."""
    keys, values = run
    out, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        grouped, keys[None], values[None], attn_mask=mask
    )
    return out.float(), log_sum.float()


def _merged(parts: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Parts of one softmax, mixed by how much of it each has (its log-sum-exp).

    Exact, and without the copy that would make one run of many: at 8,000 tokens the copy costs more than the rest.
    """
    if len(parts) == 1:
        return parts[0][0]
    share = torch.softmax(torch.stack([log_sum for _, log_sum in parts]), dim=0)
    return (torch.stack([out for out, _ in parts]) * share[..., None]).sum(dim=0)


def _split(runs: Sequence[Run], new: int) -> tuple[list[Run], Run]:
    """The runs of everything before the last `new` tokens, and these as one run."""
    past = sum(keys.shape[1] for keys, _ in runs) - new
    before: list[Run] = []
    latest: list[Run] = []
    for keys, values in runs:
        cut = min(keys.shape[1], past)
        if cut:
            before.append((keys[:, :cut], values[:, :cut]))
        if cut < keys.shape[1]:
            latest.append((keys[:, cut:], values[:, cut:]))
        past -= cut
    return before, _joined(latest)


def _joined(runs: Sequence[Run]) -> Run:
    if len(runs) == 1:
        return runs[0]
    return torch.cat([keys for keys, _ in runs], dim=1), torch.cat([values for _, values in runs], dim=1)


def _last(runs: Sequence[Run], count: int) -> list[Run]:
    """The last `count` tokens of all runs."""
    kept: list[Run] = []
    for keys, values in reversed(runs):
        if count <= 0:
            break
        length = min(count, keys.shape[1])
        kept.insert(0, (keys[:, keys.shape[1] - length :], values[:, values.shape[1] - length :]))
        count -= length
    return kept


def _causal(new: int, group: int, like: torch.Tensor) -> torch.Tensor:
    """(new * group, new), 0 or -inf: row r belongs to token r // group and sees the new tokens up to that one."""
    mask = torch.full((new, new), float("-inf"), dtype=like.dtype, device=like.device).triu(1)
    return mask.repeat_interleave(group, dim=0)


def _band(new: int, window: int, seen: int, group: int, like: torch.Tensor) -> torch.Tensor:
    """(new * group, seen), 0 or -inf: the seen keys end with the new tokens, and each token sees `window` of them."""
    mask = torch.full((new, seen), float("-inf"), dtype=like.dtype, device=like.device)
    own = torch.arange(seen - new, seen, device=like.device)[:, None]  # where each new token's own key is
    column = torch.arange(seen, device=like.device)[None, :]
    mask.masked_fill_((column <= own) & (column > own - window), 0.0)
    return mask.repeat_interleave(group, dim=0)
