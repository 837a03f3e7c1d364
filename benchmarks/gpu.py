"""Everything that can only be measured on a CUDA device, by one command: python -m benchmarks gpu

1. The kernels and the engine's paths agree with torch (tests/test_gpu.py).
2. What the machine gives: reading its memory, copying from pinned host memory.
3. GB/s of each product at the four shapes of a 7B layer, for 1, 4 and 16 tokens, beside torch's own bf16 product.
4. Decode of a whole random model in each form: steps per second, with and without a CUDA graph, and what a step takes
   beside its graph (host work, the way of the table in and of the logits out).
5. The table of ways to run a model, offload among them (python -m backend bench --table), with the share of the link's
   rate that streamed parts reach.

Prints one JSON document. Without a CUDA device it says so, and is no failure.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from backend.cache.kv import KVPool
from backend.engine.decode import Decoder
from backend.engine.gpu import on_device
from backend.engine.graphs import CudaRecorder
from backend.engine.scheduler import Work
from backend.kernels.cuda.available import kernels
from backend.model.config import ModelConfig
from backend.model.llama import Layer, Llama
from backend.model.rope import Rope
from backend.model.shapes import parse_shape
from backend.weights.int4_grouped import GroupedInt4Linear, GroupedPlane
from backend.weights.int8 import Int8Linear
from backend.weights.linear import Linear, PlainEmbedding, PlainLinear
from backend.weights.llm_int8 import LlmInt8Linear
from backend.weights.nf4 import BLOCK, CodebookLinear

NAME = "gpu"
SHAPE = "shape:llama-2-7b"
FORMS = ("bf16", "int8", "llm-int8", "int4", "nf4")
SHAPES = {"wqkv": (12288, 4096), "wo": (4096, 4096), "w13": (22016, 4096), "w2": (4096, 11008)}
TOKENS = (1, 4, 16)
PAGE, CONTEXT = 32, 512
COLD_BYTES = 1 << 29  # a round reads this much, many times what the largest second-level cache holds


def run() -> dict[str, Any] | None:
    """None where there is no CUDA device."""
    if not torch.cuda.is_available():
        print("no CUDA device: not run")
        return None
    device = torch.device("cuda", 0)
    link = link_rate(device)
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "tests": _tests(),
        "kernels": kernels() is not None,
        "read_gb_s": read_rate(device),
        "link_gb_s": link,
        "products_gb_s": products(device),
        "decode": {form: decode(form, parse_shape(SHAPE).config, device) for form in FORMS},
        "graph": {n: decode("bf16", parse_shape(SHAPE).config, device, n) for n in (4, 16)},
    }
    torch.cuda.empty_cache()
    results["table"] = _table(link["to_device"])
    print(json.dumps(results, indent=2))
    return results


# the machine ----------------------------------------------------------------------------------------------------------


def seconds_of(work: Callable[[], Any], rounds: int = 20) -> float:
    """Median time of some work on the device, launched by itself."""
    work()
    times = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


def read_rate(device: torch.device) -> float:
    data = torch.ones(1 << 27, dtype=torch.int64, device=device)
    return data.nbytes / seconds_of(data.sum) / 1e9


def link_rate(device: torch.device) -> dict[str, float]:
    host = torch.ones(1 << 28, dtype=torch.uint8).pin_memory()
    there = torch.empty_like(host, device=device)
    return {
        "to_device": host.nbytes / seconds_of(lambda: there.copy_(host, non_blocking=True)) / 1e9,
        "to_host": host.nbytes / seconds_of(lambda: host.copy_(there, non_blocking=True)) / 1e9,
    }


# products -------------------------------------------------------------------------------------------------------------


def random_linear(form: str, rows: int, columns: int, device: torch.device | str) -> Linear:
    """A random weight of a size that keeps activations ordinary."""
    scale = columns**-0.5
    if form == "bf16":
        return PlainLinear((torch.randn(rows, columns, device=device, dtype=torch.bfloat16)).mul_(scale))
    if form in ("int8", "llm-int8"):
        codes = torch.randint(-127, 128, (rows, columns), dtype=torch.int8, device=device)
        kind = Int8Linear if form == "int8" else LlmInt8Linear
        return kind(codes, torch.full((rows,), scale / 73, device=device))
    codes = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, device=device)
    if form == "nf4":
        return CodebookLinear(codes, torch.full((rows, columns // BLOCK), 2 * scale, device=device))
    factor = torch.full((rows, columns // 32), scale / 4.6, dtype=torch.float16, device=device)
    return GroupedInt4Linear([GroupedPlane(codes, factor, factor / 2)])


def products(device: torch.device) -> dict[str, Any]:
    """{form: {shape: {tokens: GB/s of its own bytes}}}, and the same for torch's bf16 product under "torch bf16"."""
    found: dict[str, Any] = {}
    for form in (*FORMS, "torch bf16"):
        found[form] = {}
        for name, (rows, columns) in SHAPES.items():
            first = random_linear(form.removeprefix("torch "), rows, columns, device)
            count = max(2, COLD_BYTES // first.nbytes())
            copies = [first.with_tensors([tensor.clone() for tensor in first.tensors()]) for _ in range(count)]
            found[form][name] = {
                tokens: round(_product_rate(copies, tokens, device, torch_only=form.startswith("torch")), 1)
                for tokens in TOKENS
            }
        print(form, found[form], flush=True)
    return found


def _product_rate(linears: list[Linear], tokens: int, device: torch.device, *, torch_only: bool) -> float:
    x = torch.randn(tokens, linears[0].in_features, device=device)
    x16 = x.bfloat16()

    def each() -> torch.Tensor:
        for linear in linears:
            y = F.linear(x16, linear.tensors()[0]) if torch_only else linear(x)
        return y

    each()
    replay, _ = CudaRecorder().record(each)  # without a graph, small products would measure the launching
    return sum(linear.nbytes() for linear in linears) / seconds_of(replay) / 1e9


# whole models ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Lease:
    blocks: list[int]


@dataclasses.dataclass
class _Sequence:
    """What the decoder looks at in a request."""

    ids: list[int]
    lease: _Lease
    computed: int = 0


def random_model(form: str, config: ModelConfig, device: torch.device | str) -> Llama:
    """Random weights made on the device; the head in bf16 as `weights` keeps it."""
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim

    def layer() -> Layer:
        shapes = (
            (q + 2 * kv, config.dim),
            (config.dim, q),
            (2 * config.ffn_dim, config.dim),
            (config.dim, config.ffn_dim),
        )
        wqkv, wo, w13, w2 = (random_linear(form, *shape, device) for shape in shapes)
        return Layer(norm, wqkv, wo, norm, w13, w2)

    norm = torch.ones(config.dim, device=device)
    table = torch.randn(config.vocab_size, config.dim, device=device, dtype=torch.bfloat16)
    head = random_linear("bf16", config.vocab_size, config.dim, device)
    rope = Rope(config.head_dim, config.rope_theta, interleaved=config.rope_interleaved).to(device)
    layers = tuple(layer() for _ in range(config.n_layers))
    return Llama(config, PlainEmbedding(table), layers, norm, head, rope)


def decode(form: str, config: ModelConfig, device: torch.device, sequences: int = 1, steps: int = 64) -> dict[str, Any]:
    """Steps of one token for each of some sequences at a context of about 500 tokens."""
    loaded = kernels()
    if loaded is None:
        return {"error": "no kernels"}
    model = on_device(random_model(form, config, device), device)
    blocks = CONTEXT // PAGE
    pool = KVPool(config, sequences * blocks, PAGE, torch.bfloat16, device)
    pool.keys.normal_()
    pool.values.normal_()
    read = sum(
        product.nbytes()  # type: ignore[attr-defined]
        for product in (
            model.output,
            *(p for layer in model.layers for p in (layer.wqkv, layer.wo, layer.w13, layer.w2)),
        )
    )
    found: dict[str, Any] = {"sequences": sequences, "weight_bytes_per_step": read}
    for name, recorder in (("launched", None), ("graph", CudaRecorder())):
        decoder = Decoder(model, pool, loaded.paged, recorder)
        begin = time.perf_counter()
        seconds = _steps(decoder, sequences, steps, blocks)
        found[name] = {
            "steps_per_second": 1 / seconds,
            "tokens_per_second": sequences / seconds,
            "weights_gb_s": read / seconds / 1e9,
            "seconds_to_warm_up_and_capture": time.perf_counter() - begin - seconds * steps,
        }
        if recorder is not None and decoder.graphs.captured:
            replay = decoder.graphs.replays()[0]
            alone = seconds_of(replay)
            found[name] |= {"graph_alone_ms": alone * 1e3, "beside_the_graph_ms": (seconds - alone) * 1e3}
    print(form, found, flush=True)
    del model, pool, decoder
    torch.cuda.empty_cache()
    return found


def _steps(decoder: Decoder, sequences: int, steps: int, blocks: int) -> float:
    """Median seconds of a step, the logits on the host included."""
    requests = [
        _Sequence([1] * (CONTEXT - steps - 8), _Lease(list(range(n * blocks, (n + 1) * blocks))))
        for n in range(sequences)
    ]
    times = []
    with torch.inference_mode():
        for step in range(steps + 4):
            for request in requests:
                request.computed = len(request.ids) - 1
            begin = time.perf_counter()
            best = decoder.run([Work(request, 1) for request in requests]).cpu().argmax(-1)  # type: ignore[arg-type]
            if step >= 4:
                times.append(time.perf_counter() - begin)
            for request, token in zip(requests, best.tolist()):
                request.ids.append(token)
    return statistics.median(times)


# other programs -------------------------------------------------------------------------------------------------------


def _tests() -> str:
    command = [sys.executable, "-m", "pytest", "tests/test_gpu.py", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return "passed"


def _table(link_gb_s: float) -> dict[str, Any]:
    command = [sys.executable, "-m", "backend", "bench", "--shape", SHAPE.removeprefix("shape:"), "--table", "--json"]
    done = subprocess.run([*command, "--runs", "3"], capture_output=True, text=True)
    if done.returncode:
        return {"error": done.stderr[-2000:]}
    found: dict[str, Any] = json.loads(done.stdout)
    for row in found["results"]:
        if row.get("streamed_bytes"):
            rate = row["streamed_bytes"] * row["decode_tokens_per_second"] / 1e9
            row |= {"streamed_gb_s": rate, "share_of_link": rate / link_gb_s}
    return found


if __name__ == "__main__":
    run()
