"""Any open checkpoint to a Hugging Face folder: config.json, safetensors, tokenizer files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from backend.checkpoint.base import Checkpoint
from backend.checkpoint.hf import file_name
from backend.checkpoint.permute import to_half_split
from backend.convert.gguf_writer import OutTensor
from backend.convert.hf_config import config_json, scaling_of_divisors, stored_biases
from backend.convert.hf_tokenizer import token_ids, tokenizer_files
from backend.convert.output import check_space, whole_folder
from backend.convert.rows import write_rows
from backend.convert.safetensors_writer import split, write_shards
from backend.convert.side_files import TOKENIZER_FILES
from backend.convert.vocab import tokenizer_folder, vocabulary_keys
from backend.events import LoadProgress
from backend.model.config import tensor_shapes
from backend.weights.blocks import BF16, F16, F32, BlockFormat

Progress = Callable[[LoadProgress], None]
_TYPES: dict[str, BlockFormat] = {"f32": F32, "f16": F16, "bf16": BF16}


@dataclass(frozen=True)
class HFPlan:
    """What will be written: config.json, tensors by canonical name, small files, and the most bytes of a shard."""

    keys: Mapping[str, Any]
    tensors: Mapping[str, OutTensor]
    files: Mapping[str, bytes | Path]  # name -> content, or the file to copy
    max_shard: int

    @property
    def nbytes(self) -> int:
        return sum(shard.nbytes for shard in split(list(self.tensors.values()), self.max_shard))


def plan_hf(source: Checkpoint, kind: str | None, max_shard: int) -> HFPlan:
    """Decide names, types and small files from headers alone. `kind`: f32, f16, bf16, or None: as the source is."""
    config = source.config
    fmt = _TYPES[kind] if kind else _plain_format(source)
    scaling = config.rope_scaling
    if "rope_freqs" in source.tensors:
        scaling = scaling_of_divisors(source.read("rope_freqs").float32().tolist(), config) or scaling
    shapes = tensor_shapes(config)
    for n in range(config.n_layers):
        for part in sorted(stored_biases(config)):
            shapes[f"layers.{n}.{part}_bias"] = (shapes[f"layers.{n}.{part}"][0],)
    tensors = {name: OutTensor(file_name(name), shape, fmt) for name, shape in shapes.items()}
    keys = vocabulary_keys(source.tokenizer, config.vocab_size)
    ids = {{"padding": "pad"}.get(name, name): token_id for name, token_id in token_ids(keys).items()}
    return HFPlan(config_json(config, fmt.name, scaling, ids), tensors, small_files(source, keys), max_shard)


def write_hf(source: Checkpoint, plan: HFPlan, target: Path, progress: Progress) -> None:
    """Write the folder. Raises ConvertError; nothing is left behind then."""
    check_space(target, plan.nbytes)
    total, done = sum(tensor.nbytes for tensor in plan.tensors.values()), 0
    stage = f"Writing {target.name}"
    canonical = {tensor.name: name for name, tensor in plan.tensors.items()}
    config = source.config

    def report(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress(LoadProgress(stage, done, total))

    def write(file: BinaryIO, tensor: OutTensor) -> None:
        name = canonical[tensor.name]
        if name not in source.tensors:  # a bias that transformers has and this model has not
            file.write(bytes(tensor.nbytes))
            report(tensor.nbytes)
            return
        turned = name.split(".")[-1].removesuffix("_bias") in ("wq", "wk") and config.rope_interleaved
        reorder: Callable[[int, int], torch.Tensor] | None = to_half_split if turned else None
        write_rows(file, source.read(name), tensor.format, name, reorder, config.head_dim if turned else 1, report)

    progress(LoadProgress(stage, 0, total))
    with whole_folder(target) as folder:
        write_small_files(folder, plan.files)
        write_shards(folder, split(list(plan.tensors.values()), plan.max_shard), write)
        write_small_files(folder, {"config.json": (json.dumps(plan.keys, indent=2) + "\n").encode()})


def write_small_files(folder: Path, files: Mapping[str, bytes | Path]) -> None:
    for name, content in files.items():
        if isinstance(content, Path):
            shutil.copyfile(content, folder / name)
        else:
            (folder / name).write_bytes(content)


def small_files(source: Checkpoint, keys: Mapping[str, Any]) -> dict[str, bytes | Path]:
    """A folder's own Hugging Face files, else files made from the vocabulary."""
    folder = tokenizer_folder(source.tokenizer.path) if source.tokenizer.kind == "folder" else None
    if folder is not None:
        files: dict[str, bytes | Path] = {name: folder / name for name in TOKENIZER_FILES if (folder / name).is_file()}
        # Meta's ranks are no file that transformers opens; it gets what they mean.
        if keys.get("tokenizer.ggml.model") == "llama" or "tokenizer.json" in files:
            made = tokenizer_files(keys)
            return {name: made[name] for name in ("tokenizer.json", "tokenizer_config.json")} | files
    return dict(tokenizer_files(keys))


def _plain_format(source: Checkpoint) -> BlockFormat:
    """The number format of the source's matrices; where all are packed, f16 (a rounding)."""
    formats = {info.format for info in source.tensors.values() if len(info.shape) > 1}
    for fmt in (F32, BF16, F16):
        if fmt in formats:
            return fmt
    return F16
