"""What all commands share on a terminal: progress bars, and errors as one line with exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Callable

from tqdm import tqdm

from backend.errors import UserError
from backend.events import LoadProgress


class ProgressBar:
    """Shows LoadProgress on stderr: one bar per stage. Silent where stderr is no terminal, but for a line per stage."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None  # type: ignore[type-arg]
        self._stage = ""

    def __call__(self, step: LoadProgress) -> None:
        if step.stage != self._stage:
            self.close()
            self._stage = step.stage
            if not sys.stderr.isatty():
                print(step.stage, file=sys.stderr, flush=True)
        if not sys.stderr.isatty() or not step.total:
            return
        if self._bar is None:
            self._bar = tqdm(total=step.total, desc=step.stage, unit=step.unit, unit_scale=True, unit_divisor=1000)
        bar = self._bar
        bar.update(step.done - bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar, self._stage = None, ""


def run_command(command: Callable[[], int]) -> int:
    """Run a command's main function; a UserError becomes one line and exit code 2."""
    try:
        return command()
    except UserError as error:
        print(f"suri: {error.message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output went away, e.g. `| head`
        sys.stderr.close()
        return 1
