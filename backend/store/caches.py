"""The folder of saved KV caches: one file for each model and way to run it, within a limit of bytes all together."""

from __future__ import annotations

import os
from pathlib import Path

ENDING = ".kv.safetensors"


class CacheFolder:
    """`limit`: bytes of all files. Those that were used longest ago go first."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit

    def file(self, model: str) -> Path:
        """Where the cache of a model is or would be; `model` is hexadecimal, of our own making."""
        return self.folder / f"{model[:32]}{ENDING}"

    def used(self, path: Path) -> None:
        """A file was of use just now."""
        os.utime(path)

    def make_room(self, kept: Path) -> None:
        """Delete what has waited longest until the limit is kept, and at last `kept` itself."""
        files = [path for path in self.folder.glob(f"*{ENDING}") if path.is_file()]
        oldest = sorted(files, key=lambda path: (path == kept, path.stat().st_mtime_ns))
        total = sum(path.stat().st_size for path in files)
        for path in oldest:
            if total <= self.limit:
                return
            total -= path.stat().st_size
            path.unlink(missing_ok=True)
