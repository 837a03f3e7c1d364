"""open_checkpoint(path): decides by what the bytes are, never by a file's name. A shape (`shape:...`) is no file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from backend.checkpoint.base import Checkpoint
from backend.checkpoint.ggml import GGMLCheckpoint
from backend.checkpoint.ggml_header import MAGICS as GGML_MAGICS
from backend.checkpoint.gguf import GGUFCheckpoint
from backend.checkpoint.gguf_header import MAGIC as GGUF_MAGIC
from backend.checkpoint.gptq_single import find_single_file, settings_from_name
from backend.checkpoint.hf import HFCheckpoint
from backend.checkpoint.hf_config import hf_config
from backend.checkpoint.meta import MetaCheckpoint
from backend.checkpoint.metaparams import meta_config
from backend.checkpoint.safetensors import is_safetensors
from backend.checkpoint.synthetic import SyntheticCheckpoint
from backend.errors import CheckpointError
from backend.model.config import ModelConfig
from backend.model.shapes import is_shape

_ZIP = b"PK\x03\x04"
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth")
KNOWN = (
    "expected a GGUF or ggml file, a folder of Meta's (.pth with params.json), or a Hugging Face folder (config.json "
    "with .safetensors or .bin)"
)


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a model. Reads headers only; raises CheckpointError with one clear sentence."""
    if is_shape(str(path)):
        return SyntheticCheckpoint(path)
    try:
        return _open_folder(path) if path.is_dir() else _open_file(path)
    except FileNotFoundError as error:
        missing = path if error.filename is None else error.filename
        raise CheckpointError(f"{missing}: there is no such file") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from None


def config_alone(path: Path) -> ModelConfig | None:
    """The configuration of a folder (or its config.json, params.json) that holds no weights; None where it has some."""
    folder = path if path.is_dir() else path.parent
    readers: dict[str, Callable[[Path], ModelConfig]] = {"params.json": meta_config, "config.json": hf_config}
    if path.is_file() and path.name in readers:
        return readers[path.name](path)
    if not path.is_dir() or _has_weights(folder) or next(folder.glob("*.gguf"), None):
        return None
    return next((read(folder) for name, read in readers.items() if (folder / name).is_file()), None)


def _open_folder(path: Path) -> Checkpoint:
    if (path / "params.json").is_file() and next(path.glob("*.pth"), None):
        return MetaCheckpoint(path)
    if (path / "config.json").is_file() and _has_weights(path):
        return HFCheckpoint(path)
    models = [file for file in sorted(path.iterdir()) if file.is_file() and _start(file) in (GGUF_MAGIC, *GGML_MAGICS)]
    whole = [file for file in models if not _later_part(file, models)]
    if len(whole) == 1:
        return _open_file(whole[0])
    if whole:
        names = ", ".join(file.name for file in whole[:8])
        raise CheckpointError(f"{path}: holds {len(whole)} models ({names}); name the one to open")
    for name in ("params.json", "config.json"):
        if (path / name).is_file():
            raise CheckpointError(f"{path}: has {name} but no weights; the download is not complete")
    if (path / "adapter_config.json").is_file():
        raise CheckpointError(f"{path}: is a LoRA adapter; open its model and give the adapter with --lora")
    raise CheckpointError(f"{path}: holds no model known here; {KNOWN}")


def _open_file(path: Path) -> Checkpoint:
    start = _start(path)
    if start == GGUF_MAGIC:
        return GGUFCheckpoint(path)
    if start in GGML_MAGICS:
        return GGMLCheckpoint(path)
    if path.name in ("config.json", "params.json"):
        return _open_folder(path.parent)
    if start == _ZIP and (path.parent / "params.json").is_file():
        return MetaCheckpoint(path)
    if start == _ZIP or is_safetensors(path):
        return HFCheckpoint(path)
    raise CheckpointError(f"{path}: starts with {start!r}, which is no model file known here; {KNOWN}")


def _has_weights(folder: Path) -> bool:
    if any(next(folder.glob(pattern), None) for pattern in _WEIGHTS):
        return True
    single = find_single_file(folder)  # beside the folder
    return single is not None and bool(settings_from_name(single.stem))


def _start(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(4)


def _later_part(file: Path, files: list[Path]) -> bool:
    """Whether this is the second or a later file of a model in several: NAME.1, NAME-00002-of-00003.gguf."""
    stem, _, number = file.name.rpartition(".")
    if number.isdigit() and file.with_name(stem) in files:
        return True
    part = file.stem.rpartition("-of-")[0].rpartition("-")[2]
    return "-of-" in file.stem and part.isdigit() and int(part) > 1
