"""bitsandbytes checkpoints (LLM.int8, NF4, FP4, double quant) against float64 loops, and the int8 product."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from backend.checkpoint.quantized import quantized_tensors
from backend.errors import CheckpointError
from backend.weights.int8 import Int8Linear
from backend.weights.stored import copy_values
from tests.test_gptq import PATH, UP, config, matrix, raw_tensors

SETTINGS = {"quant_method": "bitsandbytes", "load_in_4bit": True}
# The 16 values of QLoRA's appendix E.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
STATE = "weight.quant_state.bitsandbytes__"


def int8_tensors(values: np.ndarray) -> dict[str, torch.Tensor]:
    scb = np.abs(values).max(1).astype(np.float32)
    codes = np.round(values / scb[:, None] * 127).astype(np.int8)
    return {UP + ".weight": torch.from_numpy(codes), UP + ".SCB": torch.from_numpy(scb)}


def nf4_tensors(values: np.ndarray, nested: bool = True, kind: str = "nf4", block: int = 64) -> dict[str, torch.Tensor]:
    """Quantised by rounding to the nearest entry; `expected` below reads it back by hand."""
    flat = np.zeros(-(-values.size // block) * block)
    flat[: values.size] = values.ravel()
    blocks = flat.reshape(-1, block)
    absmax = np.abs(blocks).max(1).astype(np.float32)
    codes = np.abs(blocks[..., None] / absmax[:, None, None] - np.array(NF4)).argmin(-1).ravel()[: values.size]
    codes = np.pad(codes, (0, values.size % 2))
    packed = (codes[0::2] << 4 | codes[1::2]).astype(np.uint8)[:, None]
    state: dict[str, Any] = {"quant_type": kind, "blocksize": block, "dtype": "bfloat16", "shape": list(values.shape)}
    tensors: dict[str, np.ndarray] = {"weight": packed, "weight.quant_map": np.array(NF4, np.float32)}
    if nested:
        book = np.linspace(-1, 1, 256).astype(np.float32)
        offset = float(absmax.mean())
        second = np.array([np.abs(part - offset).max() for part in np.split(absmax, range(16, absmax.size, 16))])
        scaled = (absmax - offset) / np.maximum(np.repeat(second, 16)[: absmax.size], 1e-9)
        tensors |= {
            "weight.absmax": np.abs(scaled[:, None] - book).argmin(-1).astype(np.uint8),
            "weight.nested_absmax": second.astype(np.float32),
            "weight.nested_quant_map": book,
        }
        state |= {"nested_blocksize": 16, "nested_dtype": "float32", "nested_offset": offset}
    else:
        tensors["weight.absmax"] = absmax
    tensors[STATE + kind] = np.frombuffer(json.dumps(state).encode(), np.uint8).copy()
    return {f"{UP}.{name}": torch.from_numpy(value) for name, value in tensors.items()}


def expected_4bit(tensors: Mapping[str, torch.Tensor], kind: str, rows: int, columns: int) -> np.ndarray:
    """float64, one value at a time."""
    part = {name.removeprefix(UP + "."): value.numpy() for name, value in tensors.items()}
    state = json.loads(part[STATE + kind].tobytes())
    out = np.empty(rows * columns)
    for k in range(out.size):
        byte = int(part["weight"].reshape(-1)[k // 2])
        code = byte >> 4 if k % 2 == 0 else byte & 15
        b = k // state["blocksize"]
        scale = part["weight.absmax"][b]
        if "weight.nested_absmax" in part:
            second = float(part["weight.nested_absmax"][b // state["nested_blocksize"]])
            scale = float(part["weight.nested_quant_map"][int(scale)]) * second + state["nested_offset"]
        out[k] = float(part["weight.quant_map"][code]) * float(scale)
    return out.reshape(rows, columns)


def only(tensors: Mapping[str, torch.Tensor], rows: int, columns: int, settings: Any = SETTINGS) -> Any:
    found = quantized_tensors(PATH, settings, config(columns, rows), raw_tensors(tensors))
    assert list(found) == [UP]
    return found[UP]


@pytest.mark.parametrize("settings", [SETTINGS, {}])
@pytest.mark.parametrize("weight_format", [None, torch.tensor(0, dtype=torch.uint8)])
def test_int8_rows(weight_format: torch.Tensor | None, settings: Mapping[str, Any]) -> None:
    tensors = int8_tensors(matrix(48, 64))
    if weight_format is not None:
        tensors[UP + ".weight_format"] = weight_format
    info, read = only(tensors, 48, 64, settings)
    stored = read()
    expected = tensors[UP + ".weight"].double() * tensors[UP + ".SCB"].double()[:, None] / 127
    torch.testing.assert_close(stored.float32().double(), expected, rtol=3e-7, atol=0)
    assert np.abs(stored.float32().numpy() - matrix(48, 64)).max() < 0.05 * 4 / 127
    assert torch.equal(stored.float32(5, 9), stored.float32()[5:9])
    assert (info.format.name, info.format.int8, info.format.planes) == ("LLM.int8", True, 0)
    assert (info.shape, info.nbytes, stored.shape) == ((48, 64), 48 * 64 + 48 * 4, (48, 64))
    assert stored.planes() is None


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize(("rows", "columns", "block"), [(48, 64, 64), (31, 96, 64), (7, 32, 128), (5, 32, 256)])
def test_code_books(kind: str, nested: bool, rows: int, columns: int, block: int) -> None:
    tensors = nf4_tensors(matrix(rows, columns), nested, kind, block)
    info, read = only(tensors, rows, columns)
    stored = read()
    expected = expected_4bit(tensors, kind, rows, columns)
    values = stored.float32()
    np.testing.assert_allclose(values.numpy(), expected, rtol=5e-7, atol=1e-9)
    assert np.abs(expected - matrix(rows, columns)).max() < 0.05  # it is the matrix that was quantised
    for start, stop in ((0, 1), (1, 4), (rows - 2, rows), (2, 2)):
        assert torch.equal(stored.float32(start, stop), values[start:stop])
    copied = torch.empty(rows, columns)
    copy_values(stored, copied)
    assert torch.equal(copied, values)
    assert (info.format.name, info.format.planes, info.shape) == (kind.upper(), 0, (rows, columns))


def test_a_matrix_of_an_odd_number_of_values() -> None:
    tensors = nf4_tensors(matrix(3, 31), block=32)
    packed = tensors[UP + ".weight"]
    assert packed.shape == (47, 1)
    stored = quantized_tensors(PATH, {}, config(31, 3), raw_tensors(tensors))[UP][1]()
    np.testing.assert_allclose(stored.float32().numpy(), expected_4bit(tensors, "nf4", 3, 31), rtol=5e-7, atol=1e-9)
    assert torch.equal(stored.float32(1, 2), stored.float32()[1:2])


def test_bytes_that_are_stored_as_another_type() -> None:
    tensors = nf4_tensors(matrix(48, 64))
    expected = only(tensors, 48, 64)[1]().float32()
    tensors[UP + ".weight"] = tensors[UP + ".weight"].view(-1).view(torch.bfloat16)[:, None]
    assert torch.equal(only(tensors, 48, 64)[1]().float32(), expected)


# refusals -------------------------------------------------------------------------------------------------------------


def refusal(tensors: Mapping[str, torch.Tensor]) -> str:
    with pytest.raises(CheckpointError) as caught:
        quantized_tensors(PATH, SETTINGS, config(64, 48), raw_tensors(tensors))
    return caught.value.message


@pytest.mark.parametrize(("value", "name"), [(1, "col32"), (2, "col_turing"), (3, "col_ampere"), (9, "9")])
def test_tilings_for_one_gpu_are_refused_by_name(value: int, name: str) -> None:
    tensors = int8_tensors(matrix(48, 64)) | {UP + ".weight_format": torch.tensor(value, dtype=torch.uint8)}
    assert name in refusal(tensors)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("weight", torch.zeros(48, 63, dtype=torch.int8)),
        ("weight", torch.zeros(48, 64)),
        ("SCB", torch.zeros(47)),
        ("SCB", None),
        ("SCB", torch.zeros(48, dtype=torch.int8)),
        ("weight_format", torch.zeros(0, dtype=torch.uint8)),
        ("weight_format", torch.zeros(2, dtype=torch.uint8)),
    ],
)
def test_int8_tensors_that_do_not_fit_are_named(name: str, value: torch.Tensor | None) -> None:
    tensors = int8_tensors(matrix(48, 64))
    tensors.pop(f"{UP}.{name}", None)
    if value is not None:
        tensors[f"{UP}.{name}"] = value
    assert f"{UP}.{name}" in refusal(tensors)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("weight", torch.zeros(1535, 1, dtype=torch.uint8)),
        ("weight", None),
        ("weight.absmax", torch.zeros(47, dtype=torch.uint8)),
        ("weight.absmax", torch.zeros(48)),
        ("weight.quant_map", torch.zeros(15)),
        ("weight.nested_quant_map", torch.zeros(255)),
        ("weight.nested_absmax", torch.zeros(2)),
        ("weight.nested_quant_map", None),
        (STATE + "nf4", None),
        (STATE + "nf4", torch.zeros(5000, dtype=torch.uint8)),
        (STATE + "nf4", torch.zeros(10)),
    ],
)
def test_4bit_tensors_that_do_not_fit_are_named(name: str, value: torch.Tensor | None) -> None:
    tensors = nf4_tensors(matrix(48, 64))
    tensors.pop(f"{UP}.{name}", None)
    if value is not None:
        tensors[f"{UP}.{name}"] = value
    assert f"{UP}.{name}" in refusal(tensors)


GOOD = {"quant_type": "nf4", "blocksize": 64, "shape": [48, 64], "nested_blocksize": 16, "nested_offset": 0.1}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"\xff\xfe", "no JSON"),
        (b"[" * 4000, "no JSON"),
        (b"[]", "no JSON"),
        *(
            (json.dumps(GOOD | change).encode(), f"'{key}'")
            for change in (
                {"shape": [64, 48]}, {"shape": None}, {"quant_type": "fp4"}, {"blocksize": 0}, {"blocksize": -64},
                {"blocksize": 2**40}, {"blocksize": 63}, {"blocksize": "64"}, {"blocksize": True}, {"blocksize": None},
                {"nested_blocksize": 0}, {"nested_offset": float("nan")}, {"nested_offset": None},
                {"nested_offset": 10**400},
            )
            for key in change
        ),
    ],
)  # fmt: skip
def test_a_quant_state_that_lies_is_refused(text: bytes, words: str) -> None:
    tensors = nf4_tensors(matrix(48, 64))
    tensors[UP + "." + STATE + "nf4"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    message = refusal(tensors)
    assert words in message
    assert STATE in message


# the product ----------------------------------------------------------------------------------------------------------


# 16 divides the in features: torch's kernel up to 32 tokens; everything else by converting.
@pytest.mark.parametrize("tokens", [0, 1, 3, 32, 33, 80])
@pytest.mark.parametrize(("rows", "columns"), [(48, 64), (7, 16), (33, 240), (20, 33), (5, 40), (1, 1)])
def test_int8_linear_agrees_with_its_twin_and_with_float64(tokens: int, rows: int, columns: int) -> None:
    random = torch.Generator().manual_seed(1)
    codes = torch.randint(-127, 128, (rows, columns), dtype=torch.int8, generator=random)
    scale = torch.rand(rows, generator=random) * 0.01 + 0.001
    x = torch.randn(tokens, columns, generator=random)
    linear = Int8Linear(codes, scale)
    y = linear(x)
    assert (y.shape, y.dtype) == ((tokens, rows), torch.float32)
    assert (linear.out_features, linear.in_features, linear.nbytes()) == (rows, columns, rows * columns + 4 * rows)
    expected = x.bfloat16().double() @ (codes.double() * scale.double()[:, None]).T
    size = x.double().norm(dim=1, keepdim=True) * (codes.double() * scale.double()[:, None]).norm(dim=1)
    assert bool(((y.double() - expected).abs() <= 2**-8 * size).all())  # one rounding of the sum to bfloat16
    torch.testing.assert_close(linear.twin().double(), codes.double() * scale.double()[:, None], rtol=1e-7, atol=0)


def test_int8_linear_of_a_view_with_strides() -> None:
    codes = torch.randint(-127, 128, (64, 96), dtype=torch.int8)[:, ::2]
    x = torch.randn(96, 4).T[:, ::2]
    y = Int8Linear(codes, torch.ones(64))(x)
    torch.testing.assert_close(y, x.bfloat16().float() @ codes.float().T, rtol=1e-2, atol=8.0)
