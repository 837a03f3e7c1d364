"""Samplers that remove tokens, beyond the common ones of `samplers`: one row of logits in, float32 (n,), one out.

A removed token has logit -inf. XTC means to remove the likeliest token, and typical_p may; the others never do.
"""

from __future__ import annotations

import torch

from backend.sampling.samplers import NEVER


def typical_p(logits: torch.Tensor, mass: float) -> torch.Tensor:
    """Keep the tokens whose surprise is nearest to the entropy, until they reach `mass` (arXiv:2202.00666)."""
    logs = torch.log_softmax(logits, 0)
    probabilities = logs.exp()
    distance = (-logs - _entropy(logs)).abs()
    order = torch.sort(distance, stable=True).indices
    before = probabilities[order].cumsum(0) - probabilities[order]
    kept = torch.zeros_like(logits, dtype=torch.bool)
    kept[order[before < mass]] = True
    kept[order[:1]] = True
    return _only(logits, kept)


def tail_free(logits: torch.Tensor, z: float) -> torch.Tensor:
    """Cut where the second derivative of the sorted probabilities has spent share `z` (Phoenix Bickers, 2019).

    As the Transformers-based programs do it: token i + 1 goes when the normalised curvature up to i is above z.
    """
    ordered, ids = torch.sort(logits, descending=True, stable=True)
    if logits.numel() < 3:
        return logits
    curvature = torch.softmax(ordered, 0).diff().diff().abs()
    total = curvature.sum()
    if total <= 0:  # a straight line has no tail
        return logits
    spent = (curvature / total).cumsum(0)
    kept = torch.zeros_like(logits, dtype=torch.bool)
    kept[ids[1:-1][spent <= z]] = True
    kept[ids[0]] = True
    return _only(logits, kept)


def top_n_sigma(logits: torch.Tensor, n: float) -> torch.Tensor:
    """Keep logits within n standard deviations of the largest (arXiv:2411.07641), over the tokens that are left."""
    alive = logits[torch.isfinite(logits)]
    return logits.masked_fill(logits < alive.max() - n * alive.std(correction=0), NEVER)


def top_a(logits: torch.Tensor, a: float) -> torch.Tensor:
    """Drop tokens less likely than a times the square of the largest probability (BlinkDL, RWKV-LM)."""
    probabilities = torch.softmax(logits, 0)
    best = probabilities.max()
    return _only(logits, (probabilities >= a * best * best) | (probabilities == best))


def epsilon_cutoff(logits: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Drop tokens less likely than epsilon (arXiv:2210.15191)."""
    probabilities = torch.softmax(logits, 0)
    return _only(logits, (probabilities >= epsilon) | (probabilities == probabilities.max()))


def eta_cutoff(logits: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Drop tokens less likely than min(epsilon, sqrt(epsilon) * exp(-entropy)) (arXiv:2210.15191)."""
    logs = torch.log_softmax(logits, 0)
    probabilities = logs.exp()
    threshold = torch.exp(-_entropy(logs)) * epsilon**0.5
    return _only(logits, (probabilities >= threshold.clamp(max=epsilon)) | (probabilities == probabilities.max()))


def xtc(logits: torch.Tensor, threshold: float, probability: float, uniform: float) -> torch.Tensor:
    """Exclude top choices (p-e-w, text-generation-webui 6335): of the tokens with at least `threshold`, keep the least.

    Happens when `uniform` in [0, 1) is below `probability`, and only when there are two such tokens or more.
    """
    if uniform >= probability:
        return logits
    probabilities = torch.softmax(logits, 0)
    top = ((probabilities >= threshold) & torch.isfinite(logits)).nonzero().flatten()  # a threshold of 0: all there are
    if len(top) < 2:
        return logits
    spared = top[probabilities[top].argmin()]
    out = logits.index_fill(0, top, NEVER)
    out[spared] = logits[spared]
    return out


def _entropy(logs: torch.Tensor) -> torch.Tensor:
    """In nats; removed tokens add nothing."""
    return -(logs * logs.exp()).nansum()


def _only(logits: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    return logits.masked_fill(~kept, NEVER)
