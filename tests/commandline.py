"""The commands in this process: `code = command("convert", source, target, "--type", "q8_0")`."""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
from pathlib import Path

from backend.commands.terminal import run_command
from backend.settings import PROJECT


def command(name: str, *arguments: object) -> int:
    """The exit code; what is printed goes where pytest's capsys finds it."""
    module = importlib.import_module(f"backend.commands.{name}")
    parser = argparse.ArgumentParser(prog=f"python -m backend {name}")
    module.add_arguments(parser)
    return run_command(lambda: module.run(parser.parse_args([str(argument) for argument in arguments])))


def peak_of(name: str, *arguments: object) -> tuple[int, int]:
    """(bytes resident once all is imported, most bytes resident at any time) of the command in a process of its own."""
    program = (
        "import sys\n"
        "from tests.commandline import command, resident\n"
        "import importlib; importlib.import_module('backend.commands.' + sys.argv[1])\n"
        "import torch; torch.ones(64, 64) @ torch.ones(64, 64)\n"
        "before = resident('VmRSS')\n"
        "assert command(*sys.argv[1:]) == 0\n"
        "print('memory', before, resident('VmHWM'))\n"
    )
    line = [sys.executable, "-c", program, name, *map(str, arguments)]
    done = subprocess.run(line, cwd=PROJECT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    _, before, peak = done.stdout.splitlines()[-1].split()
    return int(before), int(peak)


def resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise AssertionError(field)
