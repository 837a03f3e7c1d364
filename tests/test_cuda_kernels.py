"""The Triton kernels, on machines without a GPU: computed by Triton's interpreter, and compiled for real devices.

Both run in processes of their own: the interpreter is asked for before Triton is imported, and compiling puts a device
in front of Triton that is not there.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from backend.kernels.cuda import available, products

ROOT = Path(__file__).resolve().parent.parent
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def run(*arguments: str, **environment: str) -> str:
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        env=kept | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@needs_triton
def test_every_kernel_agrees_with_torch_in_the_interpreter():
    out = run("pytest", "tests/kernel_cases.py", "-v", "-p", "no:cacheprovider", TRITON_INTERPRET="1")
    assert " passed" in out
    assert " skipped" not in out


@needs_triton
def test_every_kernel_compiles_for_a_gpu():
    lines = run("tests.kernel_compile", "80").splitlines()
    shared = {name: int(size) for _, name, size in map(str.split, lines)}
    kernels = set()
    for file in (ROOT / "backend" / "kernels" / "cuda").glob("*.py"):
        source = file.read_text(encoding="utf-8")
        names = {piece.split("def ")[1].split("(")[0] for piece in source.split("@triton.jit")[1:]}
        kernels |= {name for name in names if f"{name}[" in source}  # the others are parts of those that are launched
    assert set(shared) == kernels, "every kernel is tried"
    # What one program may have on the smallest consumer device with bfloat16 units (RTX 30, compute capability 8.6).
    assert max(shared.values()) <= 99 << 10, shared


def test_without_cuda_there_are_no_kernels_and_torch_does_it(monkeypatch):
    available.kernels.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    try:
        x, codes, scale = torch.randn(1, 64), torch.zeros(4, 64, dtype=torch.int8), torch.ones(4)
        assert available.kernels() is None
        assert products.rows(x, torch.randn(4, 64)) is None
        assert products.int8(x, codes, scale) is None
        assert products.llm_int8(x, codes, scale, 6.0) is None
        assert products.grouped4(x, codes[:, :32], scale[:, None], scale[:, None]) is None
        assert products.looked_up4(x, codes[:, :32], scale[:, None], torch.zeros(16)) is None
    finally:
        available.kernels.cache_clear()


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        ("missing", "Triton is not installed"),
        ("compiler", "Triton does not work on this machine (RuntimeError: no C compiler)"),
        ("wrong", "Triton's skinny is wrong on this machine"),
    ],
)
def test_what_is_wrong_with_triton_is_said_and_torch_does_it(monkeypatch, caplog, broken, words):
    def load() -> object:
        if broken == "compiler":
            raise RuntimeError("no C compiler")
        return object()

    available.kernels.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if broken == "missing" else name)
    monkeypatch.setattr(available, "load", load)
    monkeypatch.setattr(available, "_wrong", lambda loaded, device: "skinny" if broken == "wrong" else None)
    try:
        assert available.kernels() is None
        assert words in caplog.text
        assert len(caplog.records) == 1
    finally:
        available.kernels.cache_clear()
