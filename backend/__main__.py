"""python -m backend <command>: the engine without the page."""

from __future__ import annotations

import argparse
import sys

from backend.commands import bench, convert, generate, inspect, perplexity, plan, recover, verify
from backend.commands.terminal import run_command

COMMANDS = {
    "generate": generate,
    "inspect": inspect,
    "plan": plan,
    "bench": bench,
    "perplexity": perplexity,
    "convert": convert,
    "recover": recover,
    "verify": verify,
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m backend", description=__doc__)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        module.add_arguments(subparsers.add_parser(name, help=module.HELP, description=module.HELP))
    arguments = parser.parse_args()
    return COMMANDS[arguments.command].run(arguments)


if __name__ == "__main__":
    sys.exit(run_command(main))
