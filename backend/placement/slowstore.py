"""The file as a store of weights: parts are read and converted by one thread of its own, a little ahead of their use.

So a model may be larger than memory: what is alive is the ring, and the pages of the file that are just being read.
What is multiplied where the file is mapped is read again then, so the file is looked at once more before its use.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from backend.errors import CheckpointError
from backend.weights.linear import Linear


class FileMover:
    """`read`: a part by its number, in the form it is multiplied in. Called on the reading thread, one at a time.
    `check`: raises where the file is no longer what was mapped. Called on the computing thread."""

    def __init__(self, read: Callable[[int], Linear], check: Callable[[], None] = lambda: None) -> None:
        self._read, self._check = read, check
        self._slots: dict[int, Future[Linear]] = {}
        # Half of the cores convert while all compute: with all for both, they wait for each other. Measured on two.
        threads = max(1, torch.get_num_threads() // 2)
        self._reader = ThreadPoolExecutor(1, "weights reader", torch.set_num_threads, (threads,))

    def fetch(self, part: int, slot: int) -> None:
        self._slots[slot] = self._reader.submit(self._read, part)

    def arrived(self, part: int, slot: int) -> Linear:
        linear = self._slots[slot].result()
        self._check()  # it may have been in the ring for hours, while nobody asked
        return linear

    def used(self, slot: int) -> None:
        # What is being read this moment is read to its end, and freed then; parts behind it wait for that.
        self._slots.pop(slot).cancel()

    def close(self) -> None:
        self._slots.clear()
        self._reader.shutdown(wait=True, cancel_futures=True)
        self._read = _closed


class WholeFiles:
    """Files as they were when they were opened: reading a mapped file beyond its end would end the whole process."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._found = [(path, os.stat(path)) for path in paths]

    def check(self) -> None:
        """Raise CheckpointError where a file was cut off in place. One that was replaced or removed is still mapped."""
        for path, found in self._found:
            try:
                now = os.stat(path)
            except OSError:
                continue
            if (now.st_dev, now.st_ino) == (found.st_dev, found.st_ino) and now.st_size < found.st_size:
                raise CheckpointError(
                    f"{path}: had {found.st_size} bytes when the model was loaded and has {now.st_size} now; its "
                    "weights are read while it answers, so the file must stay as it is"
                )


def _closed(part: int) -> Linear:
    raise AssertionError(f"part {part} is asked for after the store was closed")
