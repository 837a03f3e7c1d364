"""GPTQ files of every era, width, group size and zero-point version decode to what a plain float64 loop says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from backend.checkpoint.container import RawTensor, RawTensors
from backend.checkpoint.quantized import quantization_name, quantized_tensors
from backend.errors import CheckpointError
from backend.model.config import ModelConfig
from backend.weights.planes import Planes
from backend.weights.stored import Stored, copy_values
from tests.gptqfiles import Layer, gptq_layer, quantise

PATH = Path("folder")
Q = "model.layers.0.self_attn.q_proj"
UP = "model.layers.0.mlp.up_proj"


def config(dim: int = 256, ffn: int = 64, layers: int = 1, biases: frozenset[str] = frozenset()) -> ModelConfig:
    return ModelConfig(
        architecture="llama", name="t", dim=dim, n_layers=layers, n_heads=dim // 32, n_kv_heads=dim // 32, head_dim=32,
        ffn_dim=ffn, vocab_size=64, context=128, norm_eps=1e-5, rope_interleaved=False, biases=biases,
    )  # fmt: skip


def raw_tensors(tensors: Mapping[str, torch.Tensor]) -> RawTensors:
    return {
        name: RawTensor(name, tuple(t.shape), t.dtype, t.nbytes, PATH, lambda t=t: t) for name, t in tensors.items()
    }


def matrix(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns)) * 0.05


def up(layer: Layer, settings: Mapping[str, Any] | None = None, **how: Any) -> tuple[Any, Stored]:
    """The layer as up_proj (out = ffn) of a model, through the function that readers call."""
    rows, columns = layer.codes.shape
    raws = raw_tensors(gptq_layer(UP, layer, **how))
    found = quantized_tensors(PATH, settings or {}, config(columns, rows), raws)
    assert list(found) == [UP]
    info, read = found[UP]
    assert info.shape == (rows, columns)
    assert info.nbytes == sum(raw.nbytes for name, raw in raws.items() if not name.endswith("bias"))
    return info, read()


def plane_values(planes: Planes) -> np.ndarray:
    """What the packed product would compute with, in float64."""
    total = 0.0
    for codes, scale, zero in planes.planes:
        assert codes.dtype == torch.uint8
        assert int(codes.max()) <= 15
        assert scale.shape == zero.shape == (codes.shape[0], codes.shape[1] // planes.group)
        spread = [t.double().repeat_interleave(planes.group, 1).numpy() for t in (scale, zero)]
        total = total + (codes.numpy().astype(np.float64) - 8) * spread[0] + spread[1]
    values = np.asarray(total)
    if planes.order is None:
        return values
    unsorted = np.empty_like(values)
    unsorted[:, planes.order.numpy()] = values
    return unsorted


def check(info: Any, stored: Stored, expected: np.ndarray) -> None:
    """Exact values whole and in slices; planes exact, and as the description promised them."""
    whole = stored.float32().numpy()
    assert whole.dtype == np.float32
    assert np.array_equal(whole, expected.astype(np.float32))
    assert np.array_equal(stored.float32(3, 21).numpy(), whole[3:21])
    copied = torch.empty(stored.shape)
    copy_values(stored, copied)
    assert np.array_equal(copied.numpy(), whole)
    planes = stored.planes()
    if planes is None:
        assert info.format.planes == 0
    else:
        assert (len(planes.planes), planes.group) == (info.format.planes, info.format.group)
        assert np.array_equal(plane_values(planes), expected)


ERAS = [
    # era, bits, group, sym, act-order, version
    *(("a", bits, -1, sym, False, 1) for bits in (2, 3, 4, 8) for sym in (False, True)),
    *(("b", bits, group, sym, False, 1) for bits in (2, 3, 4, 8) for group in (-1, 64, 128) for sym in (False, True)),
    *((era, 4, group, sym, act, 1) for era in "cd" for group in (-1, 64) for sym in (False, True) for act in (0, 1)),
    *(("e", bits, 64, sym, act, v) for bits in (3, 4, 8) for sym in (False, True) for act in (0, 1) for v in (1, 2)),
]


@pytest.mark.parametrize(("era", "bits", "group", "sym", "act", "version"), ERAS)
def test_every_era_decodes_as_the_formula_says(era, bits, group, sym, act, version) -> None:
    layer = quantise(matrix(64, 256), bits, group, sym, bool(act))
    settings = {"quant_method": "gptq", "checkpoint_format": "gptq_v2"} if version == 2 else {}
    info, stored = up(layer, settings, era=era, version=version)
    check(info, stored, layer.values())
    assert info.format.planes == (2 if bits == 8 else 1)
    assert info.format.group == (256 if group == -1 else group)
    name = f"GPTQ {bits}-bit" + (f" g{group}" if group > 0 else "")
    assert info.format.name == name + (" act-order" if act and group > 0 else "")


def test_the_five_eras_are_one_matrix() -> None:
    layer = quantise(matrix(64, 256), 4, -1)
    decoded = [up(layer, era=era)[1].float32() for era in "abcde"]
    assert all(torch.equal(decoded[0], other) for other in decoded)
    assert np.abs(decoded[0].numpy() - matrix(64, 256)).max() < 0.02  # and it is the matrix that was quantised


@pytest.mark.parametrize("label", ["gptq", "gptq_v2", None])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", [1, 2])
def test_symmetric_zero_points_are_told_from_the_data_whatever_the_label(bits, version, label) -> None:
    layer = quantise(matrix(64, 256), bits, 64, sym=True)
    _, stored = up(layer, {"checkpoint_format": label}, version=version)
    assert np.array_equal(stored.float32().numpy(), layer.values().astype(np.float32))


def test_asymmetric_zero_points_go_by_the_label_and_by_v1_without_one() -> None:
    layer = quantise(matrix(64, 256), 4, 64)
    for version, settings in ((1, {}), (1, {"checkpoint_format": "gptq"}), (2, {"checkpoint_format": "gptq_v2"})):
        _, stored = up(layer, settings, version=version)
        assert np.array_equal(stored.float32().numpy(), layer.values().astype(np.float32))


def test_a_zero_point_of_zero_is_stored_as_fifteen() -> None:
    layer = quantise(np.abs(matrix(64, 256)), 4, 64)
    assert not layer.zeros.any()
    _, stored = up(layer)
    assert float(stored.float32().min()) >= 0
    check_values = layer.values().astype(np.float32)
    assert np.array_equal(stored.float32().numpy(), check_values)


@pytest.mark.parametrize("with_index", [True, False])
def test_a_short_last_group_has_planes_of_half_the_size(with_index: bool) -> None:
    layer = quantise(matrix(64, 576), 4, 128)
    assert layer.scales.shape[0] == 5
    info, stored = up(layer, {"group_size": 128}, era="c" if with_index else "b")
    check(info, stored, layer.values())
    assert (info.format.name, info.format.planes, info.format.group) == ("GPTQ 4-bit g128", 1, 64)


def test_without_label_or_index_a_short_last_group_is_told_from_the_number_of_groups() -> None:
    layer = quantise(matrix(64, 576), 4, 128)
    info, stored = up(layer, era="b")
    check(info, stored, layer.values())


def test_uneven_act_order_groups_have_no_planes_but_decode() -> None:
    layer = quantise(matrix(64, 256), 4, 64)
    index = layer.index.copy()
    index[0] = 1  # 63 columns in one group, 65 in another
    odd = Layer(4, layer.codes, layer.scales, layer.zeros, index)
    info, stored = up(odd)
    assert (info.format.planes, stored.planes()) == (0, None)
    check(info, stored, odd.values())


def test_an_index_that_was_never_filled_in_is_ignored() -> None:
    layer = quantise(matrix(64, 256), 4, 64)
    tensors = gptq_layer(UP, layer)
    tensors[UP + ".g_idx"].zero_()
    found = quantized_tensors(PATH, {}, config(), raw_tensors(tensors))
    assert np.array_equal(found[UP][1]().float32().numpy(), layer.values().astype(np.float32))


def test_the_group_size_of_the_file_name_does_not_count_against_the_bytes() -> None:
    layer = quantise(matrix(64, 256), 4, 64)
    _, stored = up(layer, {"bits": 8, "group_size": 128, "desc_act": True}, era="b")
    assert np.array_equal(stored.float32().numpy(), layer.values().astype(np.float32))


def test_tensors_with_odd_strides_decode_the_same() -> None:
    layer = quantise(matrix(64, 256), 4, 64)
    tensors = {
        name: torch.empty(*t.shape, 2, dtype=t.dtype)[..., 0].copy_(t) for name, t in gptq_layer(UP, layer).items()
    }
    found = quantized_tensors(PATH, {}, config(), raw_tensors(tensors))
    assert np.array_equal(found[UP][1]().float32().numpy(), layer.values().astype(np.float32))


def test_release_gives_back_every_part() -> None:
    given: list[str] = []
    tensors = gptq_layer(UP, quantise(matrix(64, 256), 4, 64), bias=False)
    raws = {
        name: RawTensor(name, tuple(t.shape), t.dtype, t.nbytes, PATH, lambda t=t: t, lambda n=name: given.append(n))
        for name, t in tensors.items()
    }
    stored = quantized_tensors(PATH, {}, config(), raws)[UP][1]()
    given.clear()
    stored.release()
    assert sorted(given) == sorted(raws)


def test_plain_linears_are_left_out_and_lm_head_may_be_quantised() -> None:
    layer = quantise(matrix(64, 256), 4, 64)
    tensors = gptq_layer("lm_head", layer) | {Q + ".weight": torch.zeros(256, 256)}
    found = quantized_tensors(PATH, {"quant_method": "gptq"}, config(), raw_tensors(tensors))
    assert list(found) == ["lm_head"]
    assert quantization_name(info.format for info, _ in found.values()) == "GPTQ 4-bit g64"
    assert quantization_name([]) == ""


# refusals -------------------------------------------------------------------------------------------------------------


def refusal(tensors: Mapping[str, torch.Tensor], settings: Mapping[str, Any] | None = None, **other: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        quantized_tensors(PATH, settings or {}, config(**other), raw_tensors(tensors))
    return caught.value.message


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"quant_method": "aqlm"}, "'aqlm'"),
        ({"quant_method": "fp8"}, "'fp8'"),
        ({"quant_method": ["gptq"]}, "['gptq']"),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "'marlin'"),
        ({"is_marlin_format": True}, "'marlin'"),
        ({"quant_method": "awq", "version": "GEMV_FAST"}, "'gemv_fast'"),
        ({"quant_method": "awq", "version": "gemv"}, "'gemv'"),
        ({"quant_method": "awq", "version": "marlin"}, "'marlin'"),
        ({"quant_method": "awq", "version": "gemm"}, "not packed as AWQ"),
    ],
)
def test_other_packings_are_refused_by_name(settings: Mapping[str, Any], words: str) -> None:
    assert words in refusal(gptq_layer(UP, quantise(matrix(64, 256), 4, 64)), settings)


def test_a_label_without_quantised_tensors_is_refused() -> None:
    assert "labelled GPTQ" in refusal({UP + ".weight": torch.zeros(64, 256)}, {"quant_method": "gptq"})


def test_marlin_words_without_a_label_are_refused() -> None:
    assert "Marlin" in refusal({UP + ".B": torch.zeros(16, 128, dtype=torch.int32), UP + ".s": torch.zeros(4, 64)})


def change(name: str, value: torch.Tensor | None) -> dict[str, torch.Tensor]:
    tensors = gptq_layer(UP, quantise(matrix(64, 256), 4, 64))
    if value is None:
        del tensors[f"{UP}.{name}"]
    else:
        tensors[f"{UP}.{name}"] = value
    return tensors


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("qweight", torch.zeros(33, 64, dtype=torch.int32), "(33, 64)"),
        ("qweight", torch.zeros(32, 63, dtype=torch.int32), "(32, 63)"),
        ("qweight", torch.zeros(32 * 64, dtype=torch.int32), "(2048,)"),
        ("qweight", torch.zeros(32, 64, dtype=torch.int16), "int16"),
        ("scales", torch.zeros(4, 63), "(4, 63)"),
        ("scales", torch.zeros(0, 64), "(0, 64)"),
        ("scales", torch.zeros(300, 64), "(300, 64)"),
        ("scales", torch.zeros(4, 64, dtype=torch.int64), "int64"),
        ("scales", torch.zeros(()), "shape ()"),
        ("scales", None, "missing"),
        ("qzeros", torch.zeros(4, 7, dtype=torch.int32), "(4, 7)"),
        ("qzeros", torch.zeros(4, 8, dtype=torch.float32), "float32"),
        ("qzeros", None, "missing"),
        ("g_idx", torch.full((256,), 4, dtype=torch.int32), "groups 4 to 4"),
        ("g_idx", torch.full((256,), -1, dtype=torch.int32), "-1"),
        ("g_idx", torch.zeros(255, dtype=torch.int32), "(255,)"),
        ("g_idx", torch.zeros(256, dtype=torch.float32), "float32"),
        ("bias", torch.ones(64), "not all zero"),
        ("bias", torch.zeros(63), "(63,)"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(name: str, value: torch.Tensor | None, words: str) -> None:
    message = refusal(change(name, value))
    assert f"{UP}.{name}" in message
    assert words in message


def test_a_bias_the_model_has_is_left_to_the_reader() -> None:
    layer = quantise(matrix(256, 256), 4, 64)
    tensors = gptq_layer(Q, layer) | {Q + ".bias": torch.ones(256)}
    assert "not all zero" in refusal(tensors)
    assert list(quantized_tensors(PATH, {}, config(biases=frozenset({"wq"})), raw_tensors(tensors))) == [Q]


def test_outputs_whose_zero_points_fill_no_words_are_refused() -> None:
    layer = quantise(matrix(48, 256), 3, 64)
    tensors = gptq_layer(UP, Layer(3, layer.codes, layer.scales, np.zeros((4, 32), int), layer.index), bias=False)
    tensors[UP + ".qzeros"] = torch.zeros(4, 4, dtype=torch.int32)
    assert "48 outputs" in refusal(tensors, ffn=48)


def test_groups_that_fit_no_group_size_are_refused() -> None:
    tensors = gptq_layer(UP, quantise(matrix(64, 256), 4, 64), era="b")
    tensors[UP + ".scales"], tensors[UP + ".qzeros"] = torch.zeros(7, 64), torch.zeros(7, 8, dtype=torch.int32)
    assert "7 groups" in refusal(tensors)
