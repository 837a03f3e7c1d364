"""Blocks of a file into the packed 4-bit layout, by compiled C on all cores. Twins: planes.py, int4.pack_codes_twin."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence

import torch

from backend.kernels.cpu.build import library
from backend.kernels.cpu.memory import empty
from backend.weights.blocks import Q4_0, Q4_1, Q4_K, Q8_0, BlockFormat

FORMATS = (Q4_0, Q4_1, Q8_0, Q4_K)
_BYTES_PER_THREAD = 1 << 19  # less is done before a thread has started


def repack(raws: Sequence[torch.Tensor], fmt: BlockFormat, tile: int) -> list[tuple[torch.Tensor, torch.Tensor]] | None:
    """Matrices one above the other -> for each plane codes, uint8 (rows, columns / 2), and scales (groups, rows, 2).

    raws: uint8 (rows, bytes per row), rows side by side in memory. None where it does not apply: no compiler, another
    format, rows that are not whole tiles.
    """
    if fmt not in FORMATS or any(raw.shape[0] % tile or not raw.is_contiguous() for raw in raws):
        return None
    compiled = library("repack")
    if compiled is None:
        return None
    rows, row_bytes = sum(raw.shape[0] for raw in raws), raws[0].shape[1]
    columns = row_bytes // fmt.bytes * fmt.elements
    planes = [
        (empty((rows, columns // 2), torch.uint8), empty((columns // 32, rows, 2), torch.bfloat16))
        for _ in range(fmt.planes)
    ]
    second = planes[1] if len(planes) > 1 else None

    def work(raw: torch.Tensor, offset: int, first_tile: int, last_tile: int) -> None:
        compiled.suri_repack(
            ctypes.c_int(fmt.ggml_id or 0),
            ctypes.c_void_p(raw.data_ptr()),
            ctypes.c_int64(row_bytes),
            ctypes.c_int64(columns),
            ctypes.c_int(tile // 2),
            ctypes.c_int64(first_tile),
            ctypes.c_int64(last_tile),
            ctypes.c_int64(offset),
            ctypes.c_int64(rows),
            ctypes.c_void_p(planes[0][0].data_ptr()),
            ctypes.c_void_p(second[0].data_ptr() if second else 0),
            ctypes.c_void_p(planes[0][1].data_ptr()),
            ctypes.c_void_p(second[1].data_ptr() if second else 0),
        )

    offset = 0
    for raw in raws:
        tiles = raw.shape[0] // tile
        # ctypes lets go of the interpreter while C runs, so plain threads are enough; a small matrix is not worth one.
        threads = max(1, min(torch.get_num_threads(), raw.nbytes // _BYTES_PER_THREAD, tiles))
        bounds = [tiles * n // threads for n in range(threads + 1)]
        others = [
            threading.Thread(target=work, args=(raw, offset, first, last))
            for first, last in zip(bounds[1:], bounds[2:], strict=False)
        ]
        for thread in others:
            thread.start()
        work(raw, offset, bounds[0], bounds[1])
        for thread in others:
            thread.join()
        offset += raw.shape[0]
    return planes
