"""Files of the store are replaced whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from backend.errors import UserError


def replace_text(path: Path, text: str) -> None:
    """Write a file beside the old one, to the disk, and put it in its place. Raises UserError."""
    with replacing(path) as file:
        file.write(text.encode())


@contextmanager
def replacing(path: Path, *, to_disk: bool = True) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` when the block ends well; else nothing stays of it.

    Only its owner may read it. to_disk: it is there even if power fails a moment later; without, that may damage it:
    for what can be done without and is checked when it is read. Raises UserError where it cannot be written.
    """
    part = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-")
        part = Path(name)
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            if to_disk:
                os.fsync(file.fileno())
        os.replace(part, path)
        part = None
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        if part is not None:
            part.unlink(missing_ok=True)
