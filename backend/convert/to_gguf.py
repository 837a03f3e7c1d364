"""Any open checkpoint to one GGUF file, tensor by tensor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from backend.checkpoint.base import Checkpoint
from backend.checkpoint.permute import to_half_split, to_interleaved
from backend.convert import gguf_keys
from backend.convert.gguf_writer import OutTensor, header, pad, padded
from backend.convert.mixes import MIXES, tensor_format
from backend.convert.output import ConvertError, check_space, whole_file
from backend.convert.rows import write_rows
from backend.convert.vocab import vocabulary_keys
from backend.events import LoadProgress
from backend.model.config import tensor_shapes
from backend.weights.blocks import BF16, F16, F32, BlockFormat
from backend.weights.stored import Plain, Stored

Progress = Callable[[LoadProgress], None]
AS_STORED = "as-stored"  # each tensor keeps its block format; what GGUF has no format for becomes f16


@dataclass(frozen=True)
class GGUFPlan:
    """What will be written: keys, and tensors in the file's order by canonical name."""

    keys: Mapping[str, Any]
    tensors: Mapping[str, OutTensor]

    @property
    def nbytes(self) -> int:
        data = sum(padded(tensor.nbytes) for tensor in self.tensors.values())
        return len(header(self.keys, list(self.tensors.values()))) + data


def plan_gguf(source: Checkpoint, kind: str = AS_STORED, vocab_only: bool = False) -> GGUFPlan:
    """Decide formats and keys from headers alone. `kind`: a key of MIXES, or AS_STORED."""
    config = source.config
    tensors: dict[str, OutTensor] = {}
    if not vocab_only:
        for name, shape in tensor_shapes(config).items():
            fmt = _stored_format(source, name) if kind == AS_STORED else tensor_format(kind, name, shape, config)
            tensors[name] = OutTensor(gguf_keys.tensor_name(name), shape, fmt)
        if "rope_freqs" in source.tensors or (config.rope_scaling and config.rope_scaling.kind == "llama3"):
            tensors["rope_freqs"] = OutTensor(gguf_keys.tensor_name("rope_freqs"), (config.head_dim // 2,), F32)
    matrices = Counter(tensor.format.name for tensor in tensors.values() if len(tensor.shape) > 1)
    if kind != AS_STORED:
        file_type = MIXES[kind].file_type
    else:
        common = matrices.most_common(1)[0][0] if matrices else "F32"
        file_type = next((mix.file_type for mix in MIXES.values() if mix.base.name == common), 0)
    quantized = not set(matrices) <= {"F32", "F16", "BF16"}
    from_gguf = source.tokenizer.metadata if source.tokenizer.kind == "gguf" else {}
    keys = gguf_keys.model_keys(config, file_type, quantized, from_gguf)
    return GGUFPlan(keys | vocabulary_keys(source.tokenizer, config.vocab_size), tensors)


def write_gguf(source: Checkpoint, plan: GGUFPlan, target: Path, progress: Progress) -> None:
    """Write the file. Raises ConvertError; nothing is left behind then."""
    check_space(target, plan.nbytes)
    total, done = sum(tensor.nbytes for tensor in plan.tensors.values()), 0
    stage = f"Writing {target.name}"

    def report(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress(LoadProgress(stage, done, total))

    progress(LoadProgress(stage, 0, total))
    with whole_file(target) as file:
        file.write(header(plan.keys, list(plan.tensors.values())))
        for name, tensor in plan.tensors.items():
            stored = _read(source, name)
            if stored.shape != tensor.shape:
                raise ConvertError(f"{source.path}: tensor '{name}' has shape {stored.shape}, expected {tensor.shape}")
            reorder = _reorder(source, name)
            write_rows(file, stored, tensor.format, name, reorder, source.config.head_dim if reorder else 1, report)
            pad(file, tensor.nbytes)


def _read(source: Checkpoint, name: str) -> Stored:
    config = source.config
    if name == "rope_freqs" and name not in source.tensors:
        assert config.rope_scaling is not None
        return Plain(torch.tensor(config.rope_scaling.divisors(config.head_dim, config.rope_theta)))
    return source.read(name)


def _reorder(source: Checkpoint, name: str) -> Callable[[int, int], torch.Tensor] | None:
    """How the rows of each head of queries and keys change places; the other tensors are the same everywhere."""
    config, wanted = source.config, gguf_keys.interleaved(source.config)
    if name.split(".")[-1].removesuffix("_bias") not in ("wq", "wk") or config.rope_interleaved == wanted:
        return None
    return to_interleaved if wanted else to_half_split


def _stored_format(source: Checkpoint, name: str) -> BlockFormat:
    info = source.tensors[name]
    if len(info.shape) == 1:
        return F32
    fmt = info.format
    if fmt.plain:
        return fmt if fmt in (F16, BF16) and isinstance(fmt, BlockFormat) else F32
    if isinstance(fmt, BlockFormat) and fmt.ggml_id is not None and not info.shape[-1] % fmt.elements:
        return fmt
    return F16
