"""How fast a model file becomes a model: bytes of file per second, beside reading the same file and doing nothing.

Read: through one small buffer, again and again. Kept: into memory of the file's size that was just asked for, in huge
pages, which is the least that any loader does that does not leave the weights in the page cache.
Files are made here: four layers of LLaMA 7B's shape with random blocks, one file a type. Each round reads the file and
loads it, once from the page cache and once after asking the system to forget it, in turn.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from backend.checkpoint.open import open_checkpoint
from backend.kernels.cpu.memory import empty
from backend.placement.load import load_model

NAME = "loading"
TYPES = ("Q4_0", "Q4_K", "Q8_0", "Q6_K", "F16")
DIM, FFN, LAYERS, VOCABULARY, ROUNDS = 4096, 11008, 4, 2048, 5


def run() -> dict[str, Any]:
    threads = torch.get_num_threads()
    results: dict[str, Any] = {"threads": threads, "rounds": ROUNDS, "layers": LAYERS, "types": {}}
    print(
        f"{'':6} {'MB':>6} {'cached: read, kept, load':>30} {'/read, /kept':>16} {'cold: read, load':>18} {'ratio':>6}"
    )
    with tempfile.TemporaryDirectory() as folder:
        for name in TYPES:
            path = write_model(Path(folder) / f"{name}.gguf", name)
            row = _measured(path)
            path.unlink()
            results["types"][name] = row
            print(
                f"{name:6} {row['megabytes']:6.0f} {row['read_cached']:10.0f} {row['kept_cached']:9.0f} "
                f"{row['load_cached']:9.0f} {row['ratio_cached']:10.2f} {row['ratio_cached_kept']:5.2f} "
                f"{row['read_cold']:9.0f} {row['load_cold']:8.0f} {row['ratio_cold']:6.2f}"
            )
    return results


def write_model(path: Path, name: str, layers: int = LAYERS, vocabulary: int = VOCABULARY) -> Path:
    """A GGUF file of random blocks whose scales are ordinary numbers, with a vocabulary of made-up words."""
    kind = gguf.GGMLQuantizationType[name]
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    random = np.random.default_rng(0)
    plain = (0.02 * random.standard_normal(1 << 20)).astype(np.float16)
    writer = gguf.GGUFWriter(path, "llama")
    numbers = {
        "block_count": layers, "context_length": 2048, "embedding_length": DIM, "feed_forward_length": FFN,
        "attention.head_count": 32,
    }  # fmt: skip
    for key, number in numbers.items():
        writer.add_uint32(f"llama.{key}", number)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)

    def add(tensor: str, rows: int, columns: int) -> None:
        if name == "F16":
            writer.add_tensor(tensor, np.resize(plain, (rows, columns)))
        else:
            raw = random.integers(0, 60, (rows, columns // elements * size), dtype=np.uint8)
            writer.add_tensor(tensor, raw, raw_dtype=kind)

    control, ordinary = int(gguf.TokenType.CONTROL), int(gguf.TokenType.NORMAL)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", *(f"w{n}" for n in range(3, vocabulary))])
    writer.add_token_scores([0.0] * vocabulary)
    writer.add_token_types([control] * 3 + [ordinary] * (vocabulary - 3))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    add("token_embd.weight", vocabulary, DIM)
    add("output.weight", vocabulary, DIM)
    writer.add_tensor("output_norm.weight", np.ones(DIM, np.float32))
    for n in range(layers):
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"blk.{n}.{part}.weight", DIM, DIM)
        add(f"blk.{n}.ffn_gate.weight", FFN, DIM)
        add(f"blk.{n}.ffn_up.weight", FFN, DIM)
        add(f"blk.{n}.ffn_down.weight", DIM, FFN)
        for part in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{n}.{part}.weight", np.ones(DIM, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _measured(path: Path) -> dict[str, float]:
    """Medians in megabytes of file per second, and of load to read."""
    seconds: dict[str, list[float]] = {
        name: [] for name in ("read_cached", "kept_cached", "load_cached", "read_cold", "load_cold")
    }
    do = {"read": _read, "kept": _keep, "load": _load}
    os.sync()
    for number in range(ROUNDS + 1):  # the first round warms up
        for name, times in seconds.items():
            if name.endswith("cold"):
                _forget(path)
            begun = time.perf_counter()
            do[name.split("_")[0]](path)
            if number:
                times.append(time.perf_counter() - begun)
    megabytes = path.stat().st_size / 1e6
    speeds = {name: megabytes / statistics.median(times) for name, times in seconds.items()}
    # Ratios of neighbours in time: this kind of machine is twice as fast in one minute as in the next.
    pairs = {
        "ratio_cached": ("read_cached", "load_cached"),
        "ratio_cached_kept": ("kept_cached", "load_cached"),
        "ratio_cold": ("read_cold", "load_cold"),
    }
    ratios = {
        name: statistics.median(read / load for read, load in zip(seconds[first], seconds[second], strict=True))
        for name, (first, second) in pairs.items()
    }
    return {"megabytes": megabytes} | speeds | ratios


def _read(path: Path) -> None:
    buffer = bytearray(1 << 24)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def _keep(path: Path) -> None:
    memory = empty((path.stat().st_size,), torch.uint8).numpy()
    with open(path, "rb", buffering=0) as file:
        at = 0
        while count := file.readinto(memory[at : at + (1 << 24)]):
            at += count


def _load(path: Path) -> None:
    load_model(open_checkpoint(path), "original", "benchmark")


def _forget(path: Path) -> None:
    """Drop the file's pages from the cache, where the system has a way to ask for it."""
    if hasattr(os, "posix_fadvise"):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
