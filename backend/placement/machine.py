"""What the planner knows of a machine: its devices, its memory, and how fast each moves bytes. Plain data.

The speeds are measured once by `measure.py` and kept in the user's cache folder; what is free is asked each time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

MIB = 1 << 20
# Left alone when a budget is `auto`: the desktop, other programs, and what allocators round up.
RAM_MARGIN, VRAM_MARGIN = 256 * MIB, 512 * MIB


@dataclass(frozen=True)
class Rates:
    """How fast one device computes. Speeds in bytes per second; 0 or absent: not measured, nothing is predicted.

    `products`: bytes of weights that one token's products go through in a second, by form: the preset's key `weights`
    (bf16, f16, f32, int8, ...) or, with `original`, the name of the storage format (Q4_0, ...).
    """

    bandwidth: float = 0.0  # reading its memory
    products: Mapping[str, float] = field(default_factory=dict)
    layer_seconds: float = 0.0  # of one layer beside its products, each operation a call: norms, rope, attention
    row_seconds: Mapping[str, float] = field(default_factory=dict)  # what a row costs beside its bytes, by form

    def product(self, form: str) -> float:
        """Speed of a form, or of the slowest known where it was not measured itself."""
        return self.products.get(form) or min(self.products.values(), default=self.bandwidth)


@dataclass(frozen=True)
class Gpu:
    """One device beside the CPU."""

    name: str  # cuda:0, mps
    title: str = ""
    total: int = 0  # bytes of its memory; 0: there is no such device here
    free: int = 0  # of them now
    link: float = 0.0  # copying from pinned host memory, bytes per second
    rates: Rates = Rates()
    context_bytes: int = 450 * MIB  # of its memory: what CUDA itself takes for a process
    host_bytes: int = 0  # of host memory: the same


@dataclass(frozen=True)
class Machine:
    """A computer. `gpus` in the order in which `device: auto` takes them."""

    ram_total: int = 0
    ram_free: int = 0
    process_bytes: int = 0  # resident memory of this process without a model
    cores: int = 1
    rates: Rates = Rates()
    one_core: float = 1.0  # share of `rates.products` that a single core reaches, of products of plain values
    conversion: Mapping[str, float] = field(default_factory=dict)  # weight bytes per second made from a file, by form
    disk: float = 0.0  # bytes per second of a file that is not in memory
    gpus: tuple[Gpu, ...] = ()
    # Of one layer beside its products where the whole step is one compiled call, with all threads; 0: there is none.
    step_seconds: float = 0.0

    def gpu(self, name: str) -> Gpu | None:
        return next((gpu for gpu in self.gpus if gpu.name == name or gpu.name.partition(":")[0] == name), None)
