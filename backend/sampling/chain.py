"""The order of the samplers: parameters become a list of steps on a row of logits.

The order is llama.cpp's, and can be set (`sampler_order`): penalties first, then the cuts, which look at the model's
own distribution, so that a high temperature adds variety among sensible tokens instead of letting nonsense in. A
parameter at its neutral value adds no step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from backend.kernels.cpu.draws import Cut
from backend.params import STEPS, GenerationParams
from backend.sampling import bends, cuts, penalties, samplers
from backend.sampling.copies import Copies
from backend.sampling.history import History

# What is left of the chain where nothing is drawn (temperature 0), and where Mirostat does the cutting.
_MOVE_THE_BEST = frozenset({"penalties", "dry", "no_repeat_ngram"})
_BEFORE_MIROSTAT = _MOVE_THE_BEST | {"smoothing", "temperature"}


@dataclass
class Row:
    """The logits that are left, float32 (n,), and which tokens they are: ids int64 (n,), rising; None means all."""

    logits: torch.Tensor
    ids: torch.Tensor | None = None

    def token(self, place: int) -> int:
        return place if self.ids is None else int(self.ids[place])

    def places(self, tokens: NDArray[np.int64]) -> tuple[torch.Tensor, torch.Tensor]:
        """Where these tokens stand in the row, and which of `tokens` those are (others were cut before)."""
        wanted = torch.from_numpy(tokens).to(self.logits.device)
        if self.ids is None:
            kept = (wanted < self.logits.numel()).nonzero().flatten()
            return wanted[kept], kept
        at = torch.searchsorted(self.ids, wanted).clamp(max=len(self.ids) - 1)
        kept = (self.ids[at] == wanted).nonzero().flatten()
        return at[kept], kept

    def amounts(self, values: NDArray[np.float64], kept: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(values).to(self.logits.device, torch.float32)[kept]


Step = Callable[[Row], None]


def is_greedy(params: GenerationParams) -> bool:
    """Whether the likeliest token is taken and nothing is drawn."""
    return params.temperature == 0 and not _is_dynamic(params)


def needs_history(params: GenerationParams) -> bool:
    return bool(
        params.repetition_penalty != 1.0
        or params.frequency_penalty
        or params.presence_penalty
        or params.no_repeat_ngram
        or params.dry_multiplier
    )


@dataclass(frozen=True)
class Chain:
    """All steps before a draw. The last ones may also be had as `cuts`, for `kernels.cpu.draws`; or there are none."""

    steps: list[Step]
    last: list[Step]
    cuts: list[tuple[Cut, float]]


def chain(params: GenerationParams, history: History, uniform: Callable[[], float]) -> Chain:
    """The steps that these parameters ask for, in order. `uniform`: the request's random stream, for XTC."""
    order = [*params.sampler_order, *(name for name in STEPS if name not in params.sampler_order)]
    if is_greedy(params):
        order = [name for name in order if name in _MOVE_THE_BEST]
    elif params.mirostat:
        order = [name for name in order if name in _BEFORE_MIROSTAT]
    made = {**_history_steps(params, history), **_row_steps(params, uniform)}
    names = [name for name in order if made[name]]
    first, cuts = _cuts(params, names)
    before, last = ([step for name in part for step in made[name]] for part in (names[:first], names[first:]))
    return Chain(before, last, cuts)


def _cuts(params: GenerationParams, names: list[str]) -> tuple[int, list[tuple[Cut, float]]]:
    """From which of these steps on the rest are cuts that one call does, and those cuts."""
    if is_greedy(params):
        return len(names), [("top_k", 1)]
    values: dict[str, tuple[Cut, float]] = {
        "top_k": ("top_k", params.top_k),
        "top_p": ("top_p", params.top_p),
        "min_p": ("min_p", float(torch.log(torch.tensor(params.min_p)))),
        "temperature": ("temperature", max(params.temperature, samplers.COLDEST)),
    }
    first = names.index("top_k") if "top_k" in names else len(names)
    rest = names[first:]
    if not rest or params.mirostat or _is_dynamic(params) or any(name not in values for name in rest):
        return len(names), []
    return first, [values[name] for name in rest]


def _history_steps(params: GenerationParams, history: History) -> dict[str, list[Step]]:
    made: dict[str, list[Step]] = {"penalties": [], "dry": [], "no_repeat_ngram": []}
    copies = Copies(history)

    def repetition(row: Row) -> None:
        window = history.latest(params.repetition_range)
        tokens, factors = penalties.repetition(window, params.repetition_penalty, params.repetition_slope)
        places, kept = row.places(tokens)
        row.logits = samplers.repetition_penalty(row.logits, places, row.amounts(factors, kept))

    def counts(row: Row) -> None:
        window = history.reply(params.repetition_range)
        subtract(row, *penalties.counts(window, params.frequency_penalty, params.presence_penalty))

    def dry(row: Row) -> None:
        subtract(row, *copies.dry(params.dry_range, params.dry_multiplier, params.dry_base, params.dry_allowed_length))

    def ngram(row: Row) -> None:
        places, _ = row.places(penalties.repeated_ngrams(history.ids, params.no_repeat_ngram))
        left = samplers.without(row.logits, places)
        if bool(torch.isfinite(left).any()):  # a grammar may leave nothing but a repetition
            row.logits = left

    def subtract(row: Row, tokens: NDArray[np.int64], values: NDArray[np.float64]) -> None:
        places, kept = row.places(tokens)
        row.logits = row.logits.index_add(0, places, -row.amounts(values, kept))

    if params.repetition_penalty != 1.0:
        made["penalties"].append(repetition)
    if params.frequency_penalty or params.presence_penalty:
        made["penalties"].append(counts)
    if params.dry_multiplier:
        made["dry"].append(dry)
    if params.no_repeat_ngram:
        made["no_repeat_ngram"].append(ngram)
    return made


def _row_steps(params: GenerationParams, uniform: Callable[[], float]) -> dict[str, list[Step]]:
    """The steps that look at nothing but the row."""

    def on_logits(wanted: bool, function: Callable[[torch.Tensor], torch.Tensor]) -> list[Step]:
        def step(row: Row) -> None:
            row.logits = function(row.logits)

        return [step] if wanted else []

    def narrow(row: Row) -> None:
        # As `samplers.top_k`, but what follows sees forty logits and not fifty thousand: 0.3 ms a token where it was 2.
        if params.top_k < row.logits.numel():
            row.logits, places = samplers.likeliest(row.logits, params.top_k)
            row.ids = places if row.ids is None else row.ids[places]

    p = params
    return {
        "top_k": [narrow] if p.top_k else [],
        "top_n_sigma": on_logits(p.top_n_sigma > 0, lambda row: cuts.top_n_sigma(row, p.top_n_sigma)),
        "tfs": on_logits(p.tfs < 1, lambda row: cuts.tail_free(row, p.tfs)),
        "typical_p": on_logits(p.typical_p < 1, lambda row: cuts.typical_p(row, p.typical_p)),
        "top_p": on_logits(p.top_p < 1, lambda row: samplers.top_p(row, p.top_p)),
        "min_p": on_logits(p.min_p > 0, lambda row: samplers.min_p(row, p.min_p)),
        "top_a": on_logits(p.top_a > 0, lambda row: cuts.top_a(row, p.top_a)),
        "epsilon_cutoff": on_logits(p.epsilon_cutoff > 0, lambda row: cuts.epsilon_cutoff(row, p.epsilon_cutoff)),
        "eta_cutoff": on_logits(p.eta_cutoff > 0, lambda row: cuts.eta_cutoff(row, p.eta_cutoff)),
        "xtc": on_logits(
            p.xtc_probability > 0, lambda row: cuts.xtc(row, p.xtc_threshold, p.xtc_probability, uniform())
        ),
        "smoothing": on_logits(
            p.smoothing_factor > 0, lambda row: bends.smoothing(row, p.smoothing_factor, p.smoothing_curve)
        ),
        "temperature": on_logits(
            _is_dynamic(p) or p.temperature != 1,
            lambda row: (
                bends.dynamic_temperature(row, p.dynatemp_low, p.dynatemp_high, p.dynatemp_exponent)
                if _is_dynamic(p)
                else samplers.temperature(row, p.temperature)
            ),
        ),
    }


def _is_dynamic(params: GenerationParams) -> bool:
    return params.dynatemp_high > params.dynatemp_low


def log_probability(logits: torch.Tensor, token: int) -> float:
    """Natural log of the token's probability under the model's own, untempered distribution."""
    return float(logits[token] - torch.logsumexp(logits, 0))


def top_log_probabilities(logits: torch.Tensor, count: int) -> tuple[tuple[int, float], ...]:
    """The `count` likeliest tokens under the model's own distribution, best first, with their natural logs."""
    if not count:
        return ()
    values, ids = torch.topk(logits, min(count, logits.numel()))
    return tuple(zip(ids.tolist(), (values - torch.logsumexp(logits, 0)).tolist(), strict=True))
