"""One step of work on the model: a flat batch of tokens in, logits of the sequences that want them out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from backend.cache.blocks import Move
from backend.cache.kv import KVPool, SequenceSlots
from backend.engine.compiled import CompiledStep, Going, Tokens
from backend.engine.gpu import decoder, enter, on_device, to_host
from backend.engine.partly import PartlyComputed, piece_tokens
from backend.engine.scheduler import PREFILL_TOKENS, Work
from backend.engine.threads import Threads
from backend.model.attention import attention
from backend.model.llama import Attend, Llama


class Runner:
    """Owns nothing but references: the model and the pool of keys and values."""

    def __init__(
        self,
        model: Llama,
        pool: KVPool,
        threads: Threads | None = None,
        *,
        graphs: bool = True,
        compiled: bool = True,
    ) -> None:
        """Computes on the pool's device, where the model must be too. graphs False: parts of it are streamed, or are
        computed on the CPU, so a step cannot be recorded as a CUDA graph. compiled False: never a step in one call."""
        self.model, self.pool = on_device(model, pool.device), pool
        self.device = pool.device
        self._decoder = decoder(self.model, pool, graphs=graphs)
        self._compiled = CompiledStep.of(self.model, pool) if compiled else None
        self._part_seconds: float | None = None  # each token of a prompt, where a step is set aside between parts
        self._threads = threads
        self.before: Callable[[], None] = lambda: None  # called when all that is left of a step is to compute it
        self.tokens_evaluated = 0  # all tokens that ever went through the model
        self.steps = 0

    @property
    def in_one_call(self) -> bool:
        """Whether a step is one compiled call."""
        return self._compiled is not None

    @property
    def sets_aside(self) -> bool:
        """Whether a step can be computed a little at a time: on the CPU. A GPU computes behind our back: nobody knows
        when a part of a layer is done."""
        return self.device.type == "cpu"

    def be_uniform(self) -> None:
        """See `CompiledStep.be_uniform`; nothing to do where a step is no compiled one."""
        if self._compiled is not None:
            self._compiled.be_uniform()

    def copy_blocks(self, moves: Sequence[Move]) -> None:
        """Carry out what the block pool has written down, in its order, before anything else is computed."""
        if moves:
            enter(self.device)
            self.pool.carry_out(moves)

    def run(self, work: Sequence[Work]) -> torch.Tensor:
        """Evaluate the step. Returns logits, float32 (sum of `logit_rows`, vocab), in the order of `work`."""
        self.steps += 1
        enter(self.device)
        if self._decoder is not None and self._decoder.takes(work):
            self.tokens_evaluated += len(work)
            self.before()
            with torch.inference_mode():
                return to_host(self._decoder.run(work))
        return self._logits(*self._flat(work))

    def piece_tokens(self, seconds: float) -> int:
        """How many tokens of prompts to `begin` with, where a part of them may take so long."""
        return PREFILL_TOKENS if self._compiled is not None else piece_tokens(self._part_seconds, seconds)

    def begin(self, work: Sequence[Work]) -> Going | PartlyComputed:
        """A step to be computed a little at a time, one after the other. Only where it `sets_aside`."""
        self.steps += 1
        flat = self._flat(work)
        self._use_threads(len(flat[0]))
        with torch.inference_mode():
            if self._compiled is not None:
                return self._compiled.begin(*flat)
            return PartlyComputed(self._parts(*flat), len(flat[0]))

    def go_on(self, going: Going | PartlyComputed, seconds: float) -> torch.Tensor | None:
        """As much of it as fits into so many seconds, at least a part of a layer. Returns what `run` does at the end.

        The blocks of the step's sequences must stay theirs until then.
        """
        if isinstance(going, PartlyComputed):
            self._use_threads(going.tokens)
            self.before()
            with torch.inference_mode():
                logits = going.go_on(seconds)
            self._part_seconds = going.seconds_per_token or self._part_seconds
            return logits
        assert self._compiled is not None
        return self._compiled.go_on(going, self._threads.all if self._threads else 1, seconds, self.before)

    def _flat(self, work: Sequence[Work]) -> tuple[list[int], list[Tokens], list[int]]:
        """The tokens of a step, whose they are, and which of them give logits."""
        ids: list[int] = []
        rows: list[int] = []
        parts: list[Tokens] = []
        for item in work:
            request, start = item.request, item.request.computed
            assert request.lease is not None
            blocks = request.lease.blocks
            if item.drafts and self._compiled is None:
                # Torch's attention rounds several queries otherwise than one: each token as if it came alone.
                parts += [Tokens(len(ids) + n, 1, start + n, blocks) for n in range(item.evaluated)]
            else:
                parts.append(Tokens(len(ids), item.evaluated, start, blocks, prompt=item.is_prompt))
            ids += request.ids[start : start + item.tokens]
            ids += item.drafts
            rows += range(len(ids) - item.logit_rows, len(ids))
        self.tokens_evaluated += len(ids)
        return ids, parts, rows

    def score(self, ids: Sequence[int], start: int, blocks: Sequence[int], rows: Sequence[int]) -> torch.Tensor:
        """Evaluate `ids`, the tokens from `start` on of a sequence in these blocks, for whoever measures a model.

        Returns logits, float32 (rows, vocab), of the tokens ids[rows]; `run` gives those of last tokens only.
        """
        enter(self.device)
        return self._logits(ids, [Tokens(0, len(ids), start, blocks, prompt=True)], rows)

    def _logits(self, ids: Sequence[int], parts: Sequence[Tokens], rows: Sequence[int]) -> torch.Tensor:
        """The step itself: compiled where that applies, else one torch operation after the other."""
        self._use_threads(len(ids))
        with torch.inference_mode():
            if self._compiled is not None:
                return self._compiled.run(ids, parts, rows, self._threads.all if self._threads else 1, self.before)
            computed = self._parts(ids, parts, rows)
            self.before()
            return to_host(next(logits for logits in computed if logits is not None))

    def _use_threads(self, tokens: int) -> None:
        if self._threads is not None:
            # A compiled step has threads of its own; what torch does around it is small, and so is drawing.
            self._threads.use(tokens if self._compiled is None else 1)

    def _parts(self, ids: Sequence[int], parts: Sequence[Tokens], rows: Sequence[int]) -> Iterator[torch.Tensor | None]:
        """The step as torch operations: see `Llama.in_parts`. What only Python has to do is done."""
        spans = [
            _Span(part.first, part.count, self.pool.table(part.blocks, part.start, part.start + part.count))
            for part in parts
        ]
        positions = [at for part in parts for at in range(part.start, part.start + part.count)]
        return self.model.in_parts(
            torch.tensor(ids, device=self.device),
            torch.tensor(positions, device=self.device),
            self._attend(spans),
            torch.tensor(rows, dtype=torch.int64, device=self.device),
        )

    def _attend(self, spans: Sequence[_Span]) -> Attend:
        pool, window = self.pool, self.model.config.sliding_window

        def attend(layer: int, heads: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
            query, key, value = self.model.turned(heads, turns)
            mixed = []
            for span in spans:
                part = slice(span.start, span.start + span.length)
                pool.store(layer, span.slots, key[part], value[part])
                mixed.append(attention(query[part], pool.read(layer, span.slots), window))
            return mixed[0] if len(mixed) == 1 else torch.cat(mixed)

        return attend


class _Span:
    """One sequence's tokens in the flat batch, and where its keys and values live."""

    def __init__(self, start: int, length: int, slots: SequenceSlots) -> None:
        self.start, self.length, self.slots = start, length, slots
