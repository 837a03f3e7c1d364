"""Compile every Triton kernel for real GPUs, on a machine without one. test_cuda_kernels.py runs this as a program.

The interpreter accepts what the compiler refuses (types, layouts, too much shared memory). The launchers run on CPU
tensors of real shapes, and each launch is compiled and not carried out. Prints a line for each: name, shared memory.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from backend.kernels.cuda.available import load
from backend.weights import nf4


class NoDevice:
    """Says which GPU to compile for, and has none."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def launches(compile_only: list[tuple[str, Any]]) -> None:
    """All kernels in shapes of a 7B model, and some in odd ones."""
    k = load()
    weights = [torch.empty(256, 4096, dtype=dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)]
    codes8, scale8 = torch.empty(256, 4096, dtype=torch.int8), torch.empty(256)
    codes4, book = torch.empty(256, 2048, dtype=torch.uint8), nf4.book_tensor(nf4.NF4, "cpu")
    for tokens in (1, 3, 9):
        x, module = torch.zeros(tokens, 4096), k.gemv if tokens <= k.gemv.MOST else k.skinny
        for weight in weights:
            module.rows(x, weight)
        module.rows(x, codes8, scale8)
        module.rows(torch.zeros(tokens, 1000), torch.empty(7, 1000).bfloat16())
        for group in (32, 128):
            scale = torch.empty(256, 4096 // group, dtype=torch.float16)
            module.grouped4(x, codes4, scale, scale)
        absmax = torch.empty(256, 64)
        module.looked_up4(x, codes4, absmax, book)
        k.outliers.llm_int8(x, codes8, scale8, 6.0)
        k.dense.decode(codes4, absmax, None, book, torch.bfloat16)
        k.dense.decode(codes4, scale, scale, None, torch.bfloat16)
        k.between.add_norm(x, None, x[0], 1e-5)
        k.between.add_norm(x, x, x[0], 1e-5)
        k.between.gated(torch.zeros(tokens, 22016))
        k.between.greedy(torch.zeros(tokens, 32000))
        for heads, n_kv, head_dim in ((32, 8, 128), (9, 3, 100)):
            for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.int8):
                keys = torch.empty(n_kv, 64, head_dim, dtype=dtype)
                turns = torch.zeros(tokens, 1, head_dim // 2, 2)
                slots, table = torch.zeros(tokens, dtype=torch.int32), torch.zeros(tokens, 2, dtype=torch.int32)
                scales = torch.empty(n_kv, 64) if dtype == torch.int8 else None
                flat = torch.zeros(tokens, heads + 2 * n_kv, head_dim)
                for interleaved in (True, False):
                    query = k.paged.turn_and_store(flat, turns, slots, keys, keys, heads, interleaved, scales, scales)
                k.paged.decode(query, keys, keys, table, slots, 32, None, scales, scales)


def main(capability: int) -> None:
    made: list[tuple[str, Any]] = []

    def only_compile(function: JITFunction, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **options: Any) -> None:
            made.append((function.__name__, function.run(*args, grid=grid, warmup=True, **options)))

        return launch

    driver.set_active(NoDevice(capability))  # type: ignore[arg-type]
    JITFunction.__getitem__ = only_compile  # type: ignore[method-assign]
    assert not triton.knobs.runtime.interpret
    launches(made)
    most: dict[str, int] = {}
    for name, kernel in made:
        assert kernel.asm["cubin"], name
        most[name] = max(most.get(name, 0), kernel.metadata.shared)
    for name, shared in most.items():
        print(f"sm_{capability} {name} {shared}")


if __name__ == "__main__":
    main(int(sys.argv[1]))
