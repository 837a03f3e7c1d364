"""Mirostat 1 and 2 (arXiv:2007.14966): keep the surprise of what is said near a target, in bits.

The surprise of a token is that under the whole distribution it was drawn from, before truncation, as in the paper and
its authors' program; llama.cpp takes it from what the truncation left, so its mu settles a little differently.
"""

from __future__ import annotations

import math

import torch

from backend.sampling.samplers import NEVER

PAIRS = 100  # likeliest tokens from which version 1 estimates the exponent


class Mirostat:
    """The controller of one reply. mu, the largest surprise let through, starts at twice the target."""

    def __init__(self, version: int, tau: float, eta: float) -> None:
        self.version, self.tau, self.eta = version, tau, eta
        self.mu = 2 * tau
        self._before: list[float] = []  # mu before each token that was taken
        self._logs: torch.Tensor | None = None  # of the latest row, natural logarithms

    def cut(self, logits: torch.Tensor) -> torch.Tensor:
        """What may be drawn now. logits float32 (n,), temperature applied."""
        self._logs = torch.log_softmax(logits, 0)
        if self.version == 2:
            kept = self._logs >= -self.mu * math.log(2)
            kept |= self._logs == self._logs.max()
            return logits.masked_fill(~kept, NEVER)
        size = logits.numel()
        ordered = torch.topk(self._logs, min(PAIRS, size)).values
        kept = torch.topk(self._logs, kept_tokens(ordered, size, self.mu)).indices
        return torch.full_like(logits, NEVER).index_copy_(0, kept, logits[kept])

    def observe(self, place: int) -> None:
        """The token at this place of the latest row was taken."""
        assert self._logs is not None
        surprise = -float(self._logs[place]) / math.log(2)
        self._before.append(self.mu)
        self.mu -= self.eta * (surprise - self.tau)

    def rewind(self, tokens: int) -> None:
        """The last tokens were taken back: mu is what it was before the first of them."""
        self.mu = self._before[-tokens]
        del self._before[-tokens:]


def kept_tokens(top: torch.Tensor, size: int, mu: float) -> int:
    """How many of `size` tokens version 1 keeps, at least one. `top`: logs of the likeliest, falling, at most PAIRS.

    The exponent s of Zipf's law is the least-squares slope of ln(p_i / p_i+1) over ln((i + 2) / (i + 1)); then
    k = (eps 2^mu / (1 - n^-eps))^(1 / s) with eps = s - 1, here in logarithms so that nothing overflows.
    """
    top = top[torch.isfinite(top)].double()
    if len(top) < 2:
        return 1
    place = torch.arange(len(top) - 1, dtype=torch.float64, device=top.device)
    t, b = torch.log((place + 2) / (place + 1)), top[:-1] - top[1:]
    s = float((t * b).sum() / (t * t).sum())
    if s <= 0:  # flat: no law to follow
        return size
    epsilon, scale = s - 1, math.log(size)
    # eps / (1 - n^-eps) tends to 1 / ln n where s is 1
    ratio = 1 / scale if abs(epsilon) < 1e-9 else epsilon / -math.expm1(-epsilon * scale)
    return max(1, int(math.exp(min((math.log(ratio) + mu * math.log(2)) / s, scale))))
