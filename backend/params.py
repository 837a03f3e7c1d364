"""Every generation parameter, declared once.

The Parameters tab, preset `sampling:` sections, the API's request fields and the README table all come from the fields
of `GenerationParams`. To add a parameter: add a field here and a function in `sampling/`. What the values do, with the
formulas, is said where it is done: `sampling/`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from backend.errors import ParameterError, nearest
from backend.knobs import Knob, checked, declare, knobs_of

# The steps of the chain in their order, that of llama.cpp with the others put where they belong: what looks at the
# model's own distribution comes before what bends it.
STEPS = (
    "penalties", "dry", "no_repeat_ngram", "top_n_sigma", "top_k", "tfs", "typical_p", "top_p", "min_p", "top_a",
    "epsilon_cutoff", "eta_cutoff", "xtc", "smoothing", "temperature",
)  # fmt: skip


@dataclass(frozen=True)
class GenerationParams:
    """How to continue a prompt. Construct through `from_mapping` when values come from outside."""

    max_tokens: int = declare(
        1024, "int", "Reply length", "Most tokens in one reply; 0 means until the context is full.",
        group="Stopping", neutral=0, low=0, high=131072, front=True,
    )  # fmt: skip
    temperature: float = declare(
        0.7, "float", "Temperature", "Higher is more varied; 0 always takes the likeliest token.",
        group="Sampling", neutral=1.0, low=0.0, high=5.0, step=0.05, front=True,
    )  # fmt: skip
    top_p: float = declare(
        0.95, "float", "Top-p", "Keep the likeliest tokens that together reach this probability; 1 keeps all.",
        group="Sampling", neutral=1.0, low=0.0, high=1.0, step=0.01, front=True,
    )  # fmt: skip
    min_p: float = declare(
        0.05, "float", "Min-p", "Drop tokens less likely than this share of the likeliest one; 0 keeps all.",
        group="Sampling", neutral=0.0, low=0.0, high=1.0, step=0.01, front=True,
    )  # fmt: skip
    top_k: int = declare(
        40, "int", "Top-k", "Keep this many of the likeliest tokens; 0 keeps all.",
        group="Sampling", neutral=0, low=0, high=1_000_000,
    )  # fmt: skip
    seed: int | None = declare(
        None, "seed", "Seed", "The same seed gives the same reply. Leave empty for a new one each time.",
        group="Sampling", neutral=None, low=0, high=2**63 - 1,
    )  # fmt: skip
    sampler_order: tuple[str, ...] = declare(
        (), "names", "Order of the samplers",
        f"These first, in this order; the rest follow in theirs: {', '.join(STEPS)}.",
        group="Sampling", neutral=(), high=len(STEPS), choices=STEPS,
    )  # fmt: skip

    repetition_penalty: float = declare(
        1.0, "float", "Repetition penalty", "Above 1 makes tokens that were already used less likely; 1 does nothing.",
        group="Repetition", neutral=1.0, low=0.1, high=5.0, step=0.01,
    )  # fmt: skip
    repetition_range: int = declare(
        0, "int", "Range of the penalties", "How many of the latest tokens the three penalties look at; 0 means all.",
        group="Repetition", neutral=0, low=0, high=131072,
    )  # fmt: skip
    repetition_slope: float = declare(
        1.0, "float", "Slope of the repetition penalty",
        "Share of the repetition penalty for the older half of the range; 1 treats both halves the same.",
        group="Repetition", neutral=1.0, low=0.0, high=1.0, step=0.05,
    )  # fmt: skip
    frequency_penalty: float = declare(
        0.0, "float", "Frequency penalty", "Lowers a token's logit by this for each time the reply has used it.",
        group="Repetition", neutral=0.0, low=-2.0, high=2.0, step=0.05,
    )  # fmt: skip
    presence_penalty: float = declare(
        0.0, "float", "Presence penalty", "Lowers a token's logit by this when the reply has used it at all.",
        group="Repetition", neutral=0.0, low=-2.0, high=2.0, step=0.05,
    )  # fmt: skip
    no_repeat_ngram: int = declare(
        0, "int", "No repeated sequences of", "No sequence of this many tokens comes twice; 0 allows all.",
        group="Repetition", neutral=0, low=0, high=100,
    )  # fmt: skip
    dry_multiplier: float = declare(
        0.0, "float", "DRY multiplier", "Penalty for going on with a sequence that was there before; 0 turns DRY off.",
        group="Repetition", neutral=0.0, low=0.0, high=100.0, step=0.05,
    )  # fmt: skip
    dry_base: float = declare(
        1.75, "float", "DRY base", "How much faster the DRY penalty grows with each repeated token.",
        group="Repetition", neutral=1.75, low=1.0, high=4.0, step=0.01,
    )  # fmt: skip
    dry_allowed_length: int = declare(
        2, "int", "DRY allowed length", "Repeated sequences shorter than this cost nothing.",
        group="Repetition", neutral=2, low=1, high=50,
    )  # fmt: skip
    dry_breakers: tuple[str, ...] = declare(
        ("\n", ":", '"', "*"), "strings", "DRY breakers", "No repeated sequence goes across these texts. One per line.",
        group="Repetition", neutral=("\n", ":", '"', "*"), high=64,
    )  # fmt: skip
    dry_range: int = declare(
        0, "int", "DRY range", "How many of the latest tokens DRY looks at; 0 means all.",
        group="Repetition", neutral=0, low=0, high=131072,
    )  # fmt: skip

    typical_p: float = declare(
        1.0, "float", "Typical-p", "Keep the tokens whose surprise is nearest to the average, up to this mass.",
        group="Cutoffs", neutral=1.0, low=0.0, high=1.0, step=0.01,
    )  # fmt: skip
    tfs: float = declare(
        1.0, "float", "Tail-free", "Drop the tail where the probabilities level off; 1 keeps all.",
        group="Cutoffs", neutral=1.0, low=0.0, high=1.0, step=0.01,
    )  # fmt: skip
    top_n_sigma: float = declare(
        0.0, "float", "Top-n-sigma", "Keep logits within this many standard deviations of the best; 0 keeps all.",
        group="Cutoffs", neutral=0.0, low=0.0, high=20.0, step=0.05,
    )  # fmt: skip
    top_a: float = declare(
        0.0, "float", "Top-a", "Drop tokens less likely than this times the square of the best probability; 0 is off.",
        group="Cutoffs", neutral=0.0, low=0.0, high=1.0, step=0.01,
    )  # fmt: skip
    epsilon_cutoff: float = declare(
        0.0, "float", "Epsilon cutoff", "Drop tokens less likely than this; 0 keeps all.",
        group="Cutoffs", neutral=0.0, low=0.0, high=1.0, step=0.0001,
    )  # fmt: skip
    eta_cutoff: float = declare(
        0.0, "float", "Eta cutoff", "As the epsilon cutoff, but lower where the model is unsure; 0 keeps all.",
        group="Cutoffs", neutral=0.0, low=0.0, high=1.0, step=0.0001,
    )  # fmt: skip
    xtc_probability: float = declare(
        0.0, "float", "XTC probability", "How often the likeliest choices are left out on purpose; 0 is never.",
        group="Cutoffs", neutral=0.0, low=0.0, high=1.0, step=0.01,
    )  # fmt: skip
    xtc_threshold: float = declare(
        0.1, "float", "XTC threshold", "Of the tokens this likely, XTC leaves only the least likely one.",
        group="Cutoffs", neutral=0.1, low=0.0, high=1.0, step=0.01,
    )  # fmt: skip

    dynatemp_low: float = declare(
        0.0, "float", "Dynamic temperature from", "The temperature where the model is sure.",
        group="Shape", neutral=0.0, low=0.0, high=5.0, step=0.05,
    )  # fmt: skip
    dynatemp_high: float = declare(
        0.0, "float", "Dynamic temperature to",
        "The temperature where the model is unsure; above the lower end it replaces the temperature.",
        group="Shape", neutral=0.0, low=0.0, high=5.0, step=0.05,
    )  # fmt: skip
    dynatemp_exponent: float = declare(
        1.0, "float", "Dynamic temperature exponent", "How the temperature rises between them; 1 is evenly.",
        group="Shape", neutral=1.0, low=0.01, high=10.0, step=0.05,
    )  # fmt: skip
    smoothing_factor: float = declare(
        0.0, "float", "Smoothing factor", "Quadratic sampling: flattens the top and thins the tail; 0 is off.",
        group="Shape", neutral=0.0, low=0.0, high=10.0, step=0.05,
    )  # fmt: skip
    smoothing_curve: float = declare(
        1.0, "float", "Smoothing curve", "Above 1 the tail falls faster.",
        group="Shape", neutral=1.0, low=1.0, high=10.0, step=0.05,
    )  # fmt: skip
    mirostat: int = declare(
        0, "int", "Mirostat", "1 or 2 steers towards a set surprise, instead of all cutoffs; 0 is off.",
        group="Shape", neutral=0, low=0, high=2,
    )  # fmt: skip
    mirostat_tau: float = declare(
        5.0, "float", "Mirostat tau", "The surprise that Mirostat aims at, in bits.",
        group="Shape", neutral=5.0, low=0.0, high=20.0, step=0.1,
    )  # fmt: skip
    mirostat_eta: float = declare(
        0.1, "float", "Mirostat eta", "How fast Mirostat follows.",
        group="Shape", neutral=0.1, low=0.0, high=1.0, step=0.01,
    )  # fmt: skip

    stop: tuple[str, ...] = declare(
        (), "strings", "Stop strings", "The reply ends before any of these texts. One per line.",
        group="Stopping", neutral=(), high=16,
    )  # fmt: skip
    stop_token_ids: tuple[int, ...] = declare(
        (), "ids", "Stop tokens", "The reply ends at any of these token ids.",
        group="Stopping", neutral=(), high=256,
    )  # fmt: skip
    ignore_eos: bool = declare(
        False, "bool", "Never end by itself", "The model cannot end the reply; the length and the stop strings can.",
        group="Stopping", neutral=False,
    )  # fmt: skip
    min_tokens: int = declare(
        0, "int", "Shortest reply", "The model cannot end the reply before this many tokens.",
        group="Stopping", neutral=0, low=0, high=131072,
    )  # fmt: skip
    context_shift: bool = declare(
        False, "bool", "Go on when the context is full",
        "The model forgets the middle of the text and goes on to the reply length, instead of ending there.",
        group="Stopping", neutral=False,
    )  # fmt: skip
    keep_tokens: int = declare(
        -1, "int", "Never forgotten", "How many tokens at the beginning are kept then; -1 keeps the whole prompt.",
        group="Stopping", neutral=-1, low=-1, high=131072,
    )  # fmt: skip
    max_tokens_per_second: float = declare(
        0.0, "float", "Speed limit", "Most tokens in a second, for reading along; 0 is as fast as it goes.",
        group="Stopping", neutral=0.0, low=0.0, high=1000.0, step=0.5,
    )  # fmt: skip

    guidance_scale: float = declare(
        1.0, "float", "Guidance",
        "Above 1, the reply is led away from what the negative prompt would make it. Twice the work.",
        group="Rules", neutral=1.0, low=0.0, high=20.0, step=0.05,
    )  # fmt: skip
    negative_prompt: str = declare(
        "", "text", "Negative prompt",
        "What guidance leads away from: in a chat another system prompt, else a text in place of the prompt.",
        group="Rules", neutral="", high=100_000,
    )  # fmt: skip
    logit_bias: tuple[tuple[int, float], ...] = declare(
        (), "biases", "Logit bias", "Added to a token's logit; -100 bans it. One per line: token id, colon, number.",
        group="Rules", neutral=(), low=-100.0, high=100.0,
    )  # fmt: skip
    banned_strings: tuple[str, ...] = declare(
        (), "strings", "Banned texts",
        "The reply never says these, in small or capital letters: it goes back and says something else. One per line.",
        group="Rules", neutral=(), high=256,
    )  # fmt: skip
    json_schema: str = declare(
        "", "text", "JSON schema", "The reply is JSON that fits this schema; {} fits any JSON.",
        group="Rules", neutral="", high=100_000,
    )  # fmt: skip
    regex: str = declare(
        "", "text", "Regular expression", "The whole reply matches this expression.",
        group="Rules", neutral="", high=10_000,
    )  # fmt: skip
    grammar: str = declare(
        "", "text", "Grammar", "The whole reply follows this GBNF grammar, as in llama.cpp.",
        group="Rules", neutral="", high=100_000,
    )  # fmt: skip

    def __post_init__(self) -> None:
        for knob in KNOBS:
            object.__setattr__(self, knob.name, checked(knob, getattr(self, knob.name)))

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], base: GenerationParams | None = None) -> GenerationParams:
        """Build from outside values on top of `base` (or the defaults). Unknown names and bad values raise."""
        names = {knob.name for knob in KNOBS}
        for name in values:
            if name not in names:
                raise ParameterError(f"unknown parameter '{name}'{nearest(str(name), names)}", param=str(name))
        return dataclasses.replace(base or cls(), **dict(values))

    def check_tokens(self, vocab_size: int) -> None:
        """Raise ParameterError when a token id is none of a vocabulary of this size."""
        given = {"stop_token_ids": self.stop_token_ids, "logit_bias": tuple(token for token, _ in self.logit_bias)}
        for name, tokens in given.items():
            if tokens and max(tokens) >= vocab_size:
                raise ParameterError(
                    f"{name}: found token id {max(tokens)}, expected ids from 0 to {vocab_size - 1}", param=name
                )

    def changed(self) -> dict[str, Any]:
        """The values that differ from the defaults."""
        return {knob.name: getattr(self, knob.name) for knob in KNOBS if getattr(self, knob.name) != knob.default}


KNOBS: tuple[Knob, ...] = knobs_of(GenerationParams)
