"""Compiled code as other processors would run it: the same source with instructions taken away."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable
from pathlib import Path

import pytest

from backend.kernels.cpu import build

X86 = platform.machine() in ("x86_64", "AMD64")
# What the compiler may use: all that is here, no AVX-512, nothing beyond the oldest processors of 64 bits.
VARIANTS = {"native": (), "avx2": ("-mno-avx512f",), "plain": ("-march=x86-64",)} if X86 else {"native": ()}
WITHOUT = "no compiler"
Use = Callable[[str], None]


def choose(monkeypatch: pytest.MonkeyPatch, module: object, library: str, variant: str, folder: Path) -> None:
    """Let `module._functions` be the library compiled in this way, or None for WITHOUT. Skips where it cannot be."""
    if variant == WITHOUT:
        monkeypatch.setattr(module, "_functions", lambda: None)
        return
    compiler = build._compiler()
    if compiler is None:
        pytest.skip("not run: there is no C compiler here")
    path = build.compiled(library, compiler, folder, VARIANTS[variant])
    loaded = module.with_types(ctypes.CDLL(str(path)))  # type: ignore[attr-defined]
    monkeypatch.setattr(module, "_functions", lambda: loaded)
