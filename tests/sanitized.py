"""Compiled kernels under the address and undefined-behaviour sanitizers: what test_sanitized.py runs in a process of
its own, as the sanitizer's memory functions must be there before Python's.

Every array that the kernels get is a torch tensor of exactly its size, so a read or write beside it ends the process.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from backend.cache.kv import KVPool
from backend.checkpoint.open import open_checkpoint
from backend.engine.compiled import CompiledStep, Tokens
from backend.kernels.cpu import build, steps
from backend.kernels.cpu.draws import Draw, finite_rows
from backend.kernels.cpu.products import looked_up, product, product_in_rows, retile, tiles_library, values
from backend.placement.load import load_model
from backend.weights.blocks import BlockFormat
from backend.weights.tiles import FIELDS

SHAPES = ((16, 1), (37, 3), (144, 2), (9, 18))  # rows, and columns in blocks of 256
TOKENS = (1, 3, 4, 6, 8, 13, 16, 17, 33, 70)


def products(fmt: BlockFormat, variant: str) -> None:
    library = tiles_library()
    assert library is not None
    random = torch.Generator().manual_seed(0)
    for rows, blocks in SHAPES:
        columns = blocks * 256 + (96 if fmt.elements == 32 else 0)  # also odd numbers of blocks
        raw = torch.randint(0, 60, (rows, columns // fmt.elements * fmt.bytes), dtype=torch.uint8, generator=random)
        tiles = retile(library, [raw], fmt)
        weight = values(library, tiles, fmt, rows, columns)
        for tokens in TOKENS:
            x = torch.randn(tokens, columns, generator=random)
            expected = x.double() @ weight.double().T
            # Rounding of activations, or of both factors to bfloat16: loose, since other tests look closely.
            bound = 0.01 * (x.abs().double() @ weight.abs().double().T)
            ids = torch.arange(rows, dtype=torch.int64)
            assert torch.equal(looked_up(library, tiles, fmt, columns, ids), weight)
            for found in (product(library, tiles, fmt, rows, columns, x), product_in_rows(library, [raw], fmt, x)):
                assert ((found - expected).abs() <= bound).all(), (fmt.name, rows, columns, tokens, variant)


def drawn() -> None:
    draw = Draw.of([("top_k", 1024), ("top_p", 0.9), ("min_p", -5.0), ("temperature", 0.7), ("top_k", 3)])
    assert draw is not None
    for size in (1, 15, 16, 1024, 4097, 50257):
        rows = torch.randn(3, size)
        assert finite_rows(rows) == [True] * 3
        assert all(rows[n, draw(rows[n].clone(), 0.999)] > -float("inf") for n in range(3))


def whole_steps(path: Path) -> None:
    model = load_model(open_checkpoint(path), "original", "test").model
    for kv in steps.KINDS:
        pool = KVPool(model.config, 8, steps.BLOCK_TOKENS, kv)
        compiled = CompiledStep.of(model, pool)
        assert compiled is not None
        ids = [(7 * n) % 250 for n in range(90)]
        parts = [Tokens(0, 1, 0, [7]), Tokens(1, 19, 0, [3], prompt=True), Tokens(20, 70, 0, [5, 2, 6], prompt=True)]
        found = compiled.run(ids, parts, [0, 19, *range(20, 90)], threads=2)
        one = compiled.run(ids[:1], [Tokens(0, 1, 70, [5, 2, 6])], [0], threads=2)
        assert torch.isfinite(torch.cat([found, one])).all()


def main() -> None:
    build.FLAGS = ("-O1", "-g", "-march=native", "-fPIC", "-std=gnu11", "-fno-math-errno", *sys.argv[2:])
    for fmt in FIELDS:
        products(fmt, "native")
    drawn()
    for path in sys.argv[1].split(":"):
        whole_steps(Path(path))
    print("clean")


if __name__ == "__main__":
    main()
