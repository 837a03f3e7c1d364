"""Stanford Alpaca: `weight_diff.py recover`, in float32, with its sum over all weights as the check."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from backend.convert.gguf_writer import OutTensor
from backend.convert.output import ConvertError
from backend.convert.recover import (
    TABLES,
    Progress,
    Sum,
    added_rows,
    folder_files,
    put_sum,
    read_folder,
    same_tensors,
    write_recovered,
)
from backend.weights.blocks import F32

PUBLISHED_SUM = 50637.1836  # of Alpaca 7B, as weight_diff.py checks it
SUM_TOLERANCE = 1e-2


def recover_alpaca(
    base_path: Path, diff_path: Path, target: Path, expected_sum: float | None, progress: Progress
) -> float:
    """tuned = base + diff in float32. A token that the base lacks starts as the mean of all its rows.

    Returns the sum over all tensors. With `expected_sum`, another sum than that is an error and nothing is written.
    """
    base, diff = read_folder(base_path), read_folder(diff_path)
    names = same_tensors(base, diff, base_path, diff_path)
    more = {name: added_rows(name, base[name], diff[name]) for name in names}
    tensors = [OutTensor(name, diff[name].shape, F32) for name in names]
    vocabulary = next((diff[name].shape[0] for name in names if name.endswith("embed_tokens.weight")), 0)
    total = torch.zeros(())

    def rows(tensor: OutTensor, put: Any) -> None:
        nonlocal total
        one, other = base[tensor.name], diff[tensor.name]
        # The mean as the original takes it, over the whole float32 table: another order of adding gives other bits.
        filling = one.view().float().mean(dim=0) if more[tensor.name] else None
        found = Sum(one, other, torch.float32, filling)
        if expected_sum is None:
            put_sum(found, tensor.shape, put)
            return
        whole = torch.empty(tensor.shape)  # the sum in float32 depends on the order of adding, so add as the original
        at = 0

        def keep(values: torch.Tensor) -> None:
            nonlocal at
            whole[at : at + len(values)] = values
            at += len(values)
            put(values)

        put_sum(found, tensor.shape, keep)
        total = total + whole.sum()

    def check() -> None:
        if expected_sum is None:
            return
        # transformers kept the rotary tables among the weights then; whether they were in the published sum depends
        # on its version, so both are right.
        tables = sum(float(diff[n].view().float().sum() + base[n].view().float().sum())
                     for n in diff if TABLES.fullmatch(n) and n in base)  # fmt: skip
        if all(abs(found - expected_sum) > SUM_TOLERANCE for found in (float(total), float(total) + tables)):
            raise ConvertError(
                f"{diff_path}: all weights together sum up to {float(total):.4f}, expected {expected_sum:.4f}; "
                "the base or the diff is damaged or not the right one"
            )

    files = folder_files(diff_path, base_path, F32, vocabulary)
    write_recovered(target, F32, tensors, rows, files, progress, check)
    return float(total)
