"""How long the system lets a thread compute at a stretch (slice.c)."""

from __future__ import annotations

from backend.kernels.cpu.build import library


def long_slices() -> None:
    """Long turns for the calling thread, and for those that it starts later, where the system has such: it computes as
    much, is stopped less often, and whoever waits for an event goes first."""
    compiled = library("slice")
    if compiled is not None:
        compiled.suri_long_slice()
