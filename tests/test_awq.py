"""AWQ gemm layers decode to what a plain float64 loop says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from backend.checkpoint.quantized import quantized_tensors
from backend.errors import CheckpointError
from tests.gptqfiles import awq_layer, awq_words, gptq_layer, quantise
from tests.test_gptq import PATH, UP, check, config, matrix, raw_tensors

SETTINGS = {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "GEMM"}


@pytest.mark.parametrize("settings", [SETTINGS, {}, SETTINGS | {"modules_to_not_convert": ["up_proj"]}])
@pytest.mark.parametrize(("rows", "columns", "group"), [(64, 256, 64), (72, 256, 128), (328, 96, 32), (64, 64, -1)])
def test_gemm_decodes_as_the_formula_says(rows: int, columns: int, group: int, settings: Mapping[str, Any]) -> None:
    layer = quantise(matrix(rows, columns), 4, group)
    raws = raw_tensors(awq_layer(UP, layer))
    found = quantized_tensors(PATH, settings, config(columns, rows), raws)
    info, read = found[UP]
    check(info, read(), layer.values())
    assert info.format.name == "AWQ 4-bit" + (f" g{group}" if group > 0 else "")
    assert info.format.group == (columns if group == -1 else group)
    assert (info.format.planes, info.shape) == (1, (rows, columns))


def test_the_order_of_nibbles() -> None:
    """One word by hand: output k has code k, so nibbles 0..7 read 0 2 4 6 1 3 5 7."""
    assert int(awq_words(np.arange(8)[None])[0, 0]) == 0x75316420
    tensors = {
        UP + ".qweight": torch.full((32, 1), 0x75316420, dtype=torch.int32),
        UP + ".qzeros": torch.zeros(1, 1, dtype=torch.int32),
        UP + ".scales": torch.ones(1, 8, dtype=torch.float16),
    }
    stored = quantized_tensors(PATH, {}, config(32, 8), raw_tensors(tensors))[UP][1]()
    assert torch.equal(stored.float32(), torch.arange(8.0)[:, None].expand(8, 32))


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (1, 8), (7, 9), (13, 64), (63, 64), (5, 5), (8, 16)])
def test_slices_that_cut_words(start: int, stop: int) -> None:
    layer = quantise(matrix(64, 64), 4, 32)
    stored = quantized_tensors(PATH, {}, config(64, 64), raw_tensors(awq_layer(UP, layer)))[UP][1]()
    assert torch.equal(stored.float32(start, stop), stored.float32()[start:stop])


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("qzeros", None, "missing"),
        ("qzeros", torch.zeros(4, 64, dtype=torch.int32), "(4, 64)"),
        ("scales", torch.zeros(64, 4), "(64, 4)"),
        ("qweight", torch.zeros(256, 8, dtype=torch.int16), "int16"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(name: str, value: torch.Tensor | None, words: str) -> None:
    tensors = awq_layer(UP, quantise(matrix(64, 256), 4, 64))
    tensors.pop(f"{UP}.{name}")
    if value is not None:
        tensors[f"{UP}.{name}"] = value
    with pytest.raises(CheckpointError) as caught:
        quantized_tensors(PATH, SETTINGS, config(), raw_tensors(tensors))
    assert f"{UP}.{name}" in caught.value.message
    assert words in caught.value.message


def test_groups_that_do_not_divide_the_inputs_are_refused() -> None:
    tensors = awq_layer(UP, quantise(matrix(64, 256), 4, 64))
    tensors |= {UP + ".scales": torch.zeros(3, 64), UP + ".qzeros": torch.zeros(3, 8, dtype=torch.int32)}
    with pytest.raises(CheckpointError, match="3 groups"):
        quantized_tensors(PATH, SETTINGS, config(), raw_tensors(tensors))


def test_gptq_and_awq_of_one_matrix_are_one_matrix() -> None:
    layer = quantise(matrix(64, 256), 4, 64)
    both = [
        quantized_tensors(PATH, {}, config(), raw_tensors(make(UP, layer)))[UP][1]() for make in (awq_layer, gptq_layer)
    ]
    assert torch.equal(both[0].float32(), both[1].float32())
