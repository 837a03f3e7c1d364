"""This machine, for the planner: how fast it moves bytes, measured once and kept, and what is free now.

Every speed is that of the code that will run: the products are built by `placement/linears.py` in each form and
multiply one token, going round copies that together do not fit into a processor's cache. All of it takes some
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
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import psutil
import torch

from backend.cache.kv import KVPool
from backend.checkpoint.mapped import MappedFile
from backend.engine.runner import Runner
from backend.engine.threads import Threads
from backend.kernels.cpu.build import cache_folder
from backend.kernels.cpu.memory import bring
from backend.memory import give_back
from backend.model.config import ModelConfig
from backend.model.llama import Layer, Llama
from backend.model.rope import Rope
from backend.placement.linears import borrow, build
from backend.placement.machine import Gpu, Machine, Rates
from backend.settings import PROJECT
from backend.weights.blocks import Q4_0, Q4_1, Q4_K, Q5_K, Q6_K, Q8_0, BlockFormat
from backend.weights.bnb import Codebook4, Int8Rows
from backend.weights.linear import Linear, PlainEmbedding, PlainLinear
from backend.weights.nf4 import NF4
from backend.weights.stored import Blocks, Plain, Stored

VERSION = 6  # of what is measured and how: another one measures anew
ROWS, COLUMNS = 1024, 4096  # of a measured product
SHORT_ROW = 512  # columns: as in small models, where torch's products of plain values are slower for their bytes
ROUND = 64 << 20  # bytes of all copies of a product together: more than a processor keeps
FILE_BYTES = 64 << 20
BUSY_PERCENT, AGAIN_SECONDS = 30, 3600  # with more going on, what was measured counts for an hour
BLOCKS = (Q4_0, Q4_K, Q5_K, Q6_K, Q8_0)
VALUES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
NARROW = 64  # dimensions of a model whose products cost next to nothing
STEP_LAYERS = 30  # of the one a compiled step is measured with: what is done once a step is shared by as many as usual
CONVERTED = ("bf16", "f16", "f32", "int8", "llm-int8", "int4", "nf4")


Pause = Callable[[], None]  # called between two measurements: may wait, and ends them all by an exception


def this_machine() -> Machine:
    """Speeds measured once, and the memory that is free at this moment."""
    return at_this_moment(_measured())


def at_this_moment(found: Machine) -> Machine:
    """A machine with the memory that is free now; `Machine()` is one of which no speed is known."""
    memory = psutil.virtual_memory()
    gpus = tuple(replace(gpu, free=_free(gpu)) for gpu in found.gpus)
    resident = psutil.Process().memory_info().rss
    return replace(found, ram_total=memory.total, ram_free=memory.available, process_bytes=resident, gpus=gpus)


def kept() -> Machine | None:
    """The speeds that an earlier start measured; None where there are none."""
    return _read(_file())


def measured(pause: Pause = lambda: None) -> Machine:
    """The same, or measured now and kept."""
    found = kept()
    if found is None:
        busy = psutil.cpu_percent(interval=0.1) > BUSY_PERCENT
        try:
            found = measure(pause)
        finally:
            give_back()  # what it worked with is no part of what a model will take
        _write(_file(), found, busy)
    return found


@cache
def _measured() -> Machine:
    return measured()


def _file() -> Path:
    return cache_folder().parent / f"machine-{_key()}.json"


def measure(pause: Pause = lambda: None) -> Machine:
    """All speeds of this machine. Nothing else should be computing meanwhile."""
    threads = torch.get_num_threads()
    cores = psutil.cpu_count(logical=False) or threads
    torch.set_num_threads(cores)
    try:
        products, conversion = _products("cpu", pause)
        torch.set_num_threads(1)
        one_core = min(1.0, _product_rate(PlainLinear(_plain().bfloat16()), "cpu") / products["bf16"])
        pause()
        layer_seconds = _layer_seconds("cpu")
        torch.set_num_threads(cores)
        step_seconds = _step_seconds(cores)
        pause()
        rates = Rates(bandwidth("cpu"), products, layer_seconds, _row_seconds(products, pause))
        pause()
    finally:
        torch.set_num_threads(threads)
    return Machine(
        cores=cores,
        rates=rates,
        one_core=one_core,
        conversion=conversion,
        disk=_disk(),
        gpus=tuple(_gpus(pause)),
        step_seconds=step_seconds,
    )


# products -------------------------------------------------------------------------------------------------------------


def _products(device: str, pause: Pause) -> tuple[dict[str, float], dict[str, float]]:
    """(weight bytes per second of one token's products, of making them from a file) by form."""
    speeds: dict[str, float] = {}
    conversion: dict[str, float] = {}
    kind = torch.device(device).type
    plain = _plain()
    for form, dtype in VALUES.items():
        pause()
        speeds[form] = _product_rate(PlainLinear(plain.to(dtype)), device)
    for form, stored in _quantised(plain).items():
        pause()
        speeds[form] = _product_rate(build([stored], form, kind), device)
    for fmt in BLOCKS:
        pause()
        blocks = _blocks(fmt)
        conversion[fmt.name] = _conversion_rate(blocks, "original", kind)
        speeds[fmt.name] = _product_rate(build([blocks], "original", kind), device)
    speeds[Q4_1.name] = speeds["int4"]
    for form in CONVERTED if kind == "cpu" else ():
        pause()
        rows = ROWS if form in VALUES else ROWS // 16  # quantising is slow
        conversion[form] = _conversion_rate(Plain(plain[:rows].bfloat16()), form, kind)
    return speeds, conversion


def _plain() -> torch.Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))


def _quantised(plain: torch.Tensor) -> dict[str, Stored]:
    """A matrix stored in each quantised form already, so that it need not be quantised to be measured."""
    codes = torch.randint(-127, 128, plain.shape, dtype=torch.int8)
    packed, book = torch.randint(0, 256, (plain.numel() // 2,), dtype=torch.uint8), torch.tensor(NF4)
    rows = Int8Rows(codes, torch.ones(ROWS))
    return {
        "int8": _blocks(Q8_0),
        "llm-int8": rows,
        "int4": _blocks(Q4_1),
        "nf4": Codebook4(packed, (ROWS, COLUMNS), book, torch.ones(plain.numel() // 64), 64),
    }


def _blocks(fmt: BlockFormat, shape: tuple[int, int] | None = None) -> Blocks:
    """Random blocks, small enough as numbers to stay finite."""
    random = torch.Generator().manual_seed(0)
    rows, columns = shape or (ROWS, COLUMNS)
    return Blocks(torch.randint(0, 60, (rows, fmt.row_bytes(columns)), dtype=torch.uint8, generator=random), fmt)


def _product_rate(linear: Linear, device: str) -> float:
    """Bytes per second of multiplying one token, by the best of some rounds."""
    count = -(-ROUND // linear.nbytes())
    stacks = [tensor.to(device).expand(count, *tensor.shape).clone() for tensor in linear.tensors()]
    copies = [linear.with_tensors([stack[number] for stack in stacks]) for number in range(count)]
    x = torch.randn(1, linear.in_features, device=device)

    def round_() -> None:
        for copy in copies:
            copy(x)

    return len(copies) * linear.nbytes() / _best(round_, device, rounds=8)


def _row_seconds(products: Mapping[str, float], pause: Pause) -> dict[str, float]:
    """What torch takes for a row beside reading it, by form: from products of long rows and of short ones.

    Seconds of a row of n bytes = n / speed + r; with two lengths, r follows.
    """
    found, short = {}, _plain().view(-1, min(SHORT_ROW, COLUMNS // 2))
    for form, dtype in VALUES.items():
        pause()
        linear = PlainLinear(short.to(dtype))
        slower = 1 / _product_rate(linear, "cpu") - 1 / products[form]  # for each byte
        found[form] = max(0.0, slower / (1 / short.shape[1] - 1 / COLUMNS) * dtype.itemsize)
    return found


def _conversion_rate(stored: Stored, form: str, kind: str) -> float:
    """Bytes per second of making a weight from what its file holds, or of mapping the file where that is enough."""
    if kind == "cpu" and borrow([stored], form) is not None:
        return _mapping_rate()
    made = build([stored], form, kind)  # this one does what is done once: compiling, checking
    return made.nbytes() / _best(lambda: build([stored], form, kind), "cpu", rounds=2)


@cache
def _mapping_rate() -> float:
    """Bytes per second of mapping a file that is in memory already, and letting it go."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights"
        path.write_bytes(bytes(FILE_BYTES))
        file = MappedFile(path)
        release = file.releaser(0, file.size)

        def there_and_back() -> None:
            bring(file.bytes)
            release()

        return FILE_BYTES / _best(there_and_back, "cpu", rounds=3)


def _layer_seconds(device: str) -> float:
    """What a layer costs beside its products, with one call of torch for each operation."""

    def linear(rows: int) -> Linear:
        return PlainLinear(torch.zeros(rows, NARROW, dtype=torch.bfloat16, device=device))

    runner = _narrow_model(8, linear, device)
    return _best(lambda: runner.score([1], 1, [0], [0]), device, rounds=20) / 8


def _step_seconds(threads: int) -> float:
    """The same where the whole step is one compiled call; 0 where there is none."""

    def linear(rows: int) -> Linear:
        return build([_blocks(Q4_0, (rows, NARROW))], "original")

    runner = _narrow_model(STEP_LAYERS, linear, "cpu", Threads(threads, 0))
    if not runner.in_one_call:
        return 0.0
    return _best(lambda: runner.score([1], 1, [0], [0]), "cpu", rounds=40) / STEP_LAYERS


def _narrow_model(layers: int, linear: Callable[[int], Linear], device: str, threads: Threads | None = None) -> Runner:
    """A model whose products are next to nothing."""
    dim = NARROW
    config = ModelConfig(
        architecture="llama", name="", dim=dim, n_layers=layers, n_heads=4, n_kv_heads=4, head_dim=16, ffn_dim=dim,
        vocab_size=dim, context=64, norm_eps=1e-5,
    )  # fmt: skip
    norm = torch.ones(dim, device=device)
    layer = Layer(norm, linear(3 * dim), linear(dim), norm, linear(2 * dim), linear(dim))
    table = torch.zeros(dim, dim, dtype=torch.bfloat16, device=device)
    rope = Rope(config.head_dim, config.rope_theta).to(device)
    model = Llama(config, PlainEmbedding(table), (layer,) * layers, norm, linear(dim), rope)
    pool = KVPool(config, 2, 32, torch.bfloat16, device)
    pool.keys.zero_()
    pool.values.zero_()
    return Runner(model, pool, threads)


# memory, disk, link ---------------------------------------------------------------------------------------------------


def bandwidth(device: str = "cpu") -> float:
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


def _gpus(pause: Pause) -> list[Gpu]:
    """Every device beside the CPU, those of CUDA first."""
    found = []
    for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        name = f"cuda:{number}"
        before = psutil.Process().memory_info().rss
        free_before, total = torch.cuda.mem_get_info(number)
        rates = Rates(bandwidth(name), _products(name, pause)[0], _layer_seconds(name))
        link = _link(name)
        torch.cuda.empty_cache()
        taken = max(0, free_before - torch.cuda.mem_get_info(number)[0])
        host = max(0, psutil.Process().memory_info().rss - before)
        title = torch.cuda.get_device_name(number)
        found.append(Gpu(name, title, total, 0, link, rates, max(Gpu("").context_bytes, taken), host))
    if not found and torch.backends.mps.is_available():
        rates = Rates(bandwidth("mps"), _products("mps", pause)[0], _layer_seconds("mps"))
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
