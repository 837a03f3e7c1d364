"""What a way of running a model costs in quality: perplexity of a text, and how far it is from a reference.

Method: the text's tokens are cut into windows of `context` tokens that do not overlap; a rest that fills no window is
left out. Each window is read from its beginning, with the vocabulary's begin token in place of its first where it has
one. The second half is scored: every scored token has at least half a window before it. This is what llama.cpp's
`perplexity` does, so numbers of the same model on the same text can be compared with its numbers.

perplexity = exp(mean of -ln p(token)); KL = mean over positions of sum p_ref (ln p_ref - ln p), in nats; top-1
agreement = share of positions where both find the same token most likely. Sums in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO, Protocol

import numpy as np
import torch

from backend.errors import EngineError, NumericalError, ParameterError
from backend.events import LoadProgress
from backend.runtime import Runtime

Progress = Callable[[LoadProgress], None]

CHUNK = 128  # tokens evaluated at once, as prompts of chats are
LEAST_CONTEXT = 16


@dataclass(frozen=True)
class Score:
    """Of `tokens` scored tokens. `error`: standard error of the mean of -ln p, so perplexity is good to this fraction.
    `kl_mean`, `top1_agreement`: None without a reference."""

    perplexity: float
    tokens: int
    error: float
    kl_mean: float | None
    top1_agreement: float | None


class Source(Protocol):
    """Something that gives ln p of every token at the scored positions of a window, a few positions at a time."""

    def log_probs(self, window: Sequence[int]) -> Iterator[torch.Tensor]:
        """float32 (positions, vocabulary); all of them together: one row for each scored token."""
        ...


class ModelSource:
    """A loaded model with nothing else to do."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    def log_probs(self, window: Sequence[int]) -> Iterator[torch.Tensor]:
        blocks, runner = self._runtime.blocks, self._runtime.runner
        lease = blocks.acquire(window[:1])
        if lease is None:
            raise EngineError("the model is answering somebody, so it cannot be measured")
        try:
            if not blocks.extend(lease, len(window)):
                raise ParameterError(f"the cache is too small for windows of {len(window)} tokens; set kv_tokens")
            runner.copy_blocks(blocks.take_moves())
            for start in range(0, len(window), CHUNK):
                end = min(len(window), start + CHUNK)
                # The last token's row would say what comes after the window.
                rows = [row - start for row in range(max(start, len(window) // 2), min(end, len(window) - 1))]
                logits = runner.score(window[start:end], start, lease.blocks, rows)
                if rows:
                    yield torch.log_softmax(logits.float(), dim=-1).cpu()
        finally:
            blocks.release(lease, ())


class RecordedSource:
    """The log-probabilities of a model that is no longer in memory, read from a file in the order they were written.

    float16, made to sum to one again: the rounding moves a mean KL by a few millionths.
    """

    def __init__(self, file: BinaryIO, vocabulary: int) -> None:
        self._file, self._vocabulary = file, vocabulary

    def log_probs(self, window: Sequence[int]) -> Iterator[torch.Tensor]:
        for positions in _chunks(len(window)):
            raw = np.fromfile(self._file, np.float16, positions * self._vocabulary)
            yield torch.from_numpy(raw.astype(np.float32)).view(positions, self._vocabulary).log_softmax(dim=-1)


def record(source: Source, windows: Sequence[Sequence[int]], file: BinaryIO, progress: Progress) -> None:
    """Write what a RecordedSource reads."""
    for window in _progressing(windows, "Reading with the reference", progress):
        for log_probs in source.log_probs(window):
            log_probs.half().numpy().tofile(file)


def recorded_bytes(windows: Sequence[Sequence[int]], vocabulary: int) -> int:
    return sum(sum(_chunks(len(window))) for window in windows) * vocabulary * 2


def windows_of(ids: Sequence[int], context: int, begin: int | None, limit: int | None = None) -> list[list[int]]:
    """The text's windows, at most `limit`. `begin`: the begin token, where the vocabulary puts it before a prompt.

    Raises ParameterError for a text that fills no window.
    """
    if context < LEAST_CONTEXT:
        raise ParameterError(f"windows of {context} tokens say nothing; give a --context of {LEAST_CONTEXT} or more")
    count = len(ids) // context
    if not count:
        raise ParameterError(
            f"the text has {len(ids)} tokens and fills no window of {context}; give a smaller --context"
        )
    cut = [list(ids[at * context : (at + 1) * context]) for at in range(min(count, limit or count))]
    if begin is not None:
        cut = [[begin, *window[1:]] for window in cut]
    return cut


def score(
    source: Source, windows: Sequence[Sequence[int]], reference: Source | None, progress: Progress = lambda _: None
) -> Score:
    """Read all windows, with the reference window by window beside."""
    total = square = divergence = 0.0
    tokens = same = 0
    for window in _progressing(windows, "Reading the text", progress):
        targets = torch.tensor(window[len(window) // 2 + 1 :])
        other = reference.log_probs(window) if reference else None
        at = 0
        for log_probs in source.log_probs(window):
            wanted = targets[at : at + len(log_probs), None]
            at += len(log_probs)
            losses = -log_probs.gather(1, wanted).double()
            total, square = total + losses.sum().item(), square + losses.square().sum().item()
            tokens += len(log_probs)
            if other is not None:
                expected = next(other)
                divergence += _divergence(expected, log_probs)
                same += int((expected.argmax(-1) == log_probs.argmax(-1)).sum())
    mean = total / tokens
    if not math.isfinite(mean):
        raise NumericalError("the model gives a token of the text no probability, or one that is not a number")
    return Score(
        perplexity=math.exp(min(mean, 700.0)),
        tokens=tokens,
        error=math.sqrt(max(0.0, square / tokens - mean * mean) / max(1, tokens - 1)),
        kl_mean=divergence / tokens if reference else None,
        top1_agreement=same / tokens if reference else None,
    )


def _divergence(expected: torch.Tensor, log_probs: torch.Tensor) -> float:
    """Sum over positions of KL(expected || log_probs), both ln p (positions, vocabulary)."""
    return float((expected.exp() * (expected - log_probs)).sum(-1, dtype=torch.float64).sum())


def _chunks(length: int) -> list[int]:
    """How many scored positions each chunk of a window gives."""
    ends = range(CHUNK, length + CHUNK, CHUNK)
    counts = [min(end, length - 1) - max(end - CHUNK, length // 2) for end in ends]
    return [count for count in counts if count > 0]


def _progressing(windows: Sequence[Sequence[int]], stage: str, progress: Progress) -> Iterator[Sequence[int]]:
    total, done = sum(map(len, windows)), 0
    progress(LoadProgress(stage, 0, total, "tokens"))
    for window in windows:
        yield window
        done += len(window)
        progress(LoadProgress(stage, done, total, "tokens"))
