"""Log probabilities of a prompt's own tokens, for those who measure a model with texts that it did not write."""

from __future__ import annotations

import torch

from backend.engine.request import Request
from backend.errors import NumericalError
from backend.events import PromptScore


def score_prompt(request: Request, start: int, logits: torch.Tensor) -> None:
    """Note what the model thought of the prompt's tokens after these places.

    logits float32 (n, vocab): those at the places start, start + 1, ... of the request, each of which says what comes
    at the next one. A prompt that is read again, because its blocks were given away on the way, is not scored again.
    """
    done = len(request.prompt_scores)
    first, last = max(start, done), min(start + len(logits), len(request.prompt) - 1)
    if first < last:
        rows = logits[first - start : last - start]
        request.prompt_scores += _scores(rows, request.prompt[first + 1 : last + 1], request.top_logprobs)
    if len(request.prompt_scores) == len(request.prompt) - 1:
        request.score_prompt = False  # from here on it is a request as others


def _scores(rows: torch.Tensor, tokens: tuple[int, ...], count: int) -> list[PromptScore]:
    """The natural logs of these tokens, one a row, their ranks (1 is the likeliest), and the `count` likeliest."""
    if not bool(torch.isfinite(rows).all()):
        raise NumericalError("the model's output contains NaN or Inf, so the prompt cannot be scored")
    whole = torch.logsumexp(rows, 1)
    own = rows.gather(1, torch.tensor(tokens, device=rows.device)[:, None])
    logs = (own[:, 0] - whole).tolist()
    ranks = (1 + (rows > own).sum(1)).tolist()
    values, ids = torch.topk(rows, min(count, rows.shape[1]))
    tops = [
        tuple(zip(row_ids, row_values, strict=True))
        for row_ids, row_values in zip(ids.tolist(), (values - whole[:, None]).tolist(), strict=True)
    ]
    return [PromptScore(*each) for each in zip(logs, ranks, tops, strict=True)]
