"""A whole step in one call of compiled C, for a model on the CPU whose products are in tiles.

The slow twin is `Llama.forward` with `attention`: the same formulas, one torch operation after the other. A small model
spends more time between torch's operations than in them; here nothing stands between. A reply's numbers do not depend
on the other tokens of the step or on the number of threads. Where the processor has AMX, those of a prompt may, by
rounding, on how it is cut into steps: its attention, and products of more than 32 of its tokens, are bfloat16.

The output may be plain 16-bit numbers. Layers of plain numbers go through torch: there, what is streamed and what is
resident must give the same bits, and many tokens at once are torch's strength.
"""

from __future__ import annotations

import ctypes
import math
import weakref
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from backend.cache.kv import KVPool
from backend.engine.threads import AllThreads
from backend.kernels.cpu import steps
from backend.kernels.cpu.plain import KINDS
from backend.model.llama import Llama, Multiply
from backend.model.rope import Rope
from backend.weights.linear import BiasedLinear, PlainLinear, SplitLinear
from backend.weights.tiled import TiledLinear

TURNS_AT_ONCE = 1024  # positions whose turns are computed together: a millisecond


@dataclass(frozen=True)
class Tokens:
    """One sequence's new tokens: `count` of the flat batch from `first` on, at positions `start` and following."""

    first: int
    count: int
    start: int
    blocks: Sequence[int]  # of the whole sequence so far
    prompt: bool = False  # read, not written: numbers may depend, by rounding, on how many come at once


@dataclass(eq=False)
class Going:
    """A step on its way through the layers, with all that its description points to."""

    step: steps.Step
    logits: torch.Tensor  # float32 (rows, vocabulary), of the wanted rows; valid when it is done
    workspace: int  # its address: nothing else is computed in it until the step is done
    kept: tuple[object, ...]


class CompiledStep:
    """Holds the addresses of a model's weights and of a cache, and both alive with them."""

    def __init__(
        self, model: Llama, pool: KVPool, layers: ctypes.Array[steps.LayerWeights], output: steps.Stack
    ) -> None:
        library = steps.step_library()
        assert library is not None
        config, keys = model.config, pool.keys
        self._library, self._model, self._pool, self._layers = library, model, pool, layers
        self._described = steps.Model(
            tools=steps.tools(),
            dim=config.dim,
            ffn_dim=config.ffn_dim,
            heads=config.n_heads,
            kv_heads=config.n_kv_heads,
            head_dim=config.head_dim,
            layers=config.n_layers,
            window=config.sliding_window or 0,
            norm_eps=config.norm_eps,
            interleaved=config.rope_interleaved,
            layer=layers,
            norm=model.norm.data_ptr(),
            output=output,
            keys=keys.data_ptr(),
            values=pool.values.data_ptr(),
            key_scales=None if pool.key_scales is None else pool.key_scales.data_ptr(),
            value_scales=None if pool.value_scales is None else pool.value_scales.data_ptr(),
            layer_bytes=keys.stride(0) * keys.itemsize,
            head_bytes=keys.stride(1) * keys.itemsize,
            kind=steps.KINDS[keys.dtype],
        )
        self._turns = _Turns(model.rope, config.head_dim, pool.keys.shape[2])
        # Prompts take much room, and their steps may be set aside; those that only write go on in their own meanwhile.
        self._writing, self._reading = library.suri_workspace_new(), library.suri_workspace_new()
        self._set_aside: Callable[[], Going | None] = _nothing  # what is in the second one, while somebody wants it

    @classmethod
    def of(cls, model: Llama, pool: KVPool) -> CompiledStep | None:
        """None where it does not apply: no compiler, a product that is not in tiles, an unusual shape."""
        config = model.config
        if (
            steps.step_library() is None
            or pool.device.type != "cpu"
            or pool.block_size != steps.BLOCK_TOKENS
            or config.head_dim > steps.MAX_HEAD
            or config.head_dim % 2
            or config.n_heads // config.n_kv_heads > steps.MAX_ROWS
            or pool.keys.dtype not in steps.KINDS
        ):
            return None
        layers = (steps.LayerWeights * config.n_layers)()
        for at, layer in enumerate(model.layers):
            stacks = [_stack(product, plain=False) for product in (layer.wqkv, layer.wo, layer.w13, layer.w2)]
            if None in stacks or not _plain(layer.attention_norm) or not _plain(layer.ffn_norm):
                return None
            norms = layer.attention_norm.data_ptr(), layer.ffn_norm.data_ptr()
            layers[at] = steps.LayerWeights(*norms, *stacks)
        output = _stack(model.output, plain=True)
        return cls(model, pool, layers, output) if output is not None and _plain(model.norm) else None

    def be_uniform(self) -> None:
        """From now on prompts are computed as replies are: slower with AMX, and the same bits however they are cut.

        For those who compare what must not change a word: scheduling, caching, guessing.
        """
        self._described.uniform = 1

    def run(
        self,
        ids: Sequence[int],
        parts: Sequence[Tokens],
        rows: Sequence[int],
        threads: int,
        before: Callable[[], None] = lambda: None,
    ) -> torch.Tensor:
        """Evaluate the tokens `ids` of all parts, and store their keys and values. Returns logits, float32 (rows,
        vocabulary), of the tokens ids[rows]. `before` is called when Python has nothing more to do."""
        reading = any(part.prompt for part in parts) and self._set_aside() is None
        going = self._described_step(ids, parts, rows, self._reading if reading else self._writing)
        logits = self.go_on(going, threads, before=before)
        assert logits is not None
        return logits

    def begin(self, ids: Sequence[int], parts: Sequence[Tokens], rows: Sequence[int]) -> Going:
        """The same, to be computed by `go_on`, with others in between. One at a time: the one before is given up."""
        going = self._described_step(ids, parts, rows, self._reading)
        self._set_aside = weakref.ref(going)
        return going

    def _described_step(
        self, ids: Sequence[int], parts: Sequence[Tokens], rows: Sequence[int], workspace: int
    ) -> Going:
        numbers, wanted = array("q", ids), array("q", rows)  # torch takes ten times as long to make a tensor of a list
        x = self._model.embedding(torch.frombuffer(numbers, dtype=torch.int64)).contiguous()
        turns = self._turns.until(max(part.start + part.count for part in parts))
        tables = [array("i", part.blocks) for part in parts]
        spans = (steps.Span * len(parts))(
            *(
                steps.Span(part.first, part.count, part.start, table.buffer_info()[0], part.prompt)
                for part, table in zip(parts, tables, strict=True)
            )
        )
        logits = torch.empty(len(rows), self._described.output.rows)
        step = steps.Step(
            len(ids),
            len(parts),
            len(rows),
            x.data_ptr(),
            turns.data_ptr(),
            spans,
            wanted.buffer_info()[0],
            logits.data_ptr(),
        )
        return Going(step, logits, workspace, (x, turns, tables, spans, wanted))

    def go_on(
        self,
        going: Going,
        threads: int,
        seconds: float = math.inf,
        before: Callable[[], None] = lambda: None,
    ) -> torch.Tensor | None:
        """As much as fits into so many seconds: at least a part of a layer. Returns the logits when all is done."""
        assert self._set_aside() in (None, going) or going.workspace == self._writing, "another one was begun"
        before()
        left = self._library.suri_run_step(self._described, going.step, going.workspace, threads, seconds)
        if left < 0:
            raise MemoryError(f"a step of {going.step.tokens} tokens found no memory for its intermediate values")
        if left:
            return None
        if going is self._set_aside():
            self._set_aside = _nothing
        return going.logits

    def workspace_bytes(self) -> int:
        """Memory it keeps between steps: it grows with the largest step so far."""
        return sum(int(self._library.suri_workspace_bytes(each)) for each in (self._writing, self._reading))

    def __del__(self) -> None:
        for each in (getattr(self, "_writing", None), getattr(self, "_reading", None)):
            if each:
                self._library.suri_workspace_free(each)


def _nothing() -> None:
    return None


class _Turns:
    """The turns of all positions so far, computed once: most steps need one more than the step before."""

    def __init__(self, rope: Rope, head_dim: int, positions: int) -> None:
        """`positions`: as many as a sequence can have. Memory is taken when it is first written to."""
        self._rope, self._known = rope, 0
        self._table = torch.empty(positions, head_dim)

    def until(self, end: int) -> torch.Tensor:
        """float32 (positions, head_dim): cosine and sine of each pair, at all positions below `end`."""
        if end > len(self._table):
            raise IndexError(f"positions are below {len(self._table)}, found {end - 1}")
        while self._known < end:
            chunk = torch.arange(self._known, min(self._known + TURNS_AT_ONCE, len(self._table)))
            self._table[self._known : self._known + len(chunk)] = torch.view_as_real(self._rope.turns(chunk)).flatten(1)
            self._known += len(chunk)
        return self._table


def _stack(product: Multiply, *, plain: bool) -> steps.Stack | None:
    """One weight, or several side by side, with a bias or without. None: one of them is of another kind."""
    bias = None
    if isinstance(product, AllThreads):  # here every product has all threads
        product = product.multiply
    if isinstance(product, BiasedLinear):
        bias, product = product.bias, product.linear
    parts = product.parts if isinstance(product, SplitLinear) else [product]
    weights = [found for part in parts if (found := _weight(part, plain)) is not None]
    if len(weights) != len(parts) or len(parts) > steps.MAX_PARTS or (bias is not None and not _plain(bias)):
        return None
    return steps.Stack(
        count=len(weights),
        rows=sum(weight.rows for weight in weights),
        columns=parts[0].in_features,  # type: ignore[attr-defined]
        parts=(steps.Weight * steps.MAX_PARTS)(*weights),
        bias=None if bias is None else bias.data_ptr(),
    )


def _weight(part: Multiply, plain: bool) -> steps.Weight | None:
    if isinstance(part, TiledLinear) and not part.exact:
        return steps.Weight(part.format.ggml_id, part.out_features, part.tiles.data_ptr())
    if plain and isinstance(part, PlainLinear) and part.weight.is_cpu and part.weight.dtype in KINDS:
        return steps.Weight(steps.PLAIN + KINDS[part.weight.dtype], part.out_features, part.weight.data_ptr())
    return None


def _plain(vector: torch.Tensor) -> bool:
    return vector.dtype == torch.float32 and vector.is_contiguous() and vector.device.type == "cpu"
