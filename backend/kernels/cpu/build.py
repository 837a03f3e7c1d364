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
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

FLAGS = ("-O3", "-march=native", "-fPIC", "-std=gnu11", "-fno-math-errno")
# Libraries of more than the one file of their name, and what they ask of the compiler besides. No contraction of
# a * b + c in products: what is rounded is what the source says, so that one token and many get the same bits.
SOURCES = {
    "product": ("product_32.c", "product_256.c", "product.c", "retile.c", "pool.c", "slice.c"),
    "step": ("step.c", "plain.c"),
}
MORE_FLAGS = {
    "product": ("-ffp-contract=off", "-pthread"),
    "rows": ("-ffp-contract=off",),
    "quantise": ("-ffp-contract=off",),
    "step": ("-ffp-contract=fast",),
    "plain": ("-ffp-contract=fast",),
    "draw": ("-ffp-contract=off",),
}
TIMEOUT_S = 180  # seconds of one compiler; on a free machine it takes five

log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Where compiled libraries are kept: the user's own cache folder."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "suri" / "kernels"


@cache
def library(name: str) -> ctypes.CDLL | None:
    """The compiled library of a name; None where that cannot be had. One answer per process."""
    compiler = _compiler()
    if compiler is None:
        log.info("no C compiler was found: loading takes the slower path; installing one (gcc or clang) helps")
        return None
    try:
        return ctypes.CDLL(str(compiled(name, compiler, cache_folder())))
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("%s.c could not be compiled with %s (%s): the slower path is used", name, compiler, error)
        return None


def compiled_products() -> bool:
    """Whether products of packed weights run in compiled code here."""
    return library("product") is not None


def _compiler() -> str | None:
    asked = os.environ.get("CC")
    names = [asked] if asked else [str(sysconfig.get_config_var("CC") or "cc").split()[0], "cc", "gcc", "clang"]
    return next((found for name in names if (found := shutil.which(name))), None)


def compiled(name: str, compiler: str, folder: Path, flags: Sequence[str] = ()) -> Path:
    """A library, made unless it is there. Another process may make it at the same time: the last wins.

    `flags` come after the usual ones; tests ask for other processors with them. Raises OSError or SubprocessError.
    """
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=TIMEOUT_S).stdout
    here = Path(__file__).parent
    sources = [here / source for source in SOURCES.get(name, (f"{name}.c",))]
    options = (*FLAGS, *MORE_FLAGS.get(name, ()), *flags)
    parts = (*_texts(sources), version, " ".join(options).encode(), _processor())
    target = folder / f"{name}-{hashlib.sha256(b'|'.join(parts)).hexdigest()[:24]}.so"
    if target.is_file():
        return target
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        objects = [str(Path(scratch) / f"{source.stem}.o") for source in sources]
        commands = [[compiler, *options, "-c", "-o", out, str(source)] for out, source in zip(objects, sources)]
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # waits only; the compilers are processes
            list(pool.map(_run, commands))
        made = Path(scratch) / target.name
        _run([compiler, *options, "-shared", "-o", str(made), *objects, "-lm"])
        os.replace(made, target)
    return target


def _texts(sources: Sequence[Path]) -> list[bytes]:
    """Sources and all files of ours that they include."""
    texts: dict[Path, bytes] = {}
    left = list(sources)
    while left:
        path = left.pop()
        if path not in texts:
            texts[path] = path.read_bytes()
            left += [path.with_name(name.decode()) for name in re.findall(rb'#include "([^"]+)"', texts[path])]
    return [texts[path] for path in sorted(texts)]


def _run(command: Sequence[str]) -> None:
    subprocess.run(command, capture_output=True, check=True, timeout=TIMEOUT_S)


def _processor() -> bytes:
    """What `-march=native` means here: machine type, and the flags where the system lists them."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
        flags = next((line for line in lines if line.startswith((b"flags", b"Features"))), b"")
    except OSError:
        flags = b""
    return platform.machine().encode() + b" " + platform.processor().encode() + b" " + flags
