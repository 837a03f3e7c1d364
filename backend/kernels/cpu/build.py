"""C files of this folder, compiled with the system's compiler on first use and kept in the user's cache folder.

The library's name is a hash of source, compiler, flags and processor, so a change of any of them compiles anew. Without
a compiler there is no library, and callers use their torch twins.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sysconfig
import tempfile
from functools import cache
from pathlib import Path

FLAGS = ("-O3", "-march=native", "-shared", "-fPIC", "-std=c11", "-fno-math-errno")
TIMEOUT_S = 60

log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Where compiled libraries are kept: the user's own cache folder."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "suri" / "kernels"


@cache
def library(name: str) -> ctypes.CDLL | None:
    """The compiled `name`.c; None where that cannot be had. One answer per process."""
    compiler = _compiler()
    if compiler is None:
        log.info("no C compiler was found: loading takes the slower path; installing one (gcc or clang) helps")
        return None
    source = Path(__file__).with_name(f"{name}.c")
    try:
        return ctypes.CDLL(str(_compiled(source, compiler, cache_folder())))
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("%s could not be compiled with %s (%s): the slower path is used", source.name, compiler, error)
        return None


def _compiler() -> str | None:
    asked = os.environ.get("CC")
    names = [asked] if asked else [str(sysconfig.get_config_var("CC") or "cc").split()[0], "cc", "gcc", "clang"]
    return next((found for name in names if (found := shutil.which(name))), None)


def _compiled(source: Path, compiler: str, folder: Path) -> Path:
    """The library of a source, made unless it is there. Another process may make it at the same time: the last wins."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=TIMEOUT_S).stdout
    parts = (source.read_bytes(), version, " ".join(FLAGS).encode(), _processor())
    target = folder / f"{source.stem}-{hashlib.sha256(b'|'.join(parts)).hexdigest()[:24]}.so"
    if target.is_file():
        return target
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = Path(scratch) / target.name
        command = [compiler, *FLAGS, "-o", str(made), str(source)]
        subprocess.run(command, capture_output=True, check=True, timeout=TIMEOUT_S)
        os.replace(made, target)
    return target


def _processor() -> bytes:
    """What `-march=native` means here: machine type, and the flags where the system lists them."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
        flags = next((line for line in lines if line.startswith((b"flags", b"Features"))), b"")
    except OSError:
        flags = b""
    return platform.machine().encode() + b" " + platform.processor().encode() + b" " + flags
