"""How long one token takes with parts where they are, and which limit binds. Pure arithmetic on measured rates.

The model, for a step of one token with a short context (B are measured bytes per second):

    resident bytes R are read at B_gpu; streamed bytes X come over the link at B_link, and are then read at B_gpu;
    bytes C are multiplied on the CPU at B_cpu, or at what the link leaves of the memory's bandwidth B_ram:
    T = max( (X + C) / B_ram,  X / B_link,  (R + X) / B_gpu + C / min(B_cpu, B_ram - B_link) )

With X chosen so that the link works during the whole step, and N = X + C, B = min(B_cpu, B_ram - B_link):

    T* = max( N / B_ram,  (R / B_gpu + N / B) / (1 + B_link / B - B_link / B_gpu) )

On a CPU alone, streamed parts are read from the disk and converted by another thread, so T is the larger of the two.
There a step whose products are resident and in tiles is one compiled call (engine/compiled.py): all threads, and
little beside the products. Any other goes from one operation of torch to the next, with as many threads as its bytes
are worth (engine/threads.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from backend.placement.machine import Gpu, Machine
from backend.placement.parts import EMBEDDING, OUTPUT, Place, Product, Weight

Placed = tuple[Product, Place]
BYTES_PER_THREAD = 128 << 20  # as in engine/threads.py: what a token must read for one thread more
SATURATED = 0.7  # of the bandwidth: a product that is faster than this is bound by memory, else by the processor


@dataclass(frozen=True)
class Speed:
    """Seconds of one step, and the limit that binds."""

    seconds: float
    bound_by: str  # vram bandwidth | link | ram bandwidth | cpu | disk

    @property
    def tokens_per_second(self) -> float:
        return 1 / self.seconds


def step(placed: Sequence[Placed], layers: int, machine: Machine, gpu: Gpu | None) -> Speed | None:
    """One token with every product in its place. None where a rate that matters was not measured."""
    try:
        return _on_cpu(placed, layers, machine) if gpu is None else _on_gpu(placed, layers, machine, gpu)
    except ZeroDivisionError:
        return None


def hybrid_seconds(resident: float, rest: float, machine: Machine, gpu: Gpu, form: str) -> float:
    """T* of the module's text: the link busy during the whole step, the CPU with what it leaves."""
    on_gpu, ram = gpu.rates.product(form), machine.rates.bandwidth
    on_cpu = min(machine.rates.product(form), ram - gpu.link)
    if on_cpu <= 0:  # the link alone takes all that memory gives
        return max(rest / min(gpu.link, ram), (resident + rest) / on_gpu)
    return max(rest / ram, (resident / on_gpu + rest / on_cpu) / (1 + gpu.link / on_cpu - gpu.link / on_gpu))


def is_one_call(placed: Iterable[Placed]) -> bool:
    """Whether a compiled step takes these products: all that a token reads are resident on the CPU and in tiles.

    The output may be plain 16-bit values.
    """

    def taken(weight: Weight) -> bool:
        return weight.tiled or (weight.name in (*EMBEDDING, *OUTPUT) and weight.form in ("bf16", "f16"))

    return all(
        place != "streamed" and all(taken(weight) for weight in product.weights)
        for product, place in placed
        if product.read
    )


def _on_cpu(placed: Sequence[Placed], layers: int, machine: Machine) -> Speed:
    rates = machine.rates
    compiled = machine.step_seconds > 0 and is_one_call(placed)
    threads = max(1, min(machine.cores, -(-_bytes(placed) // BYTES_PER_THREAD)))
    share = 1.0 if compiled else min(1.0, machine.one_core * threads)
    around = layers * (machine.step_seconds if compiled else rates.layer_seconds)
    products = fast = 0.0
    for product, _ in placed:
        if product.read:
            for weight in product.weights:
                shared = 1.0 if weight.name in OUTPUT else share
                rate = rates.product(weight.form) * shared
                products += weight.bytes / rate + weight.rows * rates.row_seconds.get(weight.form, 0.0) / shared
                fast += weight.bytes / rate if rate >= SATURATED * rates.bandwidth else 0.0
    streamed = _read(placed, ("streamed",))
    reading = sum(weight.file_bytes for weight in streamed) / machine.disk if streamed else 0.0
    converting = sum(weight.bytes / machine.conversion.get(weight.form, 0.0) for weight in streamed)
    if reading + converting > around + products:
        return Speed(reading + converting, "disk" if reading >= converting else "cpu")
    return Speed(around + products, "ram bandwidth" if fast > (around + products) / 2 else "cpu")


def _on_gpu(placed: Sequence[Placed], layers: int, machine: Machine, gpu: Gpu) -> Speed:
    ram = machine.rates.bandwidth
    streamed, on_cpu = _bytes(placed, "streamed"), _bytes(placed, "cpu")
    # A link as fast as the memory still leaves the processor something: they share.
    left = max(ram - gpu.link, ram / 4) if streamed else ram
    reading = sum(weight.bytes / gpu.rates.product(weight.form) for weight in _read(placed, ("resident", "streamed")))
    computing = sum(weight.bytes / min(machine.rates.product(weight.form), left) for weight in _read(placed, ("cpu",)))
    around = layers * gpu.rates.layer_seconds
    starved = on_cpu > 0 and on_cpu / computing >= SATURATED * left
    inner = {"vram bandwidth": reading, "cpu": around, ("ram bandwidth" if starved else "cpu "): computing}
    legs = [
        ((streamed + on_cpu) / ram if streamed + on_cpu else 0.0, "ram bandwidth"),
        (streamed / gpu.link if streamed else 0.0, "link"),
        (sum(inner.values()), max(inner, key=lambda name: inner[name]).strip()),
    ]
    return Speed(*max(legs))


def _read(placed: Iterable[Placed], places: Sequence[Place]) -> list[Weight]:
    return [weight for product, place in placed if product.read and place in places for weight in product.weights]


def _bytes(placed: Iterable[Placed], place: Place | None = None) -> int:
    """Bytes that a token reads, in all places or one."""
    return sum(product.bytes for product, where in placed if product.read and place in (None, where))
