"""Draws one request's tokens, and remembers what that needs: history, Mirostat's mu, a grammar, banned texts.

Everything random comes from the request's own stream and everything remembered from its own tokens, so a seed gives
the same reply alone, in a batch, and after its blocks were given back and read again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from backend.errors import SamplingError
from backend.kernels.cpu.draws import MOST, Draw
from backend.params import GenerationParams
from backend.sampling import samplers
from backend.sampling.banned import BannedTexts
from backend.sampling.chain import Row, chain, is_greedy, needs_history
from backend.sampling.history import History
from backend.sampling.mirostat import Mirostat

BANNED_BIAS = -100.0  # this logit bias, the lowest, removes the token
NONE_LEFT = "the reply's rules (banned texts, biases, grammar) leave no token to go on with"
NOTHING: frozenset[int] = frozenset()
MOST_REWINDS = 20  # to one place; then the token that would complete the banned text is refused where it stands


class Matcher(Protocol):
    """Which tokens a grammar allows next; `sampling.grammar` has the real one."""

    def allowed(self, size: int) -> NDArray[np.bool_]:
        """One flag per token, (size,). Raises SamplingError when the grammar cannot go on."""
        ...

    def accept(self, token: int) -> None: ...

    def rewind(self, tokens: int) -> None: ...

    @property
    def complete(self) -> bool:
        """Nothing can follow any more."""
        ...


@dataclass(frozen=True)
class Drawn:
    """`token` is the next one; or, where it is None, `rewind` tokens are to be taken back and computed anew."""

    token: int | None
    rewind: int = 0


@dataclass
class _Refused:
    """Tokens that banned texts forbid at one place of the reply."""

    began: set[int] = field(default_factory=set)  # a banned text began with them, and the reply came back for it
    completed: set[int] = field(default_factory=set)  # they would have completed one
    closed: bool = False  # nothing but `began` was left here: they are allowed again, and the reply comes back no more

    def tokens(self) -> set[int]:
        return self.completed if self.closed else self.completed | self.began


class Sampler:
    """One request's way from logits to tokens. Belongs to the engine thread."""

    def __init__(
        self,
        params: GenerationParams,
        prompt: Sequence[int],
        uniform: Callable[[], float],
        *,
        end_ids: frozenset[int] = frozenset(),
        token_bytes: Callable[[int], bytes] | None = None,
        matcher: Matcher | None = None,
        compiled: bool = True,
    ) -> None:
        """`uniform`: the request's random stream, numbers in [0, 1). `token_bytes`: for DRY breakers, banned texts.
        compiled False: one torch operation after the other, the slow twin."""
        self._params, self._uniform, self._matcher = params, uniform, matcher
        self._greedy = is_greedy(params)
        breakers = params.dry_breakers if params.dry_multiplier else ()
        self._history = History(prompt if needs_history(params) else (), breakers, token_bytes)
        self._remembers = needs_history(params)
        made = chain(params, self._history, uniform)
        self._drawing = Draw.of(made.cuts) if compiled else None
        self._steps = made.steps if self._drawing is not None else made.steps + made.last
        miro = params.mirostat and not self._greedy
        self._mirostat = Mirostat(params.mirostat, params.mirostat_tau, params.mirostat_eta) if miro else None
        self._banned = (
            BannedTexts(params.banned_strings, token_bytes) if params.banned_strings and token_bytes else None
        )
        self._refused: dict[int, _Refused] = {}  # by place in the reply
        self._ends, self._all_ends = end_ids, end_ids | set(params.stop_token_ids)
        # Where no step looks at the row before the draw, and no rule but that the reply must not end, the row need not
        # be copied for it.
        ruled = bool(params.logit_bias) or matcher is not None or self._banned is not None
        self._direct = (
            self._drawing is not None
            and not (self._steps or ruled)
            and self._drawing.keeps + len(self._all_ends) <= MOST
        )
        self._taken = 0

    @property
    def held(self) -> int:
        """How many of the latest tokens may still be taken back, so that nobody may see them."""
        return self._banned.held if self._banned is not None else 0

    @property
    def complete(self) -> bool:
        """The grammar is fulfilled and nothing can follow."""
        return self._matcher is not None and self._matcher.complete

    def next(self, logits: torch.Tensor) -> Drawn:
        """Draw the token that follows what was taken so far. logits float32 (vocab,), left as they are.

        Raises SamplingError when the rules leave no token.
        """
        if self._direct and self._drawing is not None:
            place = self._drawing(logits, 0.0 if self._greedy else self._uniform(), self._barred())
            if place >= 0:
                self._take(place, place)
                return Drawn(place)
            raise SamplingError(NONE_LEFT)
        while True:
            row = Row(self._ruled(logits))
            for step in self._steps:
                step(row)
            place, token = self._draw(row)
            back = self._banned.begins(token) if self._banned is not None else None
            if back is None:
                self._take(token, place)
                return Drawn(token)
            start = self._refused.get(self._taken - back, _Refused())
            if back and not start.closed and len(start.began) < MOST_REWINDS:
                self._rewind(back)
                return Drawn(None, back)
            self._refused.setdefault(self._taken, _Refused()).completed.add(token)

    def _draw(self, row: Row) -> tuple[int, int]:
        if self._drawing is not None:
            place = self._drawing(row.logits, 0.0 if self._greedy else self._uniform())
        elif self._greedy:
            place = int(row.logits.argmax())
        else:
            logits = row.logits if self._mirostat is None else self._mirostat.cut(row.logits)
            place = samplers.draw(logits, self._uniform())
        return place, row.token(place)

    def _take(self, token: int, place: int) -> None:
        self._taken += 1
        if self._mirostat is not None:
            self._mirostat.observe(place)
        if self._remembers:
            self._history.append(token)
        if self._matcher is not None:
            self._matcher.accept(token)
        if self._banned is not None:
            self._banned.push(token)
            for position in [p for p in self._refused if p < self._taken - self._banned.held]:
                del self._refused[position]

    def _rewind(self, back: int) -> None:
        """Take `back` tokens back, the first of which began a banned text."""
        assert self._banned is not None
        self._taken -= back
        first = self._banned.rewind(back)
        self._refused = {place: tokens for place, tokens in self._refused.items() if place <= self._taken}
        self._refused.setdefault(self._taken, _Refused()).began.add(first)
        if self._mirostat is not None:
            self._mirostat.rewind(back)
        if self._remembers:
            self._history.rewind(back)
        if self._matcher is not None:
            self._matcher.rewind(back)

    def _ruled(self, logits: torch.Tensor) -> torch.Tensor:
        """The row under the rules that nothing may soften: bias, ends, banned texts, grammar."""
        refused = self._refused.get(self._taken, _Refused())
        row = self._allowed(logits, refused)
        if row is logits or _any_left(row):
            return row
        if refused.began and not refused.closed:
            refused.closed = True
            return self._ruled(logits)
        raise SamplingError(NONE_LEFT)

    def _allowed(self, logits: torch.Tensor, refused: _Refused) -> torch.Tensor:
        params, row = self._params, logits
        if params.logit_bias:
            row = _biased(row, params.logit_bias)
        barred = refused.tokens() | self._barred()
        if barred:
            places = torch.tensor([token for token in sorted(barred) if token < row.numel()], dtype=torch.int64)
            row = samplers.without(row, places.to(row.device))
        if self._matcher is not None:
            row = self._matched(row, logits)
        return row

    def _barred(self) -> frozenset[int]:
        """What would end the reply, where it must go on."""
        if self._taken < self._params.min_tokens:
            return self._all_ends
        return self._ends if self._params.ignore_eos else NOTHING

    def _matched(self, row: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """What the grammar allows. Where it allows an end only, the reply ends, whatever `min_tokens` says."""
        assert self._matcher is not None
        barred = torch.from_numpy(~self._matcher.allowed(logits.numel())).to(logits.device)
        allowed = row.masked_fill(barred, samplers.NEVER)
        if _any_left(allowed):
            return allowed
        ends = [token for token in sorted(self._ends) if token < len(barred) and not barred[token]]
        if not ends:
            return allowed
        only = torch.full_like(logits, samplers.NEVER)
        only[ends] = logits[ends]
        return only


def _biased(logits: torch.Tensor, biases: tuple[tuple[int, float], ...]) -> torch.Tensor:
    known = [(token, bias) for token, bias in biases if token < logits.numel()]
    places = torch.tensor([token for token, _ in known], dtype=torch.int64, device=logits.device)
    amounts = [samplers.NEVER if bias <= BANNED_BIAS else bias for _, bias in known]
    return logits.index_add(0, places, torch.tensor(amounts, dtype=logits.dtype, device=logits.device))


def _any_left(row: torch.Tensor) -> bool:
    """Whether some token may still be drawn. One pass and no copy, where `isfinite` would make several."""
    return bool(row.max() > samplers.NEVER)
