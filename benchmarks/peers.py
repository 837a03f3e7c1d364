"""Programs to compare with, each in a virtual environment of its own beside the user's cache, installed once by pip."""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
from pathlib import Path

from backend.kernels.cpu.build import cache_folder

LLAMA_CPP_PYTHON = "llama-cpp-python==0.3.36"  # compiled for this very machine by pip: some minutes
XLLAMACPP = "xllamacpp==2026.10.11549"  # a wheel with llama.cpp's server


def python_with(package: str) -> Path:
    """The Python of an environment that has the package, NAME==VERSION. Raises RuntimeError where it cannot be had."""
    folder = cache_folder().parent / "peers" / package.replace("==", "-")
    python, stamp = folder / "bin" / "python", folder / "installed"
    if not stamp.is_file():
        print(f"installing {package} (once) ...", file=sys.stderr, flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder, with_pip=True)
        done = subprocess.run(
            [python, "-m", "pip", "install", "--quiet", "--upgrade", "pip", package], capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"{package} could not be installed: {done.stderr.strip()[-2000:]}")
        stamp.touch()
    return python
