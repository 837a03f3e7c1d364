"""The compiled kernels, built with sanitizers, on every format and on whole steps (sanitized.py)."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from backend.kernels.cpu import build

HERE = Path(__file__).parent
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")


def test_no_kernel_reads_or_writes_beside_its_arrays(tiny_path: Callable[..., Path], tmp_path: Path) -> None:
    compiler = build._compiler()
    if compiler is None:
        pytest.skip("not run: there is no C compiler here")
    found = subprocess.run([compiler, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    runtime = Path(found.stdout.strip())
    if not runtime.is_absolute():
        pytest.skip("not run: this compiler has no address sanitizer")
    first = tiny_path(weights="Q4_1", formats={"token_embd.weight": "Q8_0"}).rename(tmp_path / "first.gguf")
    second = tiny_path(weights="Q8_0", tied=False, formats={"output.weight": "BF16"}).rename(tmp_path / "second.gguf")
    environment = {
        **os.environ,
        "LD_PRELOAD": str(runtime),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python keeps much to its end
        "XDG_CACHE_HOME": str(tmp_path),
        "PYTHONPATH": os.pathsep.join((str(HERE.parent), str(HERE))),
    }
    ended = subprocess.run(
        [sys.executable, str(HERE / "sanitized.py"), f"{first}:{second}", *SANITIZERS],
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
    )
    assert (ended.returncode, ended.stdout) == (0, "clean\n"), ended.stderr[-3000:]
