"""Samplers that change the shape of the distribution and remove nothing. Logits float32 (n,); removed ones are -inf."""

from __future__ import annotations

import math

import torch

from backend.sampling.samplers import temperature


def dynamic_temperature(logits: torch.Tensor, low: float, high: float, exponent: float) -> torch.Tensor:
    """Temperature from low (sure) to high (unsure), by the entropy as a share of its maximum (kalomaze; llama.cpp).

    The maximum is that of the tokens which are left.
    """
    logs = torch.log_softmax(logits, 0)
    count = int(torch.isfinite(logits).sum())
    if count < 2:
        return logits
    share = float(-(logs * logs.exp()).nansum()) / math.log(count)
    return temperature(logits, low + (high - low) * min(max(share, 0.0), 1.0) ** exponent)


def smoothing(logits: torch.Tensor, factor: float, curve: float) -> torch.Tensor:
    """Quadratic sampling (kalomaze): the distance d from the best logit becomes -k f d^2 + s f d^3.

    k = (3 - curve) / 2 and s = (curve - 1) / 2, so with curve 1 it is -f d^2.
    """
    best = logits.max()
    distance = (logits - best).clamp(min=-1e6)  # so that its powers are numbers in float32
    bent = -(3 - curve) / 2 * factor * distance**2 + (curve - 1) / 2 * factor * distance**3 + best
    return torch.where(torch.isfinite(logits), bent, logits)
