"""Drawing a token in one call of compiled C. The twin: the chain of torch operations in sampling/.

These calls take some ten microseconds and keep Python's lock: whoever lets go of it waits until another thread gives it
back, which takes longer than that.
"""

from __future__ import annotations

import ctypes
from collections.abc import Collection, Sequence
from functools import cache
from typing import Literal

import torch

from backend.kernels.cpu.build import library

Cut = Literal["top_k", "top_p", "min_p", "temperature"]
CUTS: tuple[Cut, ...] = ("top_k", "top_p", "min_p", "temperature")  # in the order of draw.c
MOST = 1024  # kept by top-k, as in draw.c


class _Cut(ctypes.Structure):
    _fields_ = [("cut", ctypes.c_int64), ("value", ctypes.c_double)]


@cache
def _functions() -> ctypes.PyDLL | None:
    compiled = library("draw")
    if compiled is None:
        return None
    return with_types(ctypes.PyDLL(compiled._name, handle=compiled._handle))


def with_types(compiled: ctypes.PyDLL) -> ctypes.PyDLL:
    address, size = ctypes.c_void_p, ctypes.c_int64
    compiled.suri_draw.argtypes = (address, size, ctypes.POINTER(_Cut), size, ctypes.c_double, address, size)
    compiled.suri_draw.restype = size
    compiled.suri_finite.argtypes = (address, size, size, address)
    compiled.suri_finite.restype = None
    return compiled


class Draw:
    """Cuts and a draw. `cuts`: the first is a top-k of at most `MOST`; `min_p` as the natural log of the share."""

    def __init__(self, compiled: ctypes.PyDLL, cuts: Sequence[tuple[Cut, float]]) -> None:
        self._compiled, self.keeps = compiled, int(cuts[0][1])  # candidates at most
        self._cuts = (_Cut * len(cuts))(*(_Cut(CUTS.index(cut), value) for cut, value in cuts))

    @classmethod
    def of(cls, cuts: Sequence[tuple[Cut, float]]) -> Draw | None:
        """None where it does not apply: no compiler, no top-k to begin with."""
        compiled = _functions()
        if compiled is None or not cuts or cuts[0][0] != "top_k" or not 1 <= cuts[0][1] <= MOST:
            return None
        return cls(compiled, cuts)

    def __call__(self, logits: torch.Tensor, uniform: float, barred: Collection[int] = ()) -> int:
        """The place of the token in the row. logits: float32 (n,) on the CPU, finite or -inf. `barred`: places that
        count as -inf; with those that are kept, `MOST` of them at most. -1 where none is left."""
        logits = logits.contiguous()
        count, places = len(barred), None
        if count:
            places = (ctypes.c_int64 * count)(*barred)
        cuts = self._cuts
        place = self._compiled.suri_draw(logits.data_ptr(), logits.numel(), cuts, len(cuts), uniform, places, count)
        return int(place)


def finite_rows(logits: torch.Tensor) -> list[bool]:
    """Which rows of float32 (rows, n), on the CPU, have no NaN and no infinity in them."""
    compiled = _functions()
    if compiled is None or not logits.is_contiguous():
        return torch.isfinite(logits).all(dim=-1).tolist()  # type: ignore[no-any-return]
    found = bytearray(len(logits))
    room = (ctypes.c_uint8 * len(found)).from_buffer(found)
    compiled.suri_finite(logits.data_ptr(), len(logits), logits.shape[1], room)
    return [bool(flag) for flag in found]
