"""Samplers: small pure functions on one row of logits, float32 (vocab,). A removed token has logit -inf.

Every function returns a new row (or the same one when it has nothing to do) and never removes the likeliest token.
"""

from __future__ import annotations

import torch

NEVER = float("-inf")
COLDEST = 1e-30  # what a temperature is at least


def repetition_penalty(logits: torch.Tensor, used: torch.Tensor, penalty: float | torch.Tensor) -> torch.Tensor:
    """Divide the positive and multiply the negative logits of used tokens by `penalty` (CTRL, arXiv:1909.05858).

    `used`: int64 (n,), places of the row, each once; `penalty`: one number, or one for each of them.
    """
    chosen = logits[used]
    return logits.index_copy(0, used, torch.where(chosen > 0, chosen / penalty, chosen * penalty))


def without(logits: torch.Tensor, removed: torch.Tensor) -> torch.Tensor:
    """Remove these places, int64 (n,)."""
    return logits.index_fill(0, removed, NEVER)


def temperature(logits: torch.Tensor, value: float) -> torch.Tensor:
    """Divide by the temperature. 0 is the caller's business: it means argmax."""
    # From the likeliest down: a tiny temperature then sends the others to -inf, and never two to +inf (which is NaN).
    return (logits - logits.max()) / max(value, COLDEST)


def top_k(logits: torch.Tensor, k: int) -> torch.Tensor:
    """Keep the k likeliest. The chain uses `likeliest`; this is its slow twin, with the row at its full length."""
    if k >= logits.numel():
        return logits
    values, ids = likeliest(logits, k)
    return torch.full_like(logits, NEVER).index_copy_(0, ids, values)


def likeliest(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest logits and their ids, in order of ids: the row that `top_k` leaves, without what it removed."""
    ids = torch.topk(logits, k).indices.sort().values
    return logits[ids], ids


def top_p(logits: torch.Tensor, p: float) -> torch.Tensor:
    """Keep the likeliest tokens whose mass before them is below p (nucleus sampling, arXiv:1904.09751)."""
    ordered, ids = _descending(logits, p)
    probabilities = torch.exp(ordered - torch.logsumexp(logits, 0))
    before = probabilities.cumsum(0) - probabilities
    kept = before < p
    kept[0] = True
    return torch.full_like(logits, NEVER).index_copy_(0, ids[kept], ordered[kept])


def min_p(logits: torch.Tensor, p: float) -> torch.Tensor:
    """Drop tokens whose probability is below p times that of the likeliest (arXiv:2407.01082)."""
    threshold = logits.max() + torch.log(torch.tensor(p))
    return logits.masked_fill(logits < threshold, NEVER)


def draw(logits: torch.Tensor, uniform: float) -> int:
    """The token at which the cumulative distribution, in order of ids, first exceeds `uniform` in [0, 1)."""
    cumulative = torch.softmax(logits.double(), 0).cumsum(0)
    # Rounding may leave the last sum below 1; scaling by it keeps every uniform inside and no removed token reachable.
    at = torch.searchsorted(cumulative, uniform * cumulative[-1], right=True)
    return int(at.clamp(max=logits.numel() - 1))


def _descending(logits: torch.Tensor, p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits in falling order and their ids, at least as many as reach mass p.

    Sorting 50,000 logits costs milliseconds, and the nucleus is nearly always among the first thousand.
    """
    first = 1024
    if logits.numel() > first:
        values, ids = torch.topk(logits, first)
        if torch.exp(values - torch.logsumexp(logits, 0)).sum() >= p:
            return values, ids
    return torch.sort(logits, descending=True)
