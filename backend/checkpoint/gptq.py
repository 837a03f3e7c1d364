"""GPTQ layers of all five eras, and AWQ (gemm) layers, from their tensors. The eras:

a  before 2023-03-20: qweight, scales and zeros float [out, 1], zeros already multiplied by the scale
b  then: scales [groups, out], qzeros packed, groups of columns one after the other
c  from 2023-03-28: g_idx, the group of each column (act-order)
d  old-cuda branch from 2023-04-30: g_idx is written; the kernels of that time ignored it, we do not
e  AutoGPTQ and GPTQModel folders: the same, zeros stored minus one (v1) or as they are (v2)

W[out, in] = scales[g(in), out] * (q[in, out] - z[g(in), out]); AWQ the same with other packing, never minus one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from backend.checkpoint.base import TensorInfo
from backend.checkpoint.container import RawTensor, RawTensors
from backend.errors import CheckpointError
from backend.weights.blocks import StorageFormat
from backend.weights.grouped import AwqCodes, Grouped, Grouping, WordCodes, unpack
from backend.weights.stored import Stored

BITS = (2, 3, 4, 8)
_FLOATS = (torch.float16, torch.float32, torch.bfloat16)
_SAMPLE_LAYERS, _SAMPLE_WORDS = 16, 1 << 14
Opened = tuple[TensorInfo, Callable[[], Stored]]


@dataclass(frozen=True)
class LinearPlace:
    """One linear of the model and the file's tensors: `prefix` + "." + part, e.g. "...q_proj.qweight"."""

    path: Path
    prefix: str
    rows: int  # out features
    columns: int  # in features
    raws: RawTensors

    def has(self, part: str) -> bool:
        return f"{self.prefix}.{part}" in self.raws

    def raw(self, part: str) -> RawTensor:
        raw = self.raws.get(f"{self.prefix}.{part}")
        if raw is None:
            raise CheckpointError(f"{self.path}: tensor '{self.prefix}.{part}' is missing; this layer needs it")
        return raw

    def checked(self, part: str, shape: tuple[int, ...], dtypes: Sequence[torch.dtype]) -> RawTensor:
        """The tensor, of exactly this shape and one of these types."""
        raw = self.raw(part)
        if raw.shape != shape:
            raise CheckpointError(f"{self.path}: tensor '{raw.name}' has shape {raw.shape}, expected {shape}")
        if raw.dtype not in dtypes:
            names = " or ".join(_short(dtype) for dtype in dtypes)
            raise CheckpointError(f"{self.path}: tensor '{raw.name}' is of type {_short(raw.dtype)}, expected {names}")
        return raw

    def is_int8(self) -> bool:
        raw = self.raws.get(self.prefix + ".weight")
        return self.has("SCB") or (raw is not None and raw.dtype == torch.int8)

    def info(self, part: str, fmt: StorageFormat, raws: Sequence[RawTensor]) -> TensorInfo:
        return TensorInfo(f"{self.prefix}.{part}", (self.rows, self.columns), fmt, sum(raw.nbytes for raw in raws))


@dataclass(frozen=True)
class Layout:
    """How the words of a layer are packed, by the shape of qweight."""

    kind: str  # gptq | awq
    bits: int


def check_words(place: LinearPlace) -> Layout:
    """Tell the layout of qweight, whose shape the model's sizes and the number of bits fix."""
    raw = place.raw("qweight")
    expected = {
        (place.columns * bits // 32, place.rows): Layout("gptq", bits) for bits in BITS if not place.columns * bits % 32
    }
    if place.rows % 8 == 0:
        expected[(place.columns, place.rows // 8)] = Layout("awq", 4)
    if raw.shape not in expected:
        raise CheckpointError(
            f"{place.path}: tensor '{raw.name}' has shape {raw.shape}; for {place.rows} outputs and {place.columns} "
            f"inputs GPTQ or AWQ words have one of the shapes {', '.join(map(str, expected))}"
        )
    if raw.dtype != torch.int32:
        raise CheckpointError(f"{place.path}: tensor '{raw.name}' is of type {_short(raw.dtype)}, expected int32")
    return expected[raw.shape]


def stored_zero_is_value(
    places: Sequence[LinearPlace], layouts: Mapping[str, Layout], settings: Mapping[str, Any]
) -> bool:
    """True: a stored zero point is the zero point (v2). False: it is the zero point minus one (v1, the usual case).

    Labels lie, so the numbers are asked first: in a symmetric file every zero point is half the range (8 of 4 bits), so
    a sample with nothing but 8 is v2, nothing but 7 is v1. Only then the label, and v1 without one.
    """
    packed = [place for place in places if place.has("qzeros")]
    step = max(1, len(packed) // _SAMPLE_LAYERS)
    uniform = {_uniform_zero(place, layouts[place.prefix].bits) for place in packed[::step][:_SAMPLE_LAYERS]}
    if uniform == {0}:
        return True
    if uniform == {-1}:
        return False
    return str(settings.get("checkpoint_format")) == "gptq_v2"


def _uniform_zero(place: LinearPlace, bits: int) -> int | None:
    """0 or -1 when every stored zero point is half the range plus this; None for anything else."""
    raw = place.raw("qzeros")
    fits = len(raw.shape) == 2 and raw.shape[0] > 0 and raw.shape[1] * 32 == place.rows * bits
    if raw.dtype != torch.int32 or not fits:
        return None  # gptq_linear says what is wrong with it
    view = raw.view()
    words = view[: max(1, _SAMPLE_WORDS // max(1, raw.shape[1]))]
    codes = unpack(words, bits)
    half = 1 << (bits - 1)
    for difference in (0, -1):
        if bool((codes == half + difference).all()):
            return difference
    return None


def gptq_linear(place: LinearPlace, bits: int, is_value: bool, settings: Mapping[str, Any]) -> Opened:
    """A GPTQ layer whose qweight was checked to hold `bits` bits per value."""
    words = place.raw("qweight")
    if place.has("zeros") and not place.has("qzeros"):
        return _first_era(place, words, bits)
    groups, scales = _scales(place)
    if place.rows * bits % 32:
        raise CheckpointError(
            f"{place.path}: '{place.prefix}' has {place.rows} outputs, whose {bits}-bit zero points fill no whole words"
        )
    qzeros = place.checked("qzeros", (groups, place.rows * bits // 32), (torch.int32,))
    used = [words, scales, qzeros]
    if place.has("g_idx"):
        used.append(place.checked("g_idx", (place.columns,), (torch.int32, torch.int64)))

    def grouping() -> Grouping:
        if place.has("g_idx"):
            index = place.raw("g_idx").view()
            if int(index.min()) < 0 or int(index.max()) >= groups:
                raise CheckpointError(
                    f"{place.path}: tensor '{place.prefix}.g_idx' names groups {int(index.min())} to "
                    f"{int(index.max())}, but the layer has groups 0 to {groups - 1}"
                )
            # Some writers left g_idx as it was allocated, all zero: then it says nothing.
            if groups == 1 or bool(index.any()):
                return Grouping.listed(index, groups)
        return Grouping.even(place.columns, groups, _group_size(place, groups, settings))

    def read() -> Stored:
        stored = unpack(qzeros.view(), bits)
        # v1 wraps: a zero point of 0 was stored as all ones, which AutoGPTQ reads back as 0. (GPTQ-for-LLaMa's kernels
        # took it for 2^bits, which its quantiser never meant.)
        zero = stored if is_value else (stored + 1) & ((1 << bits) - 1)
        scale = scales.view().float().t()
        return Grouped(WordCodes(words.view(), bits), scale, zero.float().t(), grouping(), release=_all(used))

    return place.info("qweight", _format("GPTQ", bits, grouping()), used), read


def _first_era(place: LinearPlace, words: RawTensor, bits: int) -> Opened:
    scales = place.checked("scales", (place.rows, 1), _FLOATS)
    zeros = place.checked("zeros", (place.rows, 1), _FLOATS)
    used = [words, scales, zeros]

    def grouping() -> Grouping:
        return Grouping.even(place.columns, 1, place.columns)

    def read() -> Stored:
        codes = WordCodes(words.view(), bits)
        return Grouped(codes, scales.view().float(), zeros.view().float(), grouping(), True, _all(used))

    return place.info("qweight", _format("GPTQ", bits, grouping()), used), read


def awq_linear(place: LinearPlace) -> Opened:
    """An AWQ layer whose qweight was checked to be packed as version gemm."""
    words = place.raw("qweight")
    groups, scales = _scales(place)
    qzeros = place.checked("qzeros", (groups, place.rows // 8), (torch.int32,))
    used = [words, scales, qzeros]
    if place.columns % groups:
        raise CheckpointError(
            f"{place.path}: tensor '{scales.name}' has {groups} groups, which do not divide {place.columns} inputs"
        )

    def grouping() -> Grouping:
        return Grouping.even(place.columns, groups, place.columns // groups)

    def read() -> Stored:
        zero = AwqCodes(qzeros.view()).rows(0, place.rows).float()  # (out, groups)
        return Grouped(AwqCodes(words.view()), scales.view().float().t(), zero, grouping(), release=_all(used))

    return place.info("qweight", _format("AWQ", 4, grouping()), used), read


def _scales(place: LinearPlace) -> tuple[int, RawTensor]:
    raw = place.raw("scales")
    groups = raw.shape[0] if len(raw.shape) == 2 else 0
    if not 1 <= groups <= place.columns:
        raise CheckpointError(
            f"{place.path}: tensor '{raw.name}' has shape {raw.shape}, expected (groups, {place.rows}) with 1 to "
            f"{place.columns} groups"
        )
    return groups, place.checked("scales", (groups, place.rows), _FLOATS)


def _group_size(place: LinearPlace, groups: int, settings: Mapping[str, Any]) -> int:
    """Columns per group where no g_idx says it: what the settings say if it fits the number of groups, else equal
    groups, else the power of two that fits."""
    labelled = settings.get("group_size", settings.get("q_group_size"))
    sizes = [labelled] if isinstance(labelled, int) and not isinstance(labelled, bool) and labelled > 0 else []
    if place.columns % groups == 0:
        sizes.append(place.columns // groups)
    for size in [*sizes, *(1 << power for power in range(4, 16))]:
        if -(-place.columns // size) == groups:
            return min(size, place.columns)
    raise CheckpointError(
        f"{place.path}: '{place.prefix}' has {groups} groups for {place.columns} inputs, which fits no group size"
    )


def _format(family: str, bits: int, grouping: Grouping) -> StorageFormat:
    name = f"{family} {bits}-bit"
    if grouping.groups > 1:
        name += f" g{grouping.size or int(torch.bincount(grouping.index).max())}"
    if grouping.act_order:
        name += " act-order"
    group = grouping.plane_group
    if not group:
        return StorageFormat(name)
    return StorageFormat(name, planes=2 if bits == 8 else 1, group=group)


def _all(raws: Sequence[RawTensor]) -> Callable[[], None]:
    def release() -> None:
        for raw in raws:
            raw.release()

    return release


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
