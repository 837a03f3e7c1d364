"""Which files of a Hugging Face folder hold the weights, and all their tensors as one table.

Looked for in this order, the first that is there counts: model.safetensors, its index, any other *.safetensors;
pytorch_model.bin, its index, any other *.bin, *.pt. What a file is, is decided by its bytes. Files that hold
no weights (optimizer state, training arguments) are never opened.
"""

from __future__ import annotations

import re
from pathlib import Path

from backend.checkpoint.container import RawTensors
from backend.checkpoint.gptq_single import find_single_file, settings_from_name
from backend.checkpoint.safetensors import is_safetensors, read_safetensors
from backend.checkpoint.strictjson import read_json
from backend.checkpoint.torchzip import read_torch_zip
from backend.errors import CheckpointError

# Whole file, index; then patterns of last resort.
_STORES = (
    ("model.safetensors", "model.safetensors.index.json", ("*.safetensors",)),
    ("pytorch_model.bin", "pytorch_model.bin.index.json", ("pytorch_model*.bin", "*.bin", "*.pt")),
)
_NO_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state|random_states|adapter_model)\b.*", re.I)
_SHARD = re.compile(r"(.+)-(\d{1,6})-of-(\d{1,6})(\.\w+)")
_ZIP = b"PK\x03\x04"
MAX_SHARDS = 4096


def weight_files(path: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The weight files of a folder, or those that belong with one file; and what an index says: tensor -> file name.

    Raises CheckpointError when there are none or when one is missing.
    """
    if not path.is_dir():
        return _with_siblings(path), None
    for whole, index, patterns in _STORES:
        if (path / whole).is_file():
            return [path / whole], None
        if (path / index).is_file():
            weight_map = _weight_map(path / index)
            return [path / name for name in sorted(set(weight_map.values()))], weight_map
        for pattern in patterns:
            found = sorted(file for file in path.glob(pattern) if file.is_file() and not _NO_WEIGHTS.match(file.name))
            # Several files that are no set of shards: GPTQ in several group sizes. One of them is the model.
            if len(found) > 1 and not any(map(_SHARD.fullmatch, (file.name for file in found))):
                single = find_single_file(path)
                if single is not None and settings_from_name(single.stem):
                    return [single], None
            if found:
                return _complete(found), None
    single = find_single_file(path)  # models/NAME with its weights beside it: models/NAME-4bit-128g.safetensors
    if single is not None and settings_from_name(single.stem):
        return [single], None
    raise CheckpointError(
        f"{path}: holds no weights; expected model.safetensors, pytorch_model.bin, or shards of one with their index"
    )


def read_all(files: list[Path], weight_map: dict[str, str] | None) -> RawTensors:
    """The tensors of all files. A name that is in two files is an error, and so is one the index puts elsewhere."""
    tensors: RawTensors = {}
    for file in files:
        try:
            found = _read(file)
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be read ({error.strerror or error})") from None
        for name, tensor in found.items():
            if name in tensors:
                raise CheckpointError(f"{file}: tensor '{name}' is also in {tensors[name].file.name}")
            tensors[name] = tensor
    for name, file_name in (weight_map or {}).items():
        if name not in tensors or tensors[name].file.name != file_name:
            raise CheckpointError(
                f"{files[0].parent}: the index says that tensor '{name}' is in {file_name}, but it is not there"
            )
    return tensors


def _read(file: Path) -> RawTensors:
    """By content. A file that begins like neither kind goes to the reader its name suggests, for its sentence."""
    if not file.is_file():  # a pipe would wait for ever
        raise CheckpointError(f"{file}: there is no such file")
    with open(file, "rb") as opened:
        start = opened.read(len(_ZIP))
    if start != _ZIP and (is_safetensors(file) or file.suffix == ".safetensors"):
        return read_safetensors(file)
    return read_torch_zip(file)


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map is missing or no object with entries")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not _plain_file_name(name):
            raise CheckpointError(
                f"{index}: tensor '{tensor[:100]}' is said to be in {str(name)[:100]!r}, which is no plain file name"
            )
    names = sorted(set(weight_map.values()))
    if len(names) > MAX_SHARDS:
        raise CheckpointError(f"{index}: names {len(names)} files, at most {MAX_SHARDS} can be right")
    for name in names:
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index.parent / name}: is missing; {index.name} names it, download it again")
    return weight_map


def _plain_file_name(name: str) -> bool:
    return 0 < len(name) <= 255 and name.isprintable() and not set(name) & set("/\\:") and name not in (".", "..")


def _with_siblings(file: Path) -> list[Path]:
    """The file, or all shards of the set it belongs to by its number."""
    shard = _SHARD.fullmatch(file.name)
    if shard is None:
        return [file]
    stem, _, count, suffix = shard.groups()
    others = (other for other in file.parent.iterdir() if (found := _SHARD.fullmatch(other.name)) and other.is_file()
              and (found[1], found[3], found[4]) == (stem, count, suffix))  # fmt: skip
    return _complete(sorted(others))


def _complete(files: list[Path]) -> list[Path]:
    """Files without an index: the one numbered set when there is one (which must be whole), else all of them."""
    numbered = {file: found for file in files if (found := _SHARD.fullmatch(file.name))}
    if not numbered:
        return files
    sets = {(found[1], found[3]) for found in numbered.values()}
    folder = files[0].parent
    if len(sets) > 1:
        names = ", ".join(sorted(f"{stem}-*-of-{count}" for stem, count in sets))
        raise CheckpointError(f"{folder}: holds several sets of shards ({names[:200]}); point at a file of one of them")
    wanted = int(next(iter(sets))[1])
    numbers = {int(found[2]) for found in numbered.values()}
    if wanted > MAX_SHARDS or (missing := sorted(set(range(1, wanted + 1)) - numbers)):
        what = f"shard {missing[0]} of {wanted}" if wanted <= MAX_SHARDS else f"most of {wanted} shards"
        raise CheckpointError(f"{folder}: {what} is missing ({next(iter(numbered)).name} is there); download it again")
    return list(numbered)
