"""Files and folders that are only called by their final name once they are whole: a temporary name beside the target,
flushed to the disk, renamed at the end; removed when anything goes wrong, Ctrl+C included."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from backend.errors import UserError

SPARE_BYTES = 1 << 20  # for what the sum of sizes does not count: the file system's own tables
# What a conversion writes its weights to; leftovers of an earlier one would be read together with the new files.
_WEIGHTS = re.compile(
    r"model(-[0-9]{5}-of-[0-9]{5})?\.safetensors|model\.safetensors\.index\.json|quantize_config\.json"
)


class ConvertError(UserError):
    """A conversion that cannot be done as asked."""

    code = "convert_failed"


def check_target(target: Path, sources: Iterable[Path], force: bool) -> None:
    """The target may be written: it is not there yet (or `force`), and no source would be harmed by it.

    `sources`: every file and folder that is read.
    """
    target = target.absolute()
    real = target.resolve()
    for source in sources:
        other = source.resolve()
        if real == other:
            raise ConvertError(f"{target}: is the model that is read; give another name")
        if other.is_dir() and other in real.parents:
            raise ConvertError(f"{target}: lies inside {source}, which is read; write somewhere else")
        if real in other.parents:
            raise ConvertError(f"{target}: holds {source}, which is read; write somewhere else")
    if target.is_dir() and not any(target.iterdir()):
        return
    if target.exists() and not force:
        raise ConvertError(f"{target}: is already there; --force writes over it")
    if not target.parent.is_dir():
        raise ConvertError(f"{target}: the folder {target.parent} is not there")


def check_space(target: Path, nbytes: int) -> None:
    """The disk has room for `nbytes` more."""
    free = shutil.disk_usage(target.absolute().parent).free
    if free < nbytes + SPARE_BYTES:
        raise ConvertError(f"{target}: needs {nbytes / 1e9:.2f} GB, but the disk has only {free / 1e9:.2f} GB free")


@contextmanager
def whole_file(target: Path) -> Iterator[BinaryIO]:
    """Write to the file this gives; it becomes `target` when the block ends well."""
    target = target.absolute()
    if target.is_dir():
        raise ConvertError(f"{target}: is a folder, expected the name of a file")
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent)
    partial = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        _usual_permissions(partial)
        os.replace(partial, target)
    except OSError as error:
        raise ConvertError(f"{target}: cannot be written ({error.strerror or error})") from error
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Write files into the folder this gives; they become `target`'s when the block ends well.

    Other files of an existing `target` stay, but for weights of an earlier conversion.
    """
    target = target.absolute()
    if target.exists() and not target.is_dir():
        raise ConvertError(f"{target}: is a file, expected the name of a folder")
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    try:
        yield partial
        names = sorted(entry.name for entry in partial.iterdir())
        for name in names:
            with open(partial / name, "rb") as file:
                os.fsync(file.fileno())
            _usual_permissions(partial / name)
        target.mkdir(exist_ok=True)
        for entry in sorted(target.iterdir()):
            if _WEIGHTS.fullmatch(entry.name) and entry.name not in names:
                entry.unlink()
        for name in names:
            os.replace(partial / name, target / name)
    except OSError as error:
        raise ConvertError(f"{target}: cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _usual_permissions(path: Path) -> None:
    """A temporary file is for its owner alone; give it what any new file gets."""
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(path, 0o666 & ~mask)
