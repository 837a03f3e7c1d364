"""Vicuna: `apply_delta`, in float16. v0 has one token more than its base, v1.1 has none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from backend.convert.gguf_writer import OutTensor
from backend.convert.output import ConvertError
from backend.convert.recover import (
    Progress,
    Sum,
    added_rows,
    folder_files,
    put_sum,
    read_folder,
    same_tensors,
    write_recovered,
)
from backend.weights.blocks import F16

VERSIONS = ("v0", "v1.1")


def recover_vicuna(base_path: Path, delta_path: Path, target: Path, version: str | None, progress: Progress) -> str:
    """tuned = base + delta, each sum rounded once to float16; rows that the base lacks are the delta's own.

    `version` None: by the shapes. Returns the version.
    """
    base, delta = read_folder(base_path), read_folder(delta_path)
    names = same_tensors(base, delta, base_path, delta_path)
    more = max((added_rows(name, base[name], delta[name]) for name in names), default=0)
    found = "v0" if more else "v1.1"
    if version is not None and version != found:
        raise ConvertError(
            f"{delta_path}: has {more} tokens more than the base, so it is a delta of {found} and not of {version}"
        )
    tensors = [OutTensor(name, delta[name].shape, F16) for name in names]
    vocabulary = next((delta[name].shape[0] for name in names if name.endswith("embed_tokens.weight")), 0)

    def rows(tensor: OutTensor, put: Any) -> None:
        put_sum(Sum(base[tensor.name], delta[tensor.name], torch.float16), tensor.shape, put)

    write_recovered(target, F16, tensors, rows, folder_files(delta_path, base_path, F16, vocabulary), progress)
    return found
