"""Named tensors of one file, whatever the container: what safetensors files and torch zips have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch


def _nothing() -> None:
    """Keeping pages is always allowed."""


@dataclass(frozen=True)
class RawTensor:
    """One tensor of a container. Shape, stride and extent were checked against the file when it was opened."""

    name: str  # as in the file
    shape: tuple[int, ...]  # () for a scalar
    dtype: torch.dtype
    nbytes: int  # elements * bytes per element
    file: Path
    view: Callable[[], torch.Tensor]  # the values, of `shape` and `dtype`: a view of the mapped file where possible
    release: Callable[[], None] = _nothing  # give the pages back


# name -> tensor, of one file or of all files of a sharded checkpoint
RawTensors = dict[str, RawTensor]
