"""What a CPU writes when weights do not stay in memory: each way to offload, beside a plain loop over the same bytes.

The file has a few layers of LLaMA 7B's shape. The plain loop is of torch's operations: it reads a part, decodes what is
packed, multiplies and lets it go, one after another; what is resident it keeps in torch's own product of as many bytes.
It leaves out all that is not a product. Ours is a whole step of the engine, with a token's attention. "products" is the
ratio to a loop of our own products alone, which are read and converted one after another. All in turn, so that a noisy
machine is noisy for all.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from backend.cache.kv import KVPool
from backend.checkpoint.base import Checkpoint
from backend.checkpoint.open import open_checkpoint
from backend.engine.runner import Runner
from backend.engine.threads import Threads
from backend.placement.linears import build
from backend.placement.load import Loaded, load_model
from backend.placement.parts import Part
from backend.placement.sizes import products
from backend.runtime import BLOCK_TOKENS, compute_threads
from backend.weights.stored import Blocks, Plain, Stored
from benchmarks.loading import write_model
from benchmarks.modes import plain_bf16, plain_int4

NAME = "offload"
ATTENTION, FEED_FORWARD, TABLES = ("wq", "wk", "wv", "wo"), ("w1", "w2", "w3"), ("tok_embeddings", "output")
STAYS = {
    "resident": (*TABLES, *ATTENTION, *FEED_FORWARD),
    "offload-ff": (*TABLES, *ATTENTION),
    "offload-attention": (*TABLES, *FEED_FORWARD),
    "offload-all": TABLES,
}
TYPES = {"Q4_0": 3, "F16": 5}  # of the file, which is also how weights are kept -> rounds

Multiply = Callable[[torch.Tensor], torch.Tensor]  # float32 (1, in) -> (1, out)
Read = Callable[[list[Stored]], Multiply]  # weights one above the other


def run() -> dict[str, Any]:
    results: dict[str, Any] = {"threads": torch.get_num_threads(), "rounds": TYPES, "types": {}}
    titles = ("weights MB", "peak MB", "tokens/s", "plain loop", "ratio", "products", "waited")
    print(f"{'':24}" + " ".join(f"{title:>10}" for title in titles))
    for kind, rounds in TYPES.items():
        results["types"][kind] = {}
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = open_checkpoint(write_model(Path(folder) / "model.gguf", kind))
            for mode in STAYS:
                row = _measured(checkpoint, mode, rounds)
                results["types"][kind][mode] = row
                print(
                    f"{kind:5} {mode:18}{row['weight_bytes'] / 1e6:10.0f} {row['peak_weight_bytes'] / 1e6:10.0f} "
                    f"{row['tokens_per_second']:10.2f} {row['plain_tokens_per_second']:10.2f} {row['ratio']:10.2f} "
                    f"{row['ratio_to_products']:10.2f} "
                    f"{row['waited']:10.0%}",
                    flush=True,
                )
    return results


def _measured(checkpoint: Checkpoint, mode: str, rounds: int) -> dict[str, float]:
    """Medians over rounds of tokens per second, of ours and of the plain loop, and of the ratios within a round."""
    parts = _parts(checkpoint, mode)
    loaded = load_model(checkpoint, "original", "benchmark", parts=parts)
    runner = _runner(loaded)
    loops = _loop(checkpoint, parts, _torch_kept, _torch_read), _loop(checkpoint, parts, _own, _own)
    ours: list[float] = []
    beside: list[list[float]] = []
    waited: list[float] = []
    with torch.inference_mode():
        for number in range(rounds + 1):  # the first round warms up
            before = loaded.streamer.traffic.wait_seconds
            seconds = _seconds(lambda: runner.score([0], 0, [0], [0]))
            others = [_seconds(loop) for loop in loops]
            if number:
                ours.append(seconds)
                beside.append(others)
                waited.append((loaded.streamer.traffic.wait_seconds - before) / seconds)
    loaded.close()
    plain, products = zip(*beside, strict=True)
    return {
        "weight_bytes": loaded.weight_bytes,
        "peak_weight_bytes": loaded.resident_bytes + loaded.streamer.traffic.peak_bytes,
        "tokens_per_second": 1 / statistics.median(ours),
        "plain_tokens_per_second": 1 / statistics.median(plain),
        "ratio": statistics.median(other / seconds for seconds, other in zip(ours, plain, strict=True)),
        "ratio_to_products": statistics.median(other / seconds for seconds, other in zip(ours, products, strict=True)),
        "waited": statistics.median(waited),
    }


def _parts(checkpoint: Checkpoint, mode: str) -> list[Part]:
    stays = STAYS[mode]
    return [
        product.part("resident" if product.weights[0].kind in stays else "streamed")
        for product in products("original", checkpoint.config, checkpoint.tensors)
    ]


def _runner(loaded: Loaded) -> Runner:
    threads = Threads(compute_threads(), loaded.bytes_per_token)
    pool = KVPool(loaded.model.config, 1, BLOCK_TOKENS, torch.bfloat16)
    return Runner(threads.fitted(loaded.model, loaded.output_bytes), pool, threads)


def _loop(checkpoint: Checkpoint, parts: list[Part], keep: Read, read: Read) -> Callable[[], None]:
    """One product after the other. `keep`: what is resident, once. `read`: what is streamed, each time."""
    inputs = {columns: torch.randn(1, columns) for columns in {info.shape[-1] for info in checkpoint.tensors.values()}}
    products = [part for part in parts if "tok_embeddings" not in part.names]
    kept = {part.names: keep(_stored(checkpoint, part)) for part in products if part.place == "resident"}

    def loop() -> None:
        for part in products:
            stored = _stored(checkpoint, part)
            multiply = kept.get(part.names) or read(stored)
            multiply(inputs[stored[0].shape[1]])

    return loop


def _stored(checkpoint: Checkpoint, part: Part) -> list[Stored]:
    return [checkpoint.read(name) for name in part.names]


def _own(stored: list[Stored]) -> Multiply:
    return build(stored, "original")


def _torch_kept(stored: list[Stored]) -> Multiply:
    """Torch's product that reads as many bytes as the file has: bfloat16, or 4 bits by groups."""
    weight = torch.cat([part.float32() for part in stored])
    multiply = (plain_int4 if isinstance(stored[0], Blocks) else plain_bf16)(weight)
    return lambda x: multiply(x.bfloat16())


def _torch_read(stored: list[Stored]) -> Multiply:
    """The bytes into memory, packed ones decoded by torch's operations, for F.linear."""
    if all(isinstance(part, Plain) for part in stored):
        numbers = torch.cat([part.values for part in stored if isinstance(part, Plain)])
        return lambda x: F.linear(x.to(numbers.dtype), numbers)
    decoded = torch.cat([part.float32().bfloat16() for part in stored])
    return lambda x: F.linear(x.bfloat16(), decoded)


def _seconds(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun
