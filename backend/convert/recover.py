"""What all recoverers share: base + diff, tensor by tensor, into a Hugging Face folder."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch

from backend.checkpoint.container import RawTensor, RawTensors
from backend.checkpoint.hf_files import read_all, weight_files
from backend.checkpoint.strictjson import read_json
from backend.convert.gguf_writer import OutTensor
from backend.convert.output import ConvertError, check_space, whole_folder
from backend.convert.rows import magnitude, pieces
from backend.convert.safetensors_writer import split, write_shards
from backend.convert.side_files import TOKENIZER_FILES
from backend.convert.to_hf import write_small_files
from backend.events import LoadProgress
from backend.weights.blocks import BlockFormat
from backend.weights.stored import PLAIN_DTYPES

Progress = Callable[[LoadProgress], None]
MAX_SHARD = 5 * 10**9
_TORCH_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# What old versions of transformers saved beside the weights: tables that follow from the config.
TABLES = re.compile(r"(.*\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached)")
_VOCABULARY = ("embed_tokens.weight", "lm_head.weight")


def read_folder(path: Path) -> RawTensors:
    """The named tensors of a Hugging Face folder, safetensors or old torch files, whole or sharded."""
    if not path.is_dir():
        raise ConvertError(f"{path}: is no folder; expected one with config.json and weights")
    files, weight_map = weight_files(path)
    tensors = read_all(files, weight_map)
    for name, tensor in tensors.items():
        if tensor.dtype not in PLAIN_DTYPES.values() and not TABLES.fullmatch(name):
            raise ConvertError(f"{tensor.file}: tensor '{name}' holds {tensor.dtype}, expected float numbers")
    return tensors


def same_tensors(base: RawTensors, diff: RawTensors, base_path: Path, diff_path: Path) -> list[str]:
    """The names of all weights, in the diff's order: the same ones in both. Raises ConvertError."""
    names = [name for name in diff if not TABLES.fullmatch(name)]
    for name in names:
        if name not in base:
            raise ConvertError(f"{base_path}: tensor '{name}' is missing; the diff has it, so this is not its base")
    for name in base:
        if name not in diff and not TABLES.fullmatch(name):
            raise ConvertError(f"{diff_path}: tensor '{name}' is missing; the base has it")
    return names


def added_rows(name: str, base: RawTensor, diff: RawTensor) -> int:
    """How many rows the diff has more than the base: only of the vocabulary's tables; all else must be equal."""
    if base.shape == diff.shape:
        return 0
    more = diff.shape[0] - base.shape[0] if len(diff.shape) == len(base.shape) == 2 else -1
    if name.endswith(_VOCABULARY) and more > 0 and base.shape[1] == diff.shape[1]:
        return more
    raise ConvertError(f"tensor '{name}' has shape {base.shape} in the base and {diff.shape} in the diff")


class Sum:
    """Rows of base + diff in one number type, each sum rounded once. Rows the base lacks are `filling`, or zero."""

    def __init__(self, base: RawTensor, diff: RawTensor, dtype: torch.dtype, filling: torch.Tensor | None = None):
        self._base, self._diff, self._dtype, self._filling = base, diff, dtype, filling

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Of `dtype`, (stop - start, columns); a vector whole."""
        diff = self._diff.view()
        if diff.ndim == 1:
            return self._base.view().to(self._dtype) + diff.to(self._dtype)
        known = max(0, min(stop, self._base.shape[0]) - start)
        out = diff[start:stop].to(self._dtype, copy=True)
        if known:
            out[:known] += self._base.view()[start : start + known].to(self._dtype)
        if known < stop - start and self._filling is not None:
            out[known:] += self._filling
        return out

    def release(self) -> None:
        self._base.release()
        self._diff.release()


def write_recovered(
    target: Path,
    fmt: BlockFormat,
    tensors: Sequence[OutTensor],
    rows: Callable[[OutTensor, Callable[[torch.Tensor], None]], None],
    small_files: Mapping[str, bytes | Path],
    progress: Progress,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Write the folder. `rows(tensor, put)` gives the tensor's values piece by piece; `check` may refuse the result."""
    shards = split(tensors, MAX_SHARD)
    check_space(target, sum(shard.nbytes for shard in shards))
    total, done = sum(tensor.nbytes for tensor in tensors), 0
    stage = f"Recovering {target.name}"

    def write(file: BinaryIO, tensor: OutTensor) -> None:
        def put(values: torch.Tensor) -> None:
            nonlocal done
            if not math.isfinite(magnitude(values)):
                raise ConvertError(f"tensor '{tensor.name}' of the sum is not finite: base and diff do not fit")
            data = values.to(PLAIN_DTYPES[fmt]).contiguous().view(torch.uint8).numpy()
            file.write(memoryview(data).cast("B"))
            done += data.nbytes
            progress(LoadProgress(stage, done, total))

        rows(tensor, put)

    progress(LoadProgress(stage, 0, total))
    with whole_folder(target) as folder:
        write_small_files(folder, small_files)
        write_shards(folder, shards, write)
        check()


def put_sum(found: Sum, shape: tuple[int, ...], put: Callable[[torch.Tensor], None]) -> None:
    """All rows of a sum, a few at a time."""
    for start, stop in pieces(shape):
        put(found.rows(start, stop))
        found.release()


def folder_files(folder: Path, config_folder: Path, fmt: BlockFormat, vocabulary: int) -> dict[str, bytes | Path]:
    """Tokenizer and generation settings of a folder, and its config.json with the right number type and size.

    `config_folder`: where config.json comes from if `folder` has none.
    """
    names = (*TOKENIZER_FILES, "generation_config.json")
    files: dict[str, bytes | Path] = {name: folder / name for name in names if (folder / name).is_file()}
    source = folder if (folder / "config.json").is_file() else config_folder
    values: dict[str, Any] = dict(read_json(source / "config.json"))
    values |= {"torch_dtype": _TORCH_NAMES[fmt.name], "vocab_size": vocabulary}
    for name in ("auto_map", "_name_or_path"):
        values.pop(name, None)
    return files | {"config.json": (json.dumps(values, indent=2) + "\n").encode()}
