"""Which product goes where: by name, or the fastest way inside a budget. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from backend.placement.machine import Gpu, Machine
from backend.placement.parts import EMBEDDING, OUTPUT, RING_BUFFERS, Place, Product
from backend.placement.speed import Placed, Speed, hybrid_seconds, step

ATTENTION, FEED_FORWARD = ("wq", "wk", "wv", "wo"), ("w1", "w2", "w3")
# What stays resident under each name; what does not is streamed.
STAYS: dict[str, tuple[str, ...]] = {
    "offload-all": (*EMBEDDING, *OUTPUT),
    "offload-ff": (*EMBEDDING, *OUTPUT, *ATTENTION),
    "offload-attention": (*EMBEDDING, *OUTPUT, *FEED_FORWARD),
}


def resident(products: Sequence[Product]) -> list[Placed]:
    return [(product, "resident") for product in products]


def keeping(products: Sequence[Product], stays: Collection[str], gpu: bool) -> list[Placed]:
    """The weights of these kinds resident, the others streamed.

    A table that is only looked up in is never brought whole: a token needs one row of it. One that is the output too
    stays if either name does.
    """
    placed: list[Placed] = []
    for product in products:
        for part in product.split(stays):
            kind = part.weights[0].kind
            stay = kind in stays or (kind in EMBEDDING and part.read and OUTPUT[0] in stays)
            placed.append((part, "resident" if stay else "streamed" if part.read else _of_table(gpu)))
    return placed


def _of_table(gpu: bool) -> Place:
    """Where a table that is looked up in is cheapest: in host memory, or on a CPU in its file."""
    return "cpu" if gpu else "streamed"


def fastest(
    products: Sequence[Product], budget: int, layers: int, machine: Machine, gpu: Gpu | None
) -> list[Placed] | None:
    """The fastest way to place products so that residents and ring take at most `budget` bytes of the device.

    None where none fits. Where nothing was measured: the one that keeps most resident.
    """
    if sum(product.bytes for product in products) <= budget:
        return resident(products)
    found = [*_ways(products, budget, machine, gpu)]
    if not found:
        return None

    def cost(placed: list[Placed]) -> tuple[float, int]:
        speed: Speed | None = step(placed, layers, machine, gpu)
        moved = sum(product.bytes for product, place in placed if place != "resident")
        return (speed.seconds if speed else 0.0, moved)

    return min(found, key=cost)


def _ways(products: Sequence[Product], budget: int, machine: Machine, gpu: Gpu | None) -> Iterator[list[Placed]]:
    """Every way worth trying: for each size of ring buffer, what to stream and what to compute on the CPU."""
    fixed: list[Placed] = [(product, _of_table(gpu is not None)) for product in products if not product.read]
    kept = [product for product in products if product.read]
    # The output is dearest anywhere else: nothing can be brought while it is all that is left to do.
    head = [product for product in kept if product.weights[0].name in (*EMBEDDING, *OUTPUT)]
    kept = [product for product in kept if product not in head]
    fixed += [(product, "resident") for product in head]
    left = budget - sum(product.bytes for product, place in fixed if place == "resident")
    if gpu is not None and left >= 0:
        yield _in_order(products, fixed + _spread(kept, left, {"cpu": 1.0}, 0))
    for size in sorted({product.bytes for product in kept}):
        room = left - RING_BUFFERS * size
        rest = sum(product.bytes for product in kept) - room
        if room < sum(product.bytes for product in kept if product.bytes > size) or rest <= 0:
            continue
        yield _in_order(products, fixed + _spread(kept, room, {"streamed": 1.0}, size))
        if gpu is not None and gpu.link and machine.rates.bandwidth:
            seconds = hybrid_seconds(room, rest, machine, gpu, kept[0].weights[0].form)
            share = min(1.0, gpu.link * seconds / rest)
            yield _in_order(products, fixed + _spread(kept, room, {"streamed": share, "cpu": 1 - share}, size))


def _spread(products: Sequence[Product], room: int, rest: dict[Place, float], largest: int) -> list[Placed]:
    """Residents up to `room` bytes and the others by their shares, each evenly over the step.

    Evenly, because a small ring keeps the link busy only when streamed parts and others take turns. `largest`: what a
    buffer of the ring holds; a product that is larger is not streamed.
    """
    total = sum(product.bytes for product in products)
    shares: dict[Place, float] = {"resident": room / total}
    shares |= {place: share * (total - room) / total for place, share in rest.items()}
    must = sum(product.bytes for product in products if _bound(product, rest, largest))
    done = dict.fromkeys(shares, 0)
    so_far, places = 0, list[Place]()
    for product in products:
        so_far += product.bytes
        must -= product.bytes if _bound(product, rest, largest) else 0
        choices = [place for place in shares if place != "streamed" or product.bytes <= largest]
        if len(choices) > 1 and done["resident"] + product.bytes + must > room:
            choices.remove("resident")
        place = max(choices, key=lambda place: shares[place] * so_far - done[place])
        done[place] += product.bytes
        places.append(place)
    # What is left of the room, to the byte.
    for index in sorted(range(len(products)), key=lambda index: -products[index].bytes):
        if places[index] != "resident" and done["resident"] + products[index].bytes <= room:
            done["resident"] += products[index].bytes
            places[index] = "resident"
    return list(zip(products, places))


def _bound(product: Product, rest: dict[Place, float], largest: int) -> bool:
    """Whether a product can only be resident."""
    return "cpu" not in rest and product.bytes > largest


def _in_order(products: Sequence[Product], placed: Sequence[Placed]) -> list[Placed]:
    where = dict(placed)
    return [(product, where[product]) for product in products]
