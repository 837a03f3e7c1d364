"""Files of the store are replaced whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from backend.errors import UserError


def replace_text(path: Path, text: str) -> None:
    """Write a file beside the old one, to the disk, and put it in its place. Raises UserError."""
    part = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        if part is not None:
            Path(part).unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None
