"""Blocks of a file into the form they are kept in, by compiled C on all cores.

Twins: planes.py with int4.pack_codes_twin, and decode.dequantize.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence
from functools import partial

import torch

from backend.kernels.cpu.build import library
from backend.kernels.cpu.memory import empty
from backend.weights.blocks import Q4_0, Q4_1, Q4_K, Q6_K, Q8_0, BlockFormat

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
        _shared(partial(work, raw, offset), raw.shape[0] // tile, raw.nbytes)
        offset += raw.shape[0]
    return planes


def decode_to_bf16(raw: torch.Tensor, fmt: BlockFormat, out: torch.Tensor) -> bool:
    """Blocks as values in `out`, bfloat16 (rows, columns); False, and nothing done, where it does not apply."""
    whole = raw.is_contiguous() and out.is_contiguous() and out.dtype == torch.bfloat16
    compiled = library("repack") if fmt is Q6_K and whole else None
    if compiled is None:
        return False

    def work(first: int, last: int) -> None:
        compiled.suri_q6_k_to_bfloat16(
            ctypes.c_void_p(raw.data_ptr()),
            ctypes.c_int64(first),
            ctypes.c_int64(last),
            ctypes.c_void_p(out.data_ptr()),
        )

    _shared(work, raw.numel() // fmt.bytes, raw.nbytes)
    return True


def _shared(work: Callable[[int, int], None], count: int, nbytes: int) -> None:
    """work(first, last) for all of `count`, on as many threads as are worth it.

    ctypes lets go of the interpreter while C runs, so plain threads are enough.
    """
    threads = max(1, min(torch.get_num_threads(), nbytes // _BYTES_PER_THREAD, count))
    bounds = [count * n // threads for n in range(threads + 1)]
    others = [threading.Thread(target=work, args=pair) for pair in zip(bounds[1:], bounds[2:], strict=False)]
    for thread in others:
        thread.start()
    work(bounds[0], bounds[1])
    for thread in others:
        thread.join()
