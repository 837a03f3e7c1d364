"""Any open checkpoint to a GPTQ folder as AutoGPTQ writes it: few-bit linears in the layers, float16 for the rest.

One layer after the other, and inside a layer one input after the other, each calibrated with what is before it already
quantised ("true sequential"). At any time there are the matrices of one layer in memory and the calibration's stream.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from backend.checkpoint.base import Checkpoint
from backend.checkpoint.hf import file_name
from backend.checkpoint.permute import to_half_split
from backend.convert.calibration import Stream, calibration_ids
from backend.convert.gguf_writer import OutTensor
from backend.convert.output import ConvertError, check_space, whole_folder
from backend.convert.rows import write_rows
from backend.convert.safetensors_writer import split, write_shards
from backend.convert.to_hf import HFPlan, Progress, plan_hf, write_small_files
from backend.events import LoadProgress
from backend.weights.blocks import F16, BlockFormat
from backend.weights.gptq import BITS, GPTQLayer, Hessian, gptq_quantize, pack, rtn_quantize
from backend.weights.stored import copy_values

I32 = BlockFormat("I32", plain=4, elements=1, bytes=4)
# Linears that read the same input are quantised together, in the order of the computation.
STAGES = (("wq", "wk", "wv"), ("wo",), ("w1", "w3"), ("w2",))
PARTS = ("qweight", "qzeros", "scales", "g_idx")
_ADDED = ("wo", "w2")  # whose output goes into the stream


@dataclass(frozen=True)
class GPTQSettings:
    """How to quantise. `calibration`: a text file; None: round to nearest (RTN), which needs none."""

    calibration: Path | None
    bits: int = 4
    group_size: int = 128  # columns that share a scale; -1: all of a row
    act_order: bool = False
    sym: bool = False
    samples: int = 128
    sample_tokens: int = 2048
    damp: float = 0.01

    def as_json(self) -> dict[str, Any]:
        """quantize_config.json of AutoGPTQ, which is quantization_config of config.json too."""
        return {
            "quant_method": "gptq",
            "bits": self.bits,
            "group_size": self.group_size,
            "desc_act": self.act_order,
            "static_groups": False,
            "sym": self.sym,
            "damp_percent": self.damp,
            "true_sequential": self.calibration is not None,
            "lm_head": False,
            "model_name_or_path": None,
            "model_file_base_name": "model",
            "checkpoint_format": "gptq",
        }


@dataclass(frozen=True)
class GPTQPlan(HFPlan):
    """Tensors of quantised linears are called by canonical name and part: "layers.0.wq.qweight"."""

    settings: GPTQSettings


def plan_gptq(source: Checkpoint, settings: GPTQSettings, max_shard: int) -> GPTQPlan:
    """Decide names and sizes from headers alone. Raises ConvertError for what the packing cannot hold."""
    if settings.bits not in BITS:
        raise ConvertError(f"{settings.bits} bits: expected one of {', '.join(map(str, BITS))}")
    if settings.group_size != -1 and settings.group_size < 8:
        raise ConvertError(f"groups of {settings.group_size} columns: expected at least 8, or -1 for one group a row")
    if settings.act_order and settings.calibration is None:
        raise ConvertError("the order of columns comes from a calibration; rounding to nearest (RTN) has none")
    plain = plan_hf(source, "f16", max_shard)
    tensors = {name: tensor for name, tensor in plain.tensors.items() if not name.startswith("layers.")}
    for n in range(source.config.n_layers):
        at = f"layers.{n}."
        linears = [at + part for stage in STAGES for part in stage]
        tensors |= {
            name: tensor for name, tensor in plain.tensors.items() if name.startswith(at) and name not in linears
        }
        for name in linears:
            tensors |= _packed(name, plain.tensors[name].shape, settings)
    written = settings.as_json()
    keys = {**plain.keys, "quantization_config": written}
    files = {**plain.files, "quantize_config.json": (json.dumps(written, indent=2) + "\n").encode()}
    return GPTQPlan(keys, tensors, files, max_shard, settings)


def _packed(name: str, shape: tuple[int, ...], settings: GPTQSettings) -> dict[str, OutTensor]:
    rows, columns = shape
    prefix = file_name(name).removesuffix(".weight")
    if rows * settings.bits % 32 or columns * settings.bits % 32:
        raise ConvertError(
            f"tensor '{prefix}' has {rows} outputs and {columns} inputs, which fill no whole words of "
            f"{settings.bits} bits each"
        )
    groups = 1 if settings.group_size == -1 else -(-columns // settings.group_size)
    parts = {
        "qweight": ((columns * settings.bits // 32, rows), I32),
        "qzeros": ((groups, rows * settings.bits // 32), I32),
        "scales": ((groups, rows), F16),
        "g_idx": ((columns,), I32),
    }
    return {f"{name}.{part}": OutTensor(f"{prefix}.{part}", shape, fmt) for part, (shape, fmt) in parts.items()}


def write_gptq(source: Checkpoint, plan: GPTQPlan, target: Path, progress: Progress) -> None:
    """Quantise and write the folder. Raises ConvertError; nothing is left behind then."""
    check_space(target, plan.nbytes)
    settings = plan.settings
    ids: torch.Tensor | None = None
    stage = f"Writing {target.name}"
    if settings.calibration is not None:
        ids = calibration_ids(source, settings.calibration, settings.samples, settings.sample_tokens)
        stage += f", calibrated with {ids.shape[0]} x {ids.shape[1]} tokens"
    meter = _Meter(stage, sum(tensor.nbytes for tensor in plan.tensors.values()), progress)
    canonical = {tensor.name: name for name, tensor in plan.tensors.items()}
    ready: dict[str, GPTQLayer] = {}

    def write(file: BinaryIO, tensor: OutTensor) -> None:
        name = canonical[tensor.name]
        linear, _, part = name.rpartition(".")
        if part in PARTS:
            if linear not in ready:
                ready.clear()
                ready.update(next(stages))
            file.write(_bytes(ready[linear], part))
        elif name not in source.tensors:  # a bias that transformers has and this model has not
            file.write(bytes(tensor.nbytes))
        else:
            reorder = to_half_split if _is_turned(source, name.removesuffix("_bias")) else None
            write_rows(file, source.read(name), F16, name, reorder, source.config.head_dim if reorder else 1)
        meter.wrote(tensor.nbytes)

    with torch.inference_mode(), whole_folder(target) as folder:
        stages = _quantised(source, settings, ids, meter)
        write_small_files(folder, plan.files)
        write_shards(folder, split(list(plan.tensors.values()), plan.max_shard), write)
        write_small_files(folder, {"config.json": (json.dumps(plan.keys, indent=2) + "\n").encode()})


def _quantised(
    source: Checkpoint, settings: GPTQSettings, ids: torch.Tensor | None, meter: _Meter
) -> Iterator[dict[str, GPTQLayer]]:
    """Stage after stage the quantised linears by canonical name, rows in Hugging Face's order."""
    stream = Stream(source, ids) if ids is not None else None
    for n in range(source.config.n_layers):
        if stream is not None:
            stream.enter(n)
        for parts in STAGES:
            names = [f"layers.{n}.{part}" for part in parts]
            heights = [source.tensors[name].shape[0] for name in names]
            matrix = _stacked(source, names)
            meter.expect(matrix.numel() * settings.bits // 8)
            try:
                if stream is None:
                    whole = rtn_quantize(matrix, settings.bits, settings.group_size, settings.sym)
                else:
                    whole = _calibrated(matrix, parts, heights, stream, settings, meter)
            except ValueError as error:
                raise ConvertError(f"tensor '{file_name(names[0])}' cannot be quantised: {error}") from None
            del matrix
            rows = [slice(sum(heights[:i]), sum(heights[: i + 1])) for i in range(len(parts))]
            yield {name: _in_order(source, name, whole.rows(part)) for name, part in zip(names, rows)}


def _calibrated(
    matrix: torch.Tensor,
    parts: Sequence[str],
    heights: Sequence[int],
    stream: Stream,
    settings: GPTQSettings,
    meter: _Meter,
) -> GPTQLayer:
    """Quantise `parts`, stacked in `matrix`, for what the stream gives them, and move the stream on."""
    steps = len(stream.hidden) * (2 if parts[0] in _ADDED else 1)
    hessian = Hessian(matrix.shape[1])
    for step, given in enumerate(stream.inputs(parts[0])):
        hessian.add(given)
        meter.at(step / steps)
    measured = hessian.matrix(torch.float32)
    del hessian
    whole = gptq_quantize(
        matrix,
        measured,
        settings.bits,
        settings.group_size,
        settings.act_order,
        settings.sym,
        settings.damp,
    )
    for part, values in zip(parts, whole.values().split(list(heights))):
        stream.put(part, values)
    if parts[0] in _ADDED:
        for step, _ in enumerate(stream.add(parts[0])):
            meter.at(0.5 + step / steps)
    return whole


def _stacked(source: Checkpoint, names: Sequence[str]) -> torch.Tensor:
    """The rows of all, float32."""
    shapes = [source.tensors[name].shape for name in names]
    matrix = torch.empty(sum(shape[0] for shape in shapes), shapes[0][1])
    at = 0
    for name, shape in zip(names, shapes):
        stored = source.read(name)
        copy_values(stored, matrix[at : at + shape[0]])
        stored.release()
        at += shape[0]
    return matrix


def _is_turned(source: Checkpoint, name: str) -> bool:
    """Whether the rows of this linear change places on the way to Hugging Face's order."""
    return name.endswith((".wq", ".wk")) and source.config.rope_interleaved


def _in_order(source: Checkpoint, name: str, layer: GPTQLayer) -> GPTQLayer:
    if not _is_turned(source, name):
        return layer
    rows = layer.codes.shape[0]
    return layer.rows(to_half_split(rows, rows // source.config.head_dim))


def _bytes(layer: GPTQLayer, part: str) -> bytes:
    if part == "qweight":
        values = pack(layer.codes, layer.bits).t()
    elif part == "qzeros":
        values = pack((layer.zeros - 1).contiguous(), layer.bits)
    else:
        values = layer.scales if part == "scales" else layer.g_idx
    return values.contiguous().view(torch.uint8).numpy().tobytes()


class _Meter:
    """Progress in bytes written; while a stage is computed, as if its bytes came little by little."""

    def __init__(self, stage: str, total: int, progress: Progress) -> None:
        self._stage, self._total, self._progress = stage, total, progress
        self._written = self._shown = self._expected = 0
        self._show(0)

    def expect(self, nbytes: int) -> None:
        """The bytes of the stage that is computed next."""
        self._expected = nbytes

    def at(self, fraction: float) -> None:
        self._show(self._written + int(fraction * self._expected))

    def wrote(self, nbytes: int) -> None:
        self._written += nbytes
        self._show(self._written)

    def _show(self, done: int) -> None:
        self._shown = max(self._shown, done)
        self._progress(LoadProgress(self._stage, self._shown, self._total))
