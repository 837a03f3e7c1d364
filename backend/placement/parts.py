"""The parts of a model, and where each lives: what the planner says and the loader carries out. Plain data."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

# On a GPU: resident in its memory | in (pinned) host memory, copied through a ring of buffers ahead of its use |
# computed on the CPU. On a CPU: resident in memory | read from the file into a ring ahead of its use.
Place = Literal["resident", "streamed", "cpu"]
# Buffers of the ring, each as large as the largest streamed part: one in use, one ready, one being filled.
RING_BUFFERS = 3
# Weights of one layer that read the same input, and so are one product.
PRODUCTS = (("wq", "wk", "wv"), ("wo",), ("w1", "w3"), ("w2",))
EMBEDDING, OUTPUT = ("tok_embeddings",), ("output",)


@dataclass(frozen=True)
class Part:
    """One product the model multiplies with, known by the canonical names of its weights, stacked in this order.

    A tied model has both `tok_embeddings` and `output` where its table is packed (the product has its own copy of it,
    where tokens are looked up too if it is in resident tiles on the CPU: then `tok_embeddings` takes nothing);
    where the table is plain, `tok_embeddings` is both and there is no part `output`. Norms and biases are in no part:
    they are always resident.
    """

    names: tuple[str, ...]
    bytes: int
    place: Place = "resident"


@dataclass(frozen=True)
class Weight:
    """One weight before it has a place: what it takes, and what its speed depends on."""

    name: str
    bytes: int  # in memory
    form: str  # what it is multiplied as: the key `weights`, or the storage format where that is kept
    file_bytes: int = 0
    tiled: bool = False  # multiplied in tiles, as a step in one compiled call takes them
    cpu_bytes: int | None = None  # in memory where the CPU computes it beside a GPU; None: the same
    rows: int = 0  # how many it has: torch takes a little for each

    @property
    def kind(self) -> str:
        """Its name without its layer."""
        return self.name.rpartition(".")[2]


@dataclass(frozen=True)
class Product:
    """Weights that read the same input: a part, unless they are to have different places."""

    weights: tuple[Weight, ...]
    read: bool = True  # by every token; only a table that is looked up in is not

    @property
    def bytes(self) -> int:
        return sum(weight.bytes for weight in self.weights)

    def part(self, place: Place) -> Part:
        taken = self.bytes
        if place == "cpu":
            taken = sum(weight.bytes if weight.cpu_bytes is None else weight.cpu_bytes for weight in self.weights)
        return Part(tuple(weight.name for weight in self.weights), taken, place)

    def split(self, stays: Collection[str]) -> tuple[Product, ...]:
        """Runs of weights whose kinds are all in `stays` or all not, each a product of its own, in their order."""
        runs = groupby(self.weights, key=lambda weight: weight.kind in stays)
        return tuple(Product(tuple(run), self.read) for _, run in runs)


def with_one_table(parts: Sequence[Part]) -> tuple[Part, ...]:
    """The same where tokens are looked up in the output's table, if that is resident: they need none of their own."""
    whole = any(part.names == OUTPUT and part.place == "resident" for part in parts)
    return tuple(Part(part.names, 0) if whole and part.names == EMBEDDING else part for part in parts)


def ring_bytes(parts: Sequence[Part]) -> int:
    """Bytes of the buffers that streamed parts go through. No more buffers than streamed parts."""
    # A table that is only looked up in is read row by row, never brought whole.
    looked_up = EMBEDDING if any(part.names == OUTPUT for part in parts) else None
    sizes = [part.bytes for part in parts if part.place == "streamed" and part.names != looked_up]
    return min(len(sizes), RING_BUFFERS) * max(sizes, default=0)


def placed_bytes(parts: Sequence[Part], place: Place) -> int:
    return sum(part.bytes for part in parts if part.place == place)
