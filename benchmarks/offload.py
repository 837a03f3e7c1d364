"""What a CPU writes when weights do not stay in memory: each way to offload, beside a plain loop over the same bytes.

The file has a few layers of LLaMA 7B's shape. The plain loop reads a part, converts it, multiplies and lets it go, one
after another; what is resident it only multiplies. It leaves out all that is not a product. Ours is a whole step of the
model with a token's attention. Both in turn, so that a noisy machine is noisy for both.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from backend.checkpoint.base import Checkpoint
from backend.checkpoint.open import open_checkpoint
from backend.placement.linears import build
from backend.placement.load import Loaded, load_model
from backend.placement.parts import Part
from backend.placement.sizes import products
from benchmarks.loading import write_model

NAME = "offload"
ATTENTION, FEED_FORWARD, TABLES = ("wq", "wk", "wv", "wo"), ("w1", "w2", "w3"), ("tok_embeddings", "output")
STAYS = {
    "resident": (*TABLES, *ATTENTION, *FEED_FORWARD),
    "offload-ff": (*TABLES, *ATTENTION),
    "offload-attention": (*TABLES, *FEED_FORWARD),
    "offload-all": TABLES,
}
TYPES = {"Q4_0": 5, "F16": 3}  # of the file, which is also how weights are kept -> rounds


def run() -> dict[str, Any]:
    results: dict[str, Any] = {"threads": torch.get_num_threads(), "types": {}}
    titles = ("weights MB", "peak MB", "tokens/s", "plain loop", "ratio", "waited")
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
                    f"{row['waited']:10.0%}",
                    flush=True,
                )
    return results


def _measured(checkpoint: Checkpoint, mode: str, rounds: int) -> dict[str, float]:
    """Medians over rounds of tokens per second, of ours and of the plain loop, and of the ratio within a round."""
    parts = _parts(checkpoint, mode)
    loaded = load_model(checkpoint, "original", "benchmark", parts=parts)
    plain = _plain_loop(checkpoint, parts)
    ours: list[float] = []
    theirs: list[float] = []
    waited: list[float] = []
    with torch.inference_mode():
        for number in range(rounds + 1):  # the first round warms up
            before = loaded.streamer.traffic.wait_seconds
            seconds = _seconds(lambda: _step(loaded))
            beside = _seconds(plain)
            if number:
                ours.append(seconds)
                theirs.append(beside)
                waited.append((loaded.streamer.traffic.wait_seconds - before) / seconds)
    loaded.close()
    return {
        "weight_bytes": loaded.weight_bytes,
        "peak_weight_bytes": loaded.resident_bytes + loaded.streamer.traffic.peak_bytes,
        "tokens_per_second": 1 / statistics.median(ours),
        "plain_tokens_per_second": 1 / statistics.median(theirs),
        "ratio": statistics.median(beside / seconds for seconds, beside in zip(ours, theirs, strict=True)),
        "waited": statistics.median(waited),
    }


def _parts(checkpoint: Checkpoint, mode: str) -> list[Part]:
    stays = STAYS[mode]
    return [
        product.part("resident" if product.weights[0].kind in stays else "streamed")
        for product in products("original", checkpoint.config, checkpoint.tensors)
    ]


def _step(loaded: Loaded) -> None:
    """One token through the model; a token alone attends to itself."""
    one, heads = torch.zeros(1, dtype=torch.int64), loaded.model.config.n_heads

    def attend(layer: int, projected: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        return projected[:, -heads:]  # its own values: (tokens, heads, head_dim)

    loaded.model.forward(one, one, attend, one)


def _plain_loop(checkpoint: Checkpoint, parts: list[Part]) -> Callable[[], None]:
    inputs = {columns: torch.randn(1, columns) for columns in {info.shape[-1] for info in checkpoint.tensors.values()}}
    products = [part for part in parts if "tok_embeddings" not in part.names]
    kept = {part.names: _read(checkpoint, part) for part in products if part.place == "resident"}

    def loop() -> None:
        for part in products:
            linear = kept.get(part.names) or _read(checkpoint, part)
            linear(inputs[linear.in_features])

    return loop


def _read(checkpoint: Checkpoint, part: Part) -> Any:
    return build([checkpoint.read(name) for name in part.names], "original")


def _seconds(work: Callable[[], None]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun
