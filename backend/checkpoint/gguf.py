"""GGUF v1 to v3, in one file or split: architecture llama (LLaMA, Mistral, SmolLM, TinyLlama ...) and qwen2.

The header is read and checked at once (gguf_header.py), tensors stay in the mapped files until they are asked for.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from backend.checkpoint.base import TensorInfo, check_tensors
from backend.checkpoint.gguf_header import GGUFTensor, Header, read_header
from backend.checkpoint.mapped import MappedFile
from backend.errors import CheckpointError
from backend.model.config import ModelConfig, RopeScaling
from backend.tokenizer.source import TokenizerSource
from backend.weights.stored import PLAIN_DTYPES, Blocks, Plain, Stored

MAX_SPLIT = 1024
# Architectures that are a difference of configuration only -> whether rotary pairs are interleaved in the file.
_ARCHITECTURES = {"llama": True, "qwen2": False}

# File names of tensors -> canonical names; `blk.N.` becomes `layers.N.`.
_TOP = {
    "token_embd.weight": "tok_embeddings",
    "output_norm.weight": "norm",
    "output.weight": "output",
    "rope_freqs.weight": "rope_freqs",
}
_LINEARS = {
    "attn_q": "wq",
    "attn_k": "wk",
    "attn_v": "wv",
    "attn_output": "wo",
    "ffn_gate": "w1",
    "ffn_down": "w2",
    "ffn_up": "w3",
}
_LAYER = {
    "attn_norm.weight": "attention_norm",
    "ffn_norm.weight": "ffn_norm",
    **{f"{name}.weight": target for name, target in _LINEARS.items()},
    **{f"{name}.bias": f"{target}_bias" for name, target in _LINEARS.items()},
}
_LAYER_NAME = re.compile(r"blk\.(0|[1-9][0-9]{0,5})\.(.+)")  # one spelling for each number
_SPLIT_NAME = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})\.gguf")


class GGUFCheckpoint:
    """An open GGUF model. Of a split model, any of its files may be named."""

    def __init__(self, path: Path) -> None:
        self.path = path
        header = read_header(path)
        headers = _all_parts(path, header)
        self.files: Sequence[Path] = tuple(part.path for part in headers)
        self.format = f"GGUF v{header.version}" + (f", {len(headers)} files" if len(headers) > 1 else "")
        self.metadata: Mapping[str, Any] = headers[0].metadata
        self.tokenizer = TokenizerSource("gguf", headers[0].path, self.metadata)
        found = _tensors_of(headers)
        self.config: ModelConfig = _config(path, self.metadata, {name: t for name, (t, _) in found.items()})
        self._entries = _canonical(path, found, self.config)
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(tensor.name, tensor.shape, tensor.format, tensor.nbytes)
            for name, (tensor, _) in self._entries.items()
        }
        check_tensors(path, self.config, self.tensors, _file_name)
        self._maps = [MappedFile(file) for file in self.files]

    def read(self, name: str) -> Stored:
        tensor, part = self._entries[name]
        mapped = self._maps[part]
        release = mapped.releaser(tensor.offset, tensor.nbytes)
        if tensor.format in PLAIN_DTYPES:
            values = mapped.typed(tensor.offset, tensor.nbytes, PLAIN_DTYPES[tensor.format])
            return Plain(values.view(tensor.shape), release)
        rows = math.prod(tensor.shape[:-1])
        return Blocks(
            mapped.slice(tensor.offset, tensor.nbytes).view(rows, tensor.nbytes // rows), tensor.format, release
        )


def _all_parts(path: Path, header: Header) -> list[Header]:
    """The headers of all files of a split model, in order; of a whole model, its one."""
    count = header.metadata.get("split.count", 0)
    if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= MAX_SPLIT:
        raise CheckpointError(f"{path}: split.count is {count!r}, expected a number from 0 to {MAX_SPLIT}")
    if count <= 1:
        return [header]
    spelt = _SPLIT_NAME.fullmatch(path.name)
    if spelt is None or int(spelt[3]) != count:
        raise CheckpointError(f"{path}: one of {count} files; its name should end in '-00001-of-{count:05}.gguf'")
    parts = []
    for number in range(count):
        file = path.with_name(f"{spelt[1]}-{number + 1:05}-of-{count:05}.gguf")
        if not file.is_file():
            raise CheckpointError(f"{path}: one of {count} files, but {file.name} is not beside it")
        part = header if file == path else read_header(file)
        if part.metadata.get("split.no") != number or part.metadata.get("split.count") != count:
            raise CheckpointError(
                f"{file}: says it is part {part.metadata.get('split.no')}, expected {number} of {count}"
            )
        parts.append(part)
    total = parts[0].metadata.get("split.tensors.count")
    found = sum(len(part.tensors) for part in parts)
    if total is not None and total != found:
        raise CheckpointError(f"{path}: split.tensors.count is {total}, but the {count} files hold {found} tensors")
    return parts


def _tensors_of(headers: Sequence[Header]) -> dict[str, tuple[GGUFTensor, int]]:
    """Tensors by file name, with the number of the file each is in."""
    found: dict[str, tuple[GGUFTensor, int]] = {}
    for number, header in enumerate(headers):
        for name, tensor in header.tensors.items():
            if name in found:
                raise CheckpointError(f"{header.path}: tensor '{name}' is in an earlier file of the split already")
            found[name] = (tensor, number)
    return found


def _canonical(
    path: Path, tensors: Mapping[str, tuple[GGUFTensor, int]], config: ModelConfig
) -> dict[str, tuple[GGUFTensor, int]]:
    """Rename to canonical names. A tensor we do not know would change the answer, so it is an error."""
    renamed: dict[str, tuple[GGUFTensor, int]] = {}
    for name, entry in tensors.items():
        target = _TOP.get(name)
        if found := _LAYER_NAME.fullmatch(name):
            number, rest = int(found[1]), found[2]
            if number < config.n_layers and rest in _LAYER:
                target = f"layers.{number}.{_LAYER[rest]}"
        if target is None:
            raise CheckpointError(f"{path}: tensor '{name}' is not part of the {config.architecture} architecture")
        renamed[target] = entry
    return renamed


def _file_name(canonical: str) -> str:
    """The name a GGUF file gives to a tensor."""
    if not canonical.startswith("layers."):
        return next((name for name, target in _TOP.items() if target == canonical), canonical)
    _, number, part = canonical.split(".", 2)
    return next((f"blk.{number}.{name}" for name, target in _LAYER.items() if target == part), canonical)


def _config(path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, GGUFTensor]) -> ModelConfig:
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in _ARCHITECTURES:
        known = ", ".join(f"'{name}'" for name in _ARCHITECTURES)
        raise CheckpointError(f"{path}: architecture {architecture!r}; this version opens {known}")
    keys = _Keys(path, metadata, architecture)
    dim = keys.integer("embedding_length", 1, 1 << 20)
    n_heads = keys.integer("attention.head_count", 1, 1 << 14)
    n_kv_heads = keys.integer("attention.head_count_kv", 1, n_heads, default=n_heads)
    head_dim = keys.integer("attention.key_length", 1, 1 << 14, default=max(1, dim // n_heads))
    value_dim = keys.integer("attention.value_length", 1, 1 << 14, default=head_dim)
    rope_dim = keys.integer("rope.dimension_count", 1, 1 << 14, default=head_dim)
    if n_heads % n_kv_heads:
        raise CheckpointError(f"{path}: {n_heads} attention heads cannot be shared by {n_kv_heads} key-value heads")
    if head_dim % 2 or value_dim != head_dim or rope_dim != head_dim:
        raise CheckpointError(
            f"{path}: head sizes {head_dim} (key), {value_dim} (value), {rope_dim} (rope); expected one even number"
        )
    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(f"{path}: tensor 'token_embd.weight' is missing or has no two dimensions")
    if metadata.get(f"{architecture}.expert_count", 0):
        raise CheckpointError(f"{path}: a mixture of experts; this version opens dense models")
    return ModelConfig(
        architecture=architecture,
        name=str(metadata.get("general.name") or path.stem),
        dim=dim,
        n_layers=keys.integer("block_count", 1, 1 << 12),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        ffn_dim=keys.integer("feed_forward_length", 1, 1 << 22),
        vocab_size=embedding.shape[0],
        context=keys.integer("context_length", 1, 1 << 30),
        norm_eps=keys.number("attention.layer_norm_rms_epsilon", 0.0, 1.0),
        rope_theta=keys.number("rope.freq_base", 1.0, 1e15, default=10000.0),
        rope_scaling=_rope_scaling(path, keys, metadata),
        rope_interleaved=_ARCHITECTURES[architecture],
        tied_output="output.weight" not in tensors,
        sliding_window=keys.integer("attention.sliding_window", 0, 1 << 30, default=0) or None,
        biases=frozenset(_LINEARS[name] for name in _LINEARS if f"blk.0.{name}.bias" in tensors),
    )


def _rope_scaling(path: Path, keys: _Keys, metadata: Mapping[str, Any]) -> RopeScaling | None:
    kind = metadata.get(keys.full("rope.scaling.type"), "none")
    if kind in ("none", ""):
        factor = keys.number("rope.scale_linear", 1e-6, 1e6, default=1.0)
    elif kind == "linear":
        factor = keys.number("rope.scaling.factor", 1e-6, 1e6, default=1.0)
    else:
        key = keys.full("rope.scaling.type")
        raise CheckpointError(f"{path}: {key} is {kind!r}; this version knows 'none' and 'linear'")
    return RopeScaling("linear", factor) if factor != 1.0 else None


class _Keys:
    """Typed, bounded reads of the architecture's metadata."""

    def __init__(self, path: Path, metadata: Mapping[str, Any], architecture: str) -> None:
        self._path, self._metadata, self._architecture = path, metadata, architecture

    def full(self, key: str) -> str:
        return f"{self._architecture}.{key}"

    def integer(self, key: str, low: int, high: int, default: int | None = None) -> int:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise CheckpointError(
                f"{self._path}: {self.full(key)} is {value!r}, expected a whole number from {low} to {high}"
            )
        return value

    def number(self, key: str, low: float, high: float, default: float | None = None) -> float:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise CheckpointError(f"{self._path}: {self.full(key)} is {value!r}, expected a number")
        if not low <= value <= high:
            raise CheckpointError(f"{self._path}: {self.full(key)} is {value!r}, expected {low:g} to {high:g}")
        return float(value)

    def _get(self, key: str, default: Any) -> Any:
        value = self._metadata.get(self.full(key), default)
        if value is None:
            raise CheckpointError(f"{self._path}: the key '{self.full(key)}' is missing")
        return value
