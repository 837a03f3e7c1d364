"""This machine, for the planner: how fast it moves bytes, measured once and kept, and what is free now.

Every speed is that of the code that will run: the products are built by `placement/linears.py` in each form and
multiply one token, going round copies that together do not fit into a processor's cache. All of it takes about two
seconds; the result is kept in the user's cache folder under a name made of the machine, torch's version and our code.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import psutil
import torch

from backend.cache.kv import KVPool
from backend.engine.runner import Runner
from backend.kernels.cpu.build import cache_folder
from backend.memory import give_back
from backend.model.config import ModelConfig
from backend.model.llama import Layer, Llama
from backend.model.rope import Rope
from backend.placement.linears import build
from backend.placement.machine import Gpu, Machine, Rates
from backend.settings import PROJECT
from backend.weights.blocks import Q4_0, Q4_1, Q4_K, Q5_K, Q6_K, Q8_0, BlockFormat
from backend.weights.bnb import Codebook4, Int8Rows
from backend.weights.linear import Linear, PlainEmbedding, PlainLinear
from backend.weights.nf4 import NF4
from backend.weights.stored import Blocks, Plain, Stored

VERSION = 2  # of what is measured and how: another one measures anew
ROWS, COLUMNS = 1024, 4096  # of a measured product
ROUND = 64 << 20  # bytes of all copies of a product together: more than a processor keeps
FILE_BYTES = 64 << 20
BUSY_PERCENT, AGAIN_SECONDS = 30, 3600  # with more going on, what was measured counts for an hour
BLOCKS = (Q4_0, Q4_K, Q5_K, Q6_K, Q8_0)
VALUES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
CONVERTED = ("bf16", "f16", "f32", "int8", "llm-int8", "int4", "nf4")


def this_machine() -> Machine:
    """Speeds measured once, and the memory that is free at this moment."""
    memory = psutil.virtual_memory()
    found = _measured()
    gpus = tuple(replace(gpu, free=_free(gpu)) for gpu in found.gpus)
    resident = psutil.Process().memory_info().rss
    return replace(found, ram_total=memory.total, ram_free=memory.available, process_bytes=resident, gpus=gpus)


@cache
def _measured() -> Machine:
    path = cache_folder().parent / f"machine-{_key()}.json"
    found = _read(path)
    if found is None:
        busy = psutil.cpu_percent(interval=0.1) > BUSY_PERCENT
        found = measure()
        give_back()  # what it worked with is no part of what a model will take
        _write(path, found, busy)
    return found


def measure() -> Machine:
    """All speeds of this machine. Nothing else should be computing meanwhile."""
    threads = torch.get_num_threads()
    cores = psutil.cpu_count(logical=False) or threads
    torch.set_num_threads(cores)
    try:
        products, conversion = _products("cpu")
        torch.set_num_threads(1)
        alone = _product_rate(build([_blocks(Q4_0)], "original"), "cpu")
        one_core = min(1.0, alone / products["Q4_0"])
        layer_seconds = _layer_seconds("cpu")
        torch.set_num_threads(cores)
        rates = Rates(_bandwidth("cpu"), products, layer_seconds)
    finally:
        torch.set_num_threads(threads)
    return Machine(
        cores=cores, rates=rates, one_core=one_core, conversion=conversion, disk=_disk(), gpus=tuple(_gpus())
    )


# products -------------------------------------------------------------------------------------------------------------


def _products(device: str) -> tuple[dict[str, float], dict[str, float]]:
    """(weight bytes per second of one token's products, of making them from a file) by form."""
    speeds: dict[str, float] = {}
    conversion: dict[str, float] = {}
    kind = torch.device(device).type
    plain = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
    for form, dtype in VALUES.items():
        speeds[form] = _product_rate(PlainLinear(plain.to(dtype)), device)
    for form, stored in _quantised(plain).items():
        speeds[form] = _product_rate(build([stored], form, kind), device)
    for fmt in BLOCKS:
        _ = build([_blocks(fmt)], "original", kind)  # what is done once: compiling, checking
        begin = time.perf_counter()
        linear = build([_blocks(fmt)], "original", kind)
        conversion[fmt.name] = linear.nbytes() / (time.perf_counter() - begin)
        speeds[fmt.name] = _product_rate(linear, device)
    speeds[Q4_1.name] = speeds["int4"]
    for form in CONVERTED if kind == "cpu" else ():
        begin = time.perf_counter()
        linear = build([Plain(plain[: ROWS // 16].bfloat16())], form)
        conversion[form] = linear.nbytes() / (time.perf_counter() - begin)
    return speeds, conversion


def _quantised(plain: torch.Tensor) -> dict[str, Stored]:
    """A matrix stored in each quantised form already, so that it need not be quantised to be measured."""
    codes = torch.randint(-127, 128, plain.shape, dtype=torch.int8)
    packed, book = torch.randint(0, 256, (plain.numel() // 2,), dtype=torch.uint8), torch.tensor(NF4)
    rows = Int8Rows(codes, torch.ones(ROWS))
    return {
        "int8": rows,
        "llm-int8": rows,
        "int4": _blocks(Q4_1),
        "nf4": Codebook4(packed, (ROWS, COLUMNS), book, torch.ones(plain.numel() // 64), 64),
    }


def _blocks(fmt: BlockFormat) -> Blocks:
    """Random blocks, small enough as numbers to stay finite."""
    random = torch.Generator().manual_seed(0)
    return Blocks(torch.randint(0, 60, (ROWS, fmt.row_bytes(COLUMNS)), dtype=torch.uint8, generator=random), fmt)


def _product_rate(linear: Linear, device: str) -> float:
    """Bytes per second of multiplying one token, by the best of some rounds."""
    count = -(-ROUND // linear.nbytes())
    stacks = [tensor.to(device).expand(count, *tensor.shape).clone() for tensor in linear.tensors()]
    copies = [linear.with_tensors([stack[number] for stack in stacks]) for number in range(count)]
    x = torch.randn(1, COLUMNS, device=device)

    def round_() -> None:
        for copy in copies:
            copy(x)

    return len(copies) * linear.nbytes() / _best(round_, device, rounds=4)


def _layer_seconds(device: str, layers: int = 8, dim: int = 64) -> float:
    """Of one layer of a model whose products are next to nothing: what a layer costs beside them."""
    config = ModelConfig(
        architecture="llama", name="", dim=dim, n_layers=layers, n_heads=4, n_kv_heads=4, head_dim=16, ffn_dim=dim,
        vocab_size=dim, context=64, norm_eps=1e-5,
    )  # fmt: skip

    def linear(rows: int) -> PlainLinear:
        return PlainLinear(torch.zeros(rows, dim, dtype=torch.bfloat16, device=device))

    norm = torch.ones(dim, device=device)
    layer = Layer(norm, linear(3 * dim), linear(dim), norm, linear(2 * dim), linear(dim))
    table = torch.zeros(dim, dim, dtype=torch.bfloat16, device=device)
    rope = Rope(config.head_dim, config.rope_theta).to(device)
    model = Llama(config, PlainEmbedding(table), (layer,) * layers, norm, linear(dim), rope)
    pool = KVPool(config, 2, 32, torch.bfloat16, device)
    pool.keys.zero_()
    pool.values.zero_()
    runner = Runner(model, pool)
    return _best(lambda: runner.score([1], 1, [0], [0]), device, rounds=20) / layers


# memory, disk, link ---------------------------------------------------------------------------------------------------


def _bandwidth(device: str) -> float:
    """Bytes per second of summing a large array."""
    data = torch.ones((1 << 28) // 8, dtype=torch.int64, device=device)
    return data.nbytes / _best(lambda: data.sum(), device, rounds=5)


def _disk() -> float:
    """Bytes per second of reading a file that the system has not kept in memory; 0 where that cannot be had."""
    if not hasattr(os, "posix_fadvise"):
        return 0.0
    try:
        folder = cache_folder().parent
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(os.urandom(1 << 20) * (FILE_BYTES >> 20))
            file.flush()
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, FILE_BYTES, os.POSIX_FADV_DONTNEED)
            file.seek(0)
            begin = time.perf_counter()
            while file.read(1 << 22):
                pass
            return FILE_BYTES / (time.perf_counter() - begin)
    except OSError:
        return 0.0


def _link(device: str) -> float:
    """Bytes per second from pinned host memory."""
    host = torch.empty(1 << 28, dtype=torch.uint8, pin_memory=True)
    there = torch.empty_like(host, device=device)
    return host.nbytes / _best(lambda: there.copy_(host, non_blocking=True), device, rounds=5)


def _best(work: Callable[[], object], device: str, rounds: int) -> float:
    """Seconds of the fastest of some rounds, after one that is not counted."""
    best = float("inf")
    for number in range(rounds + 1):
        begin = time.perf_counter()
        work()
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        elif device == "mps":
            torch.mps.synchronize()
        if number:
            best = min(best, time.perf_counter() - begin)
    return best


# devices --------------------------------------------------------------------------------------------------------------


def _gpus() -> list[Gpu]:
    """Every device beside the CPU, those of CUDA first."""
    found = []
    for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        name = f"cuda:{number}"
        before = psutil.Process().memory_info().rss
        free_before, total = torch.cuda.mem_get_info(number)
        rates = Rates(_bandwidth(name), _products(name)[0], _layer_seconds(name))
        link = _link(name)
        torch.cuda.empty_cache()
        taken = max(0, free_before - torch.cuda.mem_get_info(number)[0])
        host = max(0, psutil.Process().memory_info().rss - before)
        title = torch.cuda.get_device_name(number)
        found.append(Gpu(name, title, total, 0, link, rates, max(Gpu("").context_bytes, taken), host))
    if not found and torch.backends.mps.is_available():
        rates = Rates(_bandwidth("mps"), _products("mps")[0], _layer_seconds("mps"))
        found.append(Gpu("mps", "Apple GPU", psutil.virtual_memory().total, rates=rates))
    return found


def _free(gpu: Gpu) -> int:
    """Bytes free on a device: what the system says, and what torch keeps for itself unused."""
    if gpu.name == "mps":
        return psutil.virtual_memory().available
    kept = torch.cuda.memory_reserved(gpu.name) - torch.cuda.memory_allocated(gpu.name)
    return int(torch.cuda.mem_get_info(gpu.name)[0]) + kept


# what is kept ---------------------------------------------------------------------------------------------------------


def _key() -> str:
    """Of this machine, and of everything that decides its speeds: torch's version and our own products."""
    devices = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())] if _has_cuda() else []
    parts = (VERSION, platform.node(), platform.machine(), platform.processor(), psutil.cpu_count(), torch.__version__)
    digest = hashlib.sha256(repr((*parts, devices)).encode())
    for folder in ("kernels", "weights"):
        for file in sorted((PROJECT / "backend" / folder).rglob("*.[chp]*")):
            if file.suffix in (".c", ".h", ".py"):
                digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _has_cuda() -> bool:
    return torch.cuda.is_available()


def _read(path: Path) -> Machine | None:
    """What was kept; None where there is nothing that can be understood."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept.pop("busy") and time.time() - path.stat().st_mtime > AGAIN_SECONDS:
            return None
        gpus = tuple(Gpu(**(gpu | {"rates": Rates(**gpu["rates"])})) for gpu in kept.pop("gpus"))
        return Machine(**(kept | {"rates": Rates(**kept["rates"])}), gpus=gpus)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _write(path: Path, machine: Machine, busy: bool) -> None:
    """Keep it for the next start; a folder that cannot be written costs the next start two seconds and nothing else."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=".machine-")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(asdict(machine) | {"busy": busy}, file, indent=1)
        os.replace(scratch, path)
