"""Writes safetensors files one after the other, and their index: https://github.com/huggingface/safetensors#format

All names, shapes and sizes are known beforehand, so a header is written first and the data streams behind it.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from backend.convert.gguf_writer import OutTensor

INDEX = "model.safetensors.index.json"
_DTYPES = {"F32": "F32", "F16": "F16", "BF16": "BF16", "I32": "I32"}


@dataclass(frozen=True)
class Shard:
    """One file and its tensors, in the order of their data."""

    name: str
    tensors: tuple[OutTensor, ...]

    @property
    def nbytes(self) -> int:
        return len(header(self.tensors)) + sum(tensor.nbytes for tensor in self.tensors)


def split(tensors: Sequence[OutTensor], max_bytes: int) -> list[Shard]:
    """Put tensors into files of at most `max_bytes` of data; a tensor is never split, a larger one has its own file."""
    groups: list[list[OutTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if groups[-1] and size + tensor.nbytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.nbytes
    if len(groups) == 1:
        return [Shard("model.safetensors", tuple(groups[0]))]
    count = len(groups)
    return [Shard(f"model-{i + 1:05}-of-{count:05}.safetensors", tuple(group)) for i, group in enumerate(groups)]


def write_shards(folder: Path, shards: Sequence[Shard], write: Callable[[BinaryIO, OutTensor], None]) -> None:
    """Write all files and, for more than one, the index. `write` puts a tensor's bytes, and not one byte more."""
    for shard in shards:
        with open(folder / shard.name, "wb") as file:
            file.write(header(shard.tensors))
            for tensor in shard.tensors:
                begin = file.tell()
                write(file, tensor)
                assert file.tell() - begin == tensor.nbytes, tensor.name
    if len(shards) > 1:
        total = sum(tensor.nbytes for shard in shards for tensor in shard.tensors)
        weight_map = {tensor.name: shard.name for shard in shards for tensor in shard.tensors}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def header(tensors: Sequence[OutTensor]) -> bytes:
    """Length and JSON, padded so that data starts at a multiple of eight."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor in tensors:
        end = at + tensor.nbytes
        entries[tensor.name] = {
            "dtype": _DTYPES[tensor.format.name],
            "shape": list(tensor.shape),
            "data_offsets": [at, end],
        }
        at = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
