"""Watches a process that opens hostile files: what Python is about to do (audit events), time, memory, how it ends.

Nothing but the standard library is imported here, so that the guard's own test is quick.
"""

from __future__ import annotations

import faulthandler
import os
import re
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CPU_SECONDS = 2.0  # for one file; processor time, because the machine may be busy
ADDRESS_SPACE = 2 << 30  # bytes a process may map beyond what it has when the watch begins
RESIDENT = 256 << 20  # bytes the resident size may grow by, over all files of a process together

_RUNS_CODE = (
    "subprocess.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.startfile", "pty.", "ctypes.",
    "code.", "marshal.", "pickle.", "import", "sys.addaudithook", "sys.settrace", "sys.setprofile", "cpython.run",
)  # fmt: skip
_REACHES_OUT = (
    "socket.", "urllib.", "http.", "ftplib.", "webbrowser.", "os.remove", "os.rename", "os.rmdir", "os.mkdir",
    "os.link",
    "os.symlink", "os.truncate", "os.chmod", "os.chown", "os.putenv", "os.unsetenv", "os.kill", "shutil.",
    "tempfile.", "sqlite3.",
)  # fmt: skip
_FORBIDDEN = _RUNS_CODE + _REACHES_OUT
_TEMPLATES = ("<template>", "<unknown>")
_JINJAS = re.compile(rb"\n*raise __jinja_exception__|[0-9][0-9.eE+-]*")  # jinja2/debug.py, jinja2/lexer.py
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Forbidden(BaseException):
    """Raised in place of what was about to happen."""


class Guard:
    """`folder`: the only place files may be read from while a case runs. `progress`: open for writing; holds the case.

    Install once in a process, after everything that is needed has been imported.
    """

    def __init__(self, folder: Path, progress: int, seconds: float = CPU_SECONDS) -> None:
        self._folder, self._progress, self._seconds = str(folder.resolve()), progress, seconds
        self._armed = False
        self.broken: list[str] = []  # what the case did that it may not
        faulthandler.enable()
        faulthandler.register(signal.SIGPROF, all_threads=True, chain=True)  # says where it hangs, then dies of it
        sys.addaudithook(self._hook)
        self._resident, self._told = peak(), False
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + ADDRESS_SPACE, mapped + ADDRESS_SPACE))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    @contextmanager
    def case(self, number: int) -> Iterator[None]:
        """Runs the body watched. Whoever finds the process dead finds the number in the progress file."""
        os.pwrite(self._progress, b"%10d" % number, 0)
        self.broken.clear()
        signal.setitimer(signal.ITIMER_PROF, self._seconds)
        self._armed = True
        try:
            yield
        finally:
            self._armed = False
            signal.setitimer(signal.ITIMER_PROF, 0)
            if (grown := self.grown()) > RESIDENT and not self._told:
                self._told = True
                self.broken.append(f"the resident size has grown by {grown} bytes, at most {RESIDENT} are allowed")

    def grown(self) -> int:
        """Bytes by which the largest resident size has grown since the watch began."""
        return peak() - self._resident

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._armed:
            return
        if event == "open":
            said = self._open(*arguments[:3])
        elif event in ("exec", "compile", "code.__new__"):
            said = _code(event, arguments)
        else:
            said = f"{event} {str(arguments)[:200]}" if event.startswith(_FORBIDDEN) else None
        if said is not None:
            self._armed = False  # formatting what follows may import and open
            self.broken.append(said)
            raise Forbidden(said)

    def _open(self, path: Any, mode: str | None, flags: int) -> str | None:
        if flags & _WRITES or (mode and set(mode) & set("wax+")):
            return f"opens {path!r} for writing"
        if isinstance(path, int) or path in _TEMPLATES:  # Python looks there for the line of a syntax error
            return None
        inside = os.path.abspath(os.fsdecode(path))
        return None if inside == self._folder or inside.startswith(self._folder + os.sep) else f"opens {path!r}"


def _code(event: str, arguments: tuple[Any, ...]) -> str | None:
    """Jinja compiles a template to Python of its own making, which its sandbox watches; nothing else may.

    It also compiles numbers that a template writes and, at an error, one line to have the template's in the traceback.
    """
    name = arguments[0].co_filename if event == "exec" else arguments[1]
    if name not in _TEMPLATES or (event == "compile" and name == "<unknown>" and not _JINJAS.fullmatch(arguments[0])):
        return f"{event} of code from {name!r}"
    return None


def peak() -> int:
    """Bytes that were resident at most. (getrusage would count what the parent had before this process was begun.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
