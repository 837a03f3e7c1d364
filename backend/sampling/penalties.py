"""What was said before, and what that costs: (tokens, amounts) from a history of ids. Numpy, no row of logits.

All of them are O(history) in the time they take; DRY's copies are kept from token to token in `sampling.copies`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
LONGEST_MATCH = 50  # of DRY, so that its exponent stays in range; as the first implementation has it


def repetition(window: Ids, penalty: float, slope: float) -> tuple[Ids, NDArray[np.float64]]:
    """The used tokens and the penalty of each; repeats count once (CTRL, arXiv:1909.05858).

    Tokens that are only in the older half of the window get 1 + (penalty - 1) * slope, as in KoboldCpp.
    """
    if slope == 1.0:
        used = np.unique(window)
        return used, np.full(len(used), penalty)
    half = len(window) // 2
    newer = np.unique(window[half:])
    older = np.setdiff1d(window[:half], newer)
    amounts = np.concatenate([np.full(len(newer), penalty), np.full(len(older), 1 + (penalty - 1) * slope)])
    return np.concatenate([newer, older]), amounts


def counts(window: Ids, frequency: float, presence: float) -> tuple[Ids, NDArray[np.float64]]:
    """What OpenAI subtracts from the logit of each used token: count * frequency + presence."""
    used, times = np.unique(window, return_counts=True)
    return used, (times * frequency + presence).astype(np.float64)


def repeated_ngrams(history: Ids, n: int) -> Ids:
    """Tokens that would complete a sequence of n tokens which is there already."""
    if len(history) < n:
        return history[:0]
    runs = np.lib.stride_tricks.sliding_window_view(history, n)
    same = (runs[:, : n - 1] == history[len(history) - n + 1 :]).all(axis=1)
    return np.unique(runs[same, n - 1])


def dry(
    history: Ids, breaks: NDArray[np.bool_], multiplier: float, base: float, allowed: int
) -> tuple[Ids, NDArray[np.float64]]:
    """DRY (p-e-w, text-generation-webui 5677): tokens that would prolong a repetition, and what each loses.

    A token that once followed the longest earlier copy, L tokens long, of how the history ends now loses
    multiplier * base^(L - allowed) when L >= allowed. `breaks`: where a breaker ends; no copy goes across it.
    """
    nothing = history[:0], np.zeros(0)
    count = len(history)
    if count < 2 or breaks[-1]:
        return nothing
    ends = np.flatnonzero((history[:-1] == history[-1]) & ~breaks[1:])  # where an earlier copy may end
    lengths = np.ones(len(ends), dtype=np.int64)
    growing = np.arange(len(ends))
    for length in range(1, min(LONGEST_MATCH, count)):
        if breaks[count - 1 - length]:
            break
        before = ends[growing] - length
        growing = growing[(before >= 0) & (history[before] == history[count - 1 - length])]
        if not len(growing):
            break
        lengths[growing] = length + 1
    return costs(history[ends + 1], lengths, multiplier, base, allowed)


def costs(
    followers: Ids, lengths: NDArray[np.int64], multiplier: float, base: float, allowed: int
) -> tuple[Ids, NDArray[np.float64]]:
    """What each token loses that once followed a copy: for the longest of its copies, from `allowed` tokens on."""
    long_enough = lengths >= allowed
    if not long_enough.any():
        return followers[:0], np.zeros(0)
    tokens, place = np.unique(followers[long_enough], return_inverse=True)
    longest = np.zeros(len(tokens), dtype=np.int64)
    np.maximum.at(longest, place, lengths[long_enough])
    return tokens, multiplier * base ** (longest - allowed).astype(np.float64)
