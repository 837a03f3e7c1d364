"""Products of one matrix on the CPU: packed formats in compiled code beside torch's own products, in turn.

For each format and number of tokens the median time, and for one token the bytes of the weight per second, beside what
the machine reads when it only adds up. Matrices of a format are several, so that no cache holds them.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from backend.weights.blocks import Q4_0, Q4_1, Q4_K, Q5_K, Q6_K, Q8_0, BlockFormat
from backend.weights.tiled import TiledLinear

NAME = "kernels"
FORMATS = (Q4_0, Q4_1, Q8_0, Q4_K, Q5_K, Q6_K)
SHAPES, TOKENS = ((4096, 4096), (11008, 4096)), (1, 8, 32, 320)
ROUNDS, COLD_BYTES = 5, 400 << 20

Multiply = Callable[[torch.Tensor], torch.Tensor]


def run() -> dict[str, Any]:
    results: dict[str, Any] = {"threads": torch.get_num_threads(), "rounds": ROUNDS, "shapes": {}}
    for rows, columns in SHAPES:
        ways = _ways(rows, columns)
        print(f"{rows} x {columns}: " + ", ".join(f"{n} tokens" for n in TOKENS) + " in ms; GB/s of one token")
        table: dict[str, dict[str, float]] = {name: {} for name in ways}
        for tokens in TOKENS:
            for name, milliseconds in _measured(ways, torch.randn(tokens, columns)).items():
                table[name][f"ms_{tokens}"] = milliseconds
        for name, row in table.items():
            row["gigabytes_per_second"] = ways[name][1] / row["ms_1"] / 1e6
            times = "  ".join(f"{row[f'ms_{tokens}']:8.2f}" for tokens in TOKENS)
            print(f"  {name:24} {times}  {row['gigabytes_per_second']:6.1f}")
        results["shapes"][f"{rows}x{columns}"] = table
    return results


def _ways(rows: int, columns: int) -> dict[str, tuple[list[Multiply], int]]:
    """name -> (the same product with several matrices, bytes of one)."""
    aten, bf16 = torch.ops.aten, torch.bfloat16
    numbers = torch.zeros(rows * columns // 2, dtype=torch.float32)
    ways: dict[str, tuple[list[Multiply], int]] = {
        "reading": ([lambda _: numbers.sum()] * 2, numbers.nbytes),
    }

    def add(name: str, make: Callable[[], tuple[Multiply, int]]) -> None:
        first, nbytes = make()
        ways[name] = ([first, *(make()[0] for _ in range(max(1, COLD_BYTES // nbytes - 1)))], nbytes)

    def plain() -> tuple[Multiply, int]:
        weight = torch.randn(rows, columns).to(bf16)
        return lambda x: F.linear(x.to(bf16), weight), weight.nbytes

    def int4pack() -> tuple[Multiply, int]:
        codes = aten._convert_weight_to_int4pack_for_cpu(torch.randint(0, 16, (rows, columns), dtype=torch.int32), 1)
        scales = torch.ones(columns // 32, rows, 2, dtype=bf16)
        return lambda x: aten._weight_int4pack_mm_for_cpu(x.to(bf16), codes, 32, scales), codes.nbytes + scales.nbytes

    def int8pack() -> tuple[Multiply, int]:
        codes, scales = torch.randint(-127, 128, (rows, columns), dtype=torch.int8), torch.ones(rows, dtype=bf16)
        return lambda x: aten._weight_int8pack_mm(x.to(bf16), codes, scales), codes.nbytes

    add("torch bf16", plain)
    add("torch int4pack group 32", int4pack)
    add("torch int8pack", int8pack)
    for fmt in FORMATS:
        if _tiled(fmt, rows, columns) is not None:
            add(fmt.name, _maker(fmt, rows, columns))
    return ways


def _maker(fmt: BlockFormat, rows: int, columns: int) -> Callable[[], tuple[Multiply, int]]:
    def make() -> tuple[Multiply, int]:
        linear = _tiled(fmt, rows, columns)
        assert linear is not None
        return linear, linear.nbytes()

    return make


def _tiled(fmt: BlockFormat, rows: int, columns: int) -> TiledLinear | None:
    return TiledLinear.of_blocks([torch.randint(0, 60, (rows, fmt.row_bytes(columns)), dtype=torch.uint8)], fmt)


def _measured(ways: dict[str, tuple[list[Multiply], int]], x: torch.Tensor) -> dict[str, float]:
    """Medians in milliseconds, all ways in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    turns = {name: itertools.cycle(products) for name, (products, _) in ways.items()}
    for number in range(ROUNDS + 1):  # the first round warms up
        for name, turn in turns.items():
            for _ in range(1 if len(x) > 8 else 3):
                multiply = next(turn)
                begun = time.perf_counter()
                multiply(x)
                if number:
                    seconds[name].append(time.perf_counter() - begun)
    return {name: 1e3 * statistics.median(times) for name, times in seconds.items()}
