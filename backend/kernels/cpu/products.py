"""Packed weights in tiles through compiled code: making tiles of a file's blocks, multiplying, decoding.

Callers ask `tiles_library()` first; it is None where there is no compiler. The layout is in weights/tiles.py, its
slow twin in weights/tiled.py.

Called through ctypes, which takes a microsecond or two and lets other Python threads run meanwhile; an operation
registered with torch takes longer to get through its dispatcher, and nothing here is to be traced or differentiated.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache

import torch

from backend.kernels.cpu.build import library
from backend.kernels.cpu.memory import empty
from backend.weights.blocks import BlockFormat
from backend.weights.tiles import ROWS, tiled_bytes

FEW = 32  # tokens: SURI_FEW of product.h
_POINTER, _SIZE, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_ARGUMENTS = {
    "suri_retile": (_INT, _POINTER, _SIZE, _SIZE, _POINTER, _INT),
    "suri_product": (_INT, _INT, _INT, _POINTER, _POINTER, _SIZE, _POINTER, _SIZE, _SIZE, _POINTER, _INT),
    "suri_values": (_INT, _POINTER, _SIZE, _SIZE, _POINTER, _INT),
    "suri_rows": (_INT, _POINTER, _SIZE, _POINTER, _SIZE, _POINTER, _INT),
}


@cache
def tiles_library() -> ctypes.CDLL | None:
    """The compiled functions with the types of their arguments; None where they cannot be had."""
    return None if (compiled := library("product")) is None else with_types(compiled)


def with_types(compiled: ctypes.CDLL) -> ctypes.CDLL:
    for name, kinds in _ARGUMENTS.items():
        function = getattr(compiled, name)
        function.argtypes, function.restype = kinds, _INT if name == "suri_product" else None
    compiled.suri_vectors.restype = ctypes.c_char_p
    compiled.suri_matrix.restype = _INT
    compiled.suri_jobs.argtypes, compiled.suri_jobs.restype = (_POINTER, _POINTER), None
    return compiled


def jobs(compiled: ctypes.CDLL) -> tuple[int, int]:
    """What compiled code has done since it was loaded: jobs, and of these such that several threads share: barriers."""
    found = (ctypes.c_uint64 * 2)()
    compiled.suri_jobs(ctypes.addressof(found), ctypes.addressof(found) + 8)
    return found[0], found[1]


def retile(compiled: ctypes.CDLL, raws: Sequence[torch.Tensor], fmt: BlockFormat) -> torch.Tensor:
    """Matrices one above the other -> tiles, uint8 (bytes,). raws: uint8 (rows, bytes per row), each in one piece; all
    but the last of whole tiles."""
    row_bytes = raws[0].shape[1]
    columns = row_bytes // fmt.bytes * fmt.elements
    tiles = empty((tiled_bytes(fmt, sum(raw.shape[0] for raw in raws), columns),), torch.uint8)
    at = tiles.data_ptr()
    for raw in raws:
        if raw.shape[0] % ROWS and raw is not raws[-1]:
            raise ValueError(f"{raw.shape[0]} rows are not whole tiles of {ROWS}")
        compiled.suri_retile(fmt.ggml_id, raw.data_ptr(), row_bytes, raw.shape[0], at, torch.get_num_threads())
        at += raw.nbytes
    return tiles


def product(
    compiled: ctypes.CDLL,
    tiles: torch.Tensor,
    fmt: BlockFormat,
    rows: int,
    columns: int,
    x: torch.Tensor,
    few: int | None = None,
) -> torch.Tensor:
    """x float32 (tokens, columns) -> x W^T, float32 (tokens, rows). x is rounded: tiled.py says how for few tokens, and
    how for many. few: so many of the first tokens are multiplied as few are; None: all are, or none is."""
    return _product(compiled, [tiles], [rows], False, fmt, columns, x, few)


def product_in_rows(
    compiled: ctypes.CDLL, raws: Sequence[torch.Tensor], fmt: BlockFormat, x: torch.Tensor
) -> torch.Tensor:
    """The same, bit for bit, of matrices as they lie in a file, one above the other: raws uint8 (rows, bytes per row),
    each in one piece. Each tile is made in the cache and forgotten: for weights that are multiplied with once."""
    columns = raws[0].shape[1] // fmt.bytes * fmt.elements
    return _product(compiled, raws, [raw.shape[0] for raw in raws], True, fmt, columns, x)


def _product(
    compiled: ctypes.CDLL,
    matrices: Sequence[torch.Tensor],
    rows: Sequence[int],
    in_rows: bool,
    fmt: BlockFormat,
    columns: int,
    x: torch.Tensor,
    few: int | None = None,
) -> torch.Tensor:
    x, count = x.contiguous(), len(matrices)
    tokens, threads = x.shape[0], torch.get_num_threads()
    few = few if few is not None else tokens if tokens <= FEW else 0
    out = torch.empty(tokens, sum(rows))
    places = (_POINTER * count)(*(matrix.data_ptr() for matrix in matrices))
    heights = (_SIZE * count)(*rows)
    failed = compiled.suri_product(
        fmt.ggml_id, in_rows, count, places, heights, columns, x.data_ptr(), tokens, few, out.data_ptr(), threads
    )
    if failed:
        raise MemoryError(f"no memory for the activations of {tokens} tokens")
    return out


def values(compiled: ctypes.CDLL, tiles: torch.Tensor, fmt: BlockFormat, rows: int, columns: int) -> torch.Tensor:
    """The weight as float32 (rows, columns); bit for bit what `decode.dequantize` makes of the file's blocks."""
    out = torch.empty(rows, columns)
    compiled.suri_values(fmt.ggml_id, tiles.data_ptr(), rows, columns, out.data_ptr(), torch.get_num_threads())
    return out


def looked_up(
    compiled: ctypes.CDLL, tiles: torch.Tensor, fmt: BlockFormat, columns: int, ids: torch.Tensor
) -> torch.Tensor:
    """Rows of the weight, float32 (ids, columns), as `values` has them. ids: int64 (ids,), all of them rows of it."""
    out = torch.empty(len(ids), columns)
    ids = ids.contiguous()
    threads = torch.get_num_threads()
    compiled.suri_rows(fmt.ggml_id, tiles.data_ptr(), columns, ids.data_ptr(), len(ids), out.data_ptr(), threads)
    return out
