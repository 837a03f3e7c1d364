"""Guidance: what the prompt makes likelier than a negative prompt does counts more (arXiv:2306.17806, equation 7)."""

from __future__ import annotations

import torch


def guided(logits: torch.Tensor, negative: torch.Tensor, scale: float) -> torch.Tensor:
    """Logits float32 (vocab,) to draw from: negative + scale * (own - negative), both as log probabilities.

    `negative`: after the negative prompt and the same reply. A token that is impossible after either stays so.
    """
    own, other = torch.log_softmax(logits, 0), torch.log_softmax(negative, 0)
    return (other + scale * (own - other)).nan_to_num(nan=float("-inf"), posinf=float("inf"), neginf=float("-inf"))
