"""open_checkpoint(path): decides by what the bytes are, never by the file's name."""

from __future__ import annotations

from pathlib import Path

from backend.checkpoint.base import Checkpoint
from backend.checkpoint.gguf import MAGIC, GGUFCheckpoint
from backend.errors import CheckpointError


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a model. Reads headers only; raises CheckpointError with one clear sentence."""
    try:
        if path.is_dir():
            raise CheckpointError(f"{path}: is a folder; this version opens single GGUF files")
        with open(path, "rb") as file:
            start = file.read(4)
        if start == MAGIC:
            return GGUFCheckpoint(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no such file") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from None
    raise CheckpointError(f"{path}: starts with {start!r}, which is no model file known here; expected a GGUF file")
