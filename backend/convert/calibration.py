"""What each linear of a model is given while it reads a text, one layer at a time: the calibration of GPTQ.

Only the residual stream of all samples is kept, (samples, tokens, dim) float32. What a linear inside the layer is given
is computed from it whenever it is asked for, which costs time and no memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil
import torch
import torch.nn.functional as F

from backend.checkpoint.base import Checkpoint
from backend.convert.output import ConvertError
from backend.convert.rows import pieces
from backend.model.attention import attention
from backend.model.config import ModelConfig
from backend.model.rope import Rope
from backend.tokenizer.open import open_tokenizer

MIN_TOKENS = 32
_MAX_TEXT = 1 << 28  # bytes
_LETTERS = 8  # per token, more than any language needs
_QKV = ("wq", "wk", "wv")


def calibration_ids(source: Checkpoint, text: Path, samples: int, tokens: int) -> torch.Tensor:
    """int64 (samples, tokens): pieces of the text that lie evenly apart, each from the start of a sequence.

    At most as long as the model's context. Fewer, and at last one shorter sample, where the text has no more.
    """
    if samples < 1 or tokens < MIN_TOKENS:
        raise ConvertError(
            f"{samples} samples of {tokens} tokens; expected at least 1 sample of at least {MIN_TOKENS} tokens"
        )
    tokens = min(tokens, source.config.context)
    tokenizer = open_tokenizer(source.tokenizer, source.config.vocab_size)
    ids = tokenizer.encode(_spread(_read(text), samples * tokens * _LETTERS, samples))
    if len(ids) < MIN_TOKENS:
        raise ConvertError(f"{text}: has {len(ids)} tokens; calibration needs {MIN_TOKENS} and is good from 100,000 on")
    first = tokenizer.with_start([])
    own = max(1, min(tokens - len(first), len(ids)))
    count = min(samples, len(ids) // own)
    _check_memory(source.config, count * tokens)
    places = [(len(ids) - own) * number // max(1, count - 1) for number in range(count)]
    return torch.tensor([first + ids[place : place + own] for place in places])


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > _MAX_TEXT:
            raise ConvertError(f"{path}: has more than {_MAX_TEXT >> 20} MiB; a part of it is enough")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ConvertError(f"{path}: is no text in UTF-8") from None
    except OSError as error:
        raise ConvertError(f"{path}: cannot be read ({error.strerror or error})") from None


def _spread(text: str, letters: int, count: int) -> str:
    """The text, or `count` parts of it of that many letters together."""
    if len(text) <= letters:
        return text
    part = letters // count
    return "\n".join(text[start : start + part] for start in range(0, len(text) - part + 1, len(text) // count))


def _check_memory(config: ModelConfig, tokens: int) -> None:
    """The residual stream, a Hessian of the widest input with two more matrices of its size, and the layer."""
    widest = max(config.ffn_dim, config.n_heads * config.head_dim, config.dim)
    layer = 4 * (3 * config.dim * config.ffn_dim + 4 * config.dim * config.n_heads * config.head_dim)
    needed = 4 * tokens * config.dim + 3 * 8 * widest**2 + layer
    free = psutil.virtual_memory().available
    if needed > free:
        raise ConvertError(
            f"calibration needs {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free; "
            "fewer or shorter samples need less"
        )


class Stream:
    """The residual stream of all samples, and the one layer that it goes through at the moment.

    The same computation as `backend.model.llama`, taken apart where a linear is given its input.
    """

    def __init__(self, source: Checkpoint, ids: torch.Tensor) -> None:
        """ids int64 (samples, tokens)."""
        self._source, self._config = source, source.config
        self._rope = _rope(source)
        self._turns = self._rope.turns(torch.arange(ids.shape[1]))
        self._matrices: dict[str, torch.Tensor] = {}
        self._vectors: dict[str, torch.Tensor] = {}
        self.hidden = _embedded(source, ids)  # (samples, tokens, dim) float32

    def enter(self, number: int) -> None:
        """Layer `number` is next; its matrices are given by `put`."""
        at = f"layers.{number}."
        names = [name for name in self._source.tensors if name.startswith(at) and name.endswith(("_norm", "_bias"))]
        self._vectors = {name.removeprefix(at): as_written(self._source.read(name).float32()) for name in names}
        self._matrices.clear()

    def put(self, part: str, matrix: torch.Tensor) -> None:
        """What linear `part` of this layer multiplies with from now on: float32 (out, in)."""
        self._matrices[part] = matrix

    def inputs(self, part: str) -> Iterator[torch.Tensor]:
        """What `part` is given: float32 (tokens, in) of each sample. Needs the linears that come before it."""
        give = {"wq": self._attention_input, "wo": self._mixed, "w1": self._feed_forward_input, "w2": self._gated}[part]
        return (give(x) for x in self.hidden)

    def add(self, part: str) -> Iterator[None]:
        """Add what `part`, wo or w2, makes of its input to the stream, one sample at each step."""
        for x, given in zip(self.hidden, self.inputs(part)):
            x += self._linear(part, given)
            yield

    def _linear(self, part: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self._matrices[part], self._vectors.get(part + "_bias"))

    def _attention_input(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],), self._vectors["attention_norm"], self._config.norm_eps)

    def _mixed(self, x: torch.Tensor) -> torch.Tensor:
        given = self._attention_input(x)
        query, key, value = (self._linear(part, given).unflatten(-1, (-1, self._config.head_dim)) for part in _QKV)
        query, key = (self._rope.apply(heads, self._turns) for heads in (query, key))
        run = key.transpose(0, 1), value.transpose(0, 1)
        return attention(query, [run], self._config.sliding_window).flatten(1)

    def _feed_forward_input(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],), self._vectors["ffn_norm"], self._config.norm_eps)

    def _gated(self, x: torch.Tensor) -> torch.Tensor:
        given = self._feed_forward_input(x)
        return F.silu(self._linear("w1", given)) * self._linear("w3", given)


def as_written(values: torch.Tensor) -> torch.Tensor:
    """float32 as float16 holds it: what is not quantised is written like this."""
    return values.half().float()


def _embedded(source: Checkpoint, ids: torch.Tensor) -> torch.Tensor:
    table = source.read("tok_embeddings")
    found = torch.empty(*ids.shape, source.config.dim)
    for start, stop in pieces(table.shape):
        here = (ids >= start) & (ids < stop)
        if bool(here.any()):
            found[here] = as_written(table.float32(start, stop))[ids[here] - start]
            table.release()
    return found


def _rope(source: Checkpoint) -> Rope:
    config = source.config
    factors = None
    if config.rope_scaling is not None:
        factors = torch.tensor(config.rope_scaling.divisors(config.head_dim, config.rope_theta), dtype=torch.float64)
    if "rope_freqs" in source.tensors:
        table = source.read("rope_freqs").float32().flatten().double()
        factors = table if factors is None else factors * table
    return Rope(config.head_dim, config.rope_theta, interleaved=config.rope_interleaved, factors=factors)
