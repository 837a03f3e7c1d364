"""From an open checkpoint to a model in memory, in the form and in the places that the preset's plan says.

Peak memory is the finished model plus one tensor's conversion: values go from the mapped file straight to their final
place, and its pages are given back at once. Weights are never widened beyond what was asked. Whatever ends a load early
(a cancel, a damaged file, no more memory), nothing of the half-made model stays.
"""

from __future__ import annotations

import itertools
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch

from backend.checkpoint.base import Checkpoint
from backend.checkpoint.mapped import read_ahead
from backend.errors import OutOfMemoryError
from backend.events import LoadProgress
from backend.memory import free_bytes, is_allocation_failure, mapping_temporaries
from backend.model.llama import Layer, Llama
from backend.model.rope import Rope
from backend.placement.hoststore import Link
from backend.placement.linears import borrow, build, values
from backend.placement.offload import Streamer
from backend.placement.parts import Part, placed_bytes, ring_bytes
from backend.placement.places import HostEmbedding, HostLinear, OrderedLinear, Places
from backend.placement.sizes import looked_up_in_output, shares_table, table_weights, vector_bytes, weight_bytes
from backend.units import show_bytes
from backend.weights.linear import (
    BiasedLinear,
    BlockEmbedding,
    Embedding,
    Linear,
    PlainEmbedding,
    PlainLinear,
    SplitLinear,
)
from backend.weights.stored import Blocks
from backend.weights.tiled import TiledEmbedding, TiledLinear

Progress = Callable[[LoadProgress], None]
EMBEDDING, OUTPUT = "tok_embeddings", "output"


class Loaded:
    """A model and the bytes of its weights.

    weight_bytes: all of them, wherever they are. bytes_per_token: what one token reads (all but a table looked up in).
    resident_bytes: what is always on the device. host_bytes: what is in host memory for another device. Streamed parts
    pass through `streamer`, which counts them.
    """

    def __init__(self, model: Llama, places: Places, bytes_per_token: int, output_bytes: int) -> None:
        self.model, self._places = model, places
        self.bytes_per_token, self.output_bytes = bytes_per_token, output_bytes
        self.device, self.weight_bytes = places.device, places.kept_bytes
        self.resident_bytes, self.host_bytes = places.resident_bytes, places.host_bytes

    @property
    def streamer(self) -> Streamer:
        return self._places.streamer

    def close(self) -> None:
        """Let the ring, its threads and its store go. The model does not answer any more where it needs them."""
        self._places.close()


def load_model(
    checkpoint: Checkpoint,
    weights: str,
    label: str,
    progress: Progress = lambda _: None,
    parts: Sequence[Part] = (),
    device: torch.device | str = "cpu",
    link: Link | None = None,
) -> Loaded:
    """Read all tensors, but for parts that are streamed from the file.

    `weights`: how they are kept, a value of the preset's key. `progress` is told about bytes of the file; what it
    raises ends the load. `parts`: where each product lives, from the plan; what no part names is resident. `link`: the
    device, where it is not the CUDA device itself. Raises OutOfMemoryError.
    """
    device = torch.device(device)
    loader = _Loader(checkpoint, weights, label, progress, parts, Places(checkpoint, device, link))
    on_device = False
    try:
        with mapping_temporaries():
            return loader.load()
    except BaseException as error:
        # Whoever keeps the exception would keep, in its frames, all that was loaded so far.
        _clear_frames(error)
        loader.places.close()
        if not is_allocation_failure(error):
            raise
        on_device = isinstance(error, torch.OutOfMemoryError)  # the CPU's is a RuntimeError
    del loader  # the error must not hold it either
    raise _out_of_memory(checkpoint, weights, label, parts, device, device if on_device else torch.device("cpu"))


class _Loader:
    def __init__(
        self,
        checkpoint: Checkpoint,
        weights: str,
        label: str,
        progress: Progress,
        parts: Sequence[Part],
        places: Places,
    ) -> None:
        self._checkpoint, self._weights, self._label, self._progress = checkpoint, weights, label, progress
        self._parts = {name: part for part in parts for name in part.names}
        self.places = places
        self._done, self._total = 0, sum(info.nbytes for info in checkpoint.tensors.values())

    def load(self) -> Loaded:
        config = self._checkpoint.config
        # The call returns when all is asked for, not when it has come; that alone takes a while for a large file.
        threading.Thread(target=read_ahead, args=(self._checkpoint.files,), name="read ahead", daemon=True).start()
        one_table = self._is_one_table()
        embedding = None if one_table else self._embedding()
        looked_up = self.places.kept_bytes  # of these, one token reads a row
        layers = []
        for n in range(config.n_layers):
            at = f"layers.{n}."
            layers.append(
                Layer(
                    attention_norm=self._vector(at + "attention_norm"),
                    wqkv=self._linear(at + "wq", at + "wk", at + "wv"),
                    wo=self._linear(at + "wo"),
                    ffn_norm=self._vector(at + "ffn_norm"),
                    w13=self._linear(at + "w1", at + "w3"),
                    w2=self._linear(at + "w2"),
                )
            )
        norm, before = self._vector("norm"), self.places.kept_bytes
        output = self._output(embedding)
        if isinstance(output, TiledLinear) and one_table:
            embedding = TiledEmbedding(output)
            self._report(EMBEDDING)
        embedding = embedding or self._embedding()
        output_bytes = self.places.kept_bytes - before or looked_up  # one table for both uses, or two
        rope = self._rope()
        self.places.allocate()
        read = self.places.kept_bytes - (looked_up if self.places.kept_bytes > before else 0)
        return Loaded(Llama(config, embedding, tuple(layers), norm, output, rope), self.places, read, output_bytes)

    # parts ------------------------------------------------------------------------------------------------------------

    def _rope(self) -> Rope:
        config = self._checkpoint.config
        factors = None
        if config.rope_scaling is not None:
            divisors = config.rope_scaling.divisors(config.head_dim, config.rope_theta)
            factors = torch.tensor(divisors, dtype=torch.float64)
        if "rope_freqs" in self._checkpoint.tensors:
            vector = self._checkpoint.read("rope_freqs").float32().flatten()
            self.places.resident_bytes += vector.nbytes
            self._report("rope_freqs")
            factors = vector.double() if factors is None else factors * vector
        rope = Rope(config.head_dim, config.rope_theta, interleaved=config.rope_interleaved, factors=factors)
        return rope.to(self.places.device)

    def _vector(self, name: str) -> torch.Tensor:
        """A norm, a bias or a table of factors: small, and always float32, as every LLaMA keeps them in computation."""
        vector = self.places.put_vector(self._checkpoint.read(name).float32().flatten())
        self._report(name)
        return vector

    def _embedding(self) -> Embedding:
        stored, weights = self._checkpoint.read(EMBEDDING), self._form(EMBEDDING)
        table: Embedding
        if weights == "original" and isinstance(stored, Blocks):
            table = BlockEmbedding(stored.raw, stored.format)
            stored.release()
        else:
            table = PlainEmbedding(values([stored], weights))
        table = self.places.put_table(self._part_of(EMBEDDING), table)
        self._report(EMBEDDING)
        return table

    def _is_one_table(self) -> bool:
        """Whether tokens may be looked up where the output is: see `looked_up_in_output`."""
        config, on_cpu = self._checkpoint.config, self.places.device.type == "cpu"
        resident = on_cpu and self._part_of(OUTPUT).place == "resident"
        return resident and looked_up_in_output(self._weights, config, self._checkpoint.tensors)

    def _output(self, embedding: Embedding | None) -> Linear:
        config = self._checkpoint.config
        if not config.tied_output:
            return self._linear(OUTPUT)
        if not shares_table(self._weights, config, self._checkpoint.tensors):
            return self._put(self._part_of(OUTPUT), EMBEDDING)  # the product has its own copy of a packed table
        assert embedding is not None
        product = PlainLinear(*embedding.tensors())  # one table for both uses
        return HostLinear(product) if isinstance(embedding, HostEmbedding) else product

    def _linear(self, *names: str) -> Linear:
        """One weight, or several that read the same input stacked into one product; with their biases.

        Where their places differ there is a product for each part of them, in its own order.
        """
        parts = list(dict.fromkeys(self._part_of(name, names) for name in names))
        found = [name for part in parts for name in part.names]
        if sorted(found) != sorted(names):
            raise ValueError(f"the parts of {names} hold {found}")
        linears = [self._put(part, *part.names) for part in parts]
        linear = linears[0] if len(linears) == 1 else SplitLinear(linears)
        if found != list(names):
            order = _order(found, names, {name: self._checkpoint.tensors[name].shape[0] for name in names})
            linear = OrderedLinear(linear, order.to(self.places.device))
        self._report(*names)
        return self._with_bias(linear, names)

    def _part_of(self, name: str, product: tuple[str, ...] = ()) -> Part:
        """The part that a weight is in; without a plan, its whole product."""
        return self._parts.get(name) or Part(product or (name,), 0)

    def _form(self, name: str) -> str:
        """The value of the preset's key `weights` that goes for a tensor."""
        tables = name in (EMBEDDING, OUTPUT)
        return table_weights(self._weights, self._checkpoint.tensors[name]) if tables else self._weights

    def _put(self, part: Part, *names: str) -> Linear:
        """`names`: the tensors of the part in the file."""
        shapes = [self._checkpoint.tensors[name].shape for name in names]
        make = partial(_built, self._checkpoint, names, self._form(names[0]))
        return self.places.put(part, make, (sum(shape[0] for shape in shapes), shapes[0][1]))

    def _with_bias(self, linear: Linear, names: Sequence[str]) -> Linear:
        tensors = self._checkpoint.tensors
        if not any(f"{name}_bias" in tensors for name in names):
            return linear
        parts = [
            self._checkpoint.read(f"{name}_bias").float32().flatten()
            if f"{name}_bias" in tensors
            else torch.zeros(tensors[name].shape[0])
            for name in names
        ]
        self._report(*(f"{name}_bias" for name in names if f"{name}_bias" in tensors))
        return BiasedLinear(linear, self.places.put_vector(torch.cat(parts)))

    def _report(self, *names: str) -> None:
        self._done += sum(self._checkpoint.tensors[name].nbytes for name in names)
        self._progress(LoadProgress(f"Loading {self._label}", self._done, self._total))


def _built(checkpoint: Checkpoint, names: Sequence[str], weights: str, device: str, *, once: bool = False) -> Linear:
    """`once`: it is used in one step and then let go."""
    stored = [checkpoint.read(name) for name in names]
    return (borrow(stored, weights) if once else None) or build(stored, weights, device)


def _order(found: Sequence[str], wanted: Sequence[str], rows: Mapping[str, int]) -> torch.Tensor:
    """Which rows to take, of the weights stacked as `found`, to have them stacked as `wanted`. int64 (all rows,)."""
    starts = dict(zip(found, itertools.accumulate((rows[name] for name in found), initial=0)))
    return torch.cat([torch.arange(starts[name], starts[name] + rows[name]) for name in wanted])


def _clear_frames(error: BaseException) -> None:
    """Empty the frames of an exception and of those it came from; where it happened stays readable."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        traceback.clear_frames(link.__traceback__)
        link = link.__cause__ or link.__context__


def _out_of_memory(
    checkpoint: Checkpoint, weights: str, label: str, parts: Sequence[Part], device: torch.device, failed: torch.device
) -> OutOfMemoryError:
    """The error for a person. `failed`: whose memory it was, the device's or the CPU's."""
    config, tensors = checkpoint.config, checkpoint.tensors
    if not parts:
        needed = weight_bytes(weights, config, tensors)
    elif failed == device:
        needed = placed_bytes(parts, "resident") + ring_bytes(parts) + vector_bytes(config, tensors)
        needed += placed_bytes(parts, "cpu") if device.type == "cpu" else 0
    else:
        needed = placed_bytes(parts, "streamed") + placed_bytes(parts, "cpu")
    free = free_bytes(str(failed))
    where = "memory" if failed.type == "cpu" else f"memory of {failed}"
    return OutOfMemoryError(
        f"{checkpoint.path}: there is not enough memory to load {label}: its weights need {show_bytes(needed)} of "
        f"{where}, and {show_bytes(free)} are free",
        needed_bytes=needed,
        free_bytes=free,
    )
