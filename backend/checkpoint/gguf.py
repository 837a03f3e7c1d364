"""GGUF v2 and v3: the header is read and checked at once, tensors stay in the mapped file until they are asked for.

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Every count, length and offset is checked against
the bytes that are there before anything is allocated, because files come from strangers.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from backend.checkpoint.base import TensorInfo, check_tensors, checked_extent
from backend.errors import CheckpointError
from backend.model.config import ModelConfig
from backend.weights.blocks import BY_GGML_ID, OTHER_GGML_NAMES

MAGIC = b"GGUF"
MAX_TENSORS = 1 << 16
MAX_KEYS = 1 << 16
MAX_NAME = 1 << 16
MAX_ARRAY = 1 << 24  # the largest vocabularies and merge lists have under a million entries

_SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9

# File names of tensors -> canonical names; `blk.N.` becomes `layers.N.`.
_TOP = {
    "token_embd.weight": "tok_embeddings",
    "output_norm.weight": "norm",
    "output.weight": "output",
    "rope_freqs.weight": "rope_freqs",
}
_LAYER = {
    "attn_norm.weight": "attention_norm",
    "attn_q.weight": "wq",
    "attn_k.weight": "wk",
    "attn_v.weight": "wv",
    "attn_output.weight": "wo",
    "ffn_norm.weight": "ffn_norm",
    "ffn_gate.weight": "w1",
    "ffn_down.weight": "w2",
    "ffn_up.weight": "w3",
}
_LAYER_NAME = re.compile(r"blk\.(0|[1-9][0-9]{0,5})\.(.+)")  # one spelling for each number


class GGUFCheckpoint:
    """An open GGUF file of architecture llama."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            if size < 24:
                raise CheckpointError(f"{path}: {size} bytes are too few for a GGUF file")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
                header = _Header(path, view)
        self.format = f"GGUF v{header.version}"
        self.metadata: Mapping[str, Any] = header.metadata
        self.config: ModelConfig = _config(path, header.metadata, header.tensors)
        self.tensors: Mapping[str, TensorInfo] = _canonical(path, header.tensors, self.config.n_layers)
        check_tensors(path, self.config, self.tensors, _file_name)
        # A private mapping: pages come from the file when touched, and nothing we do can write to it.
        self._bytes = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)

    def raw(self, name: str) -> torch.Tensor:
        info = self.tensors[name]
        rows = info.elements // info.shape[-1]
        return self._bytes[info.offset : info.offset + info.nbytes].view(rows, info.nbytes // rows)


class _Header:
    """The parsed header: version, metadata, and tensors by file name."""

    def __init__(self, path: Path, view: mmap.mmap) -> None:
        self.path, self._view, self._at, self._size = path, view, 0, len(view)
        if self._take(4, "the magic") != MAGIC:
            raise CheckpointError(f"{path}: does not start with 'GGUF', so it is no GGUF file")
        self.version = self._scalar("I", "the version")
        if self.version not in (2, 3):
            if self.version in (0x02000000, 0x03000000):
                raise CheckpointError(f"{path}: a big-endian GGUF file; only little-endian files can be opened")
            raise CheckpointError(f"{path}: GGUF version {self.version}; versions 2 and 3 can be opened")
        n_tensors = self._count("the number of tensors", MAX_TENSORS)
        n_keys = self._count("the number of keys", MAX_KEYS)
        self.metadata = self._read_metadata(n_keys)
        self.tensors = self._read_tensors(n_tensors)

    # primitive reads, each bounded by the bytes that are left ---------------------------------------------------------

    def _take(self, length: int, what: str) -> bytes:
        if length > self._size - self._at:
            raise CheckpointError(
                f"{self.path}: the header ends in the middle of {what}: {length} bytes wanted at {self._at}, "
                f"the file has {self._size}; it is incomplete or damaged, download it again"
            )
        piece = self._view[self._at : self._at + length]
        self._at += length
        return piece

    def _scalar(self, code: str, what: str) -> Any:
        return struct.unpack("<" + code, self._take(struct.calcsize("<" + code), what))[0]

    def _count(self, what: str, limit: int) -> int:
        count = self._scalar("Q", what)
        if count > limit:
            raise CheckpointError(f"{self.path}: {what} is {count}, at most {limit} can be right")
        return int(count)

    def _string(self, what: str, limit: int | None = None) -> str:
        length = self._scalar("Q", f"the length of {what}")
        if limit is not None and length > limit:
            raise CheckpointError(f"{self.path}: {what} claims {length} bytes, at most {limit} can be right")
        try:
            return self._take(length, what).decode("utf-8")
        except UnicodeDecodeError:
            raise CheckpointError(f"{self.path}: {what} is not valid UTF-8") from None

    def _value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self._string(f"the value of '{key}'")
        if kind == _ARRAY:
            return self._array(key)
        if kind not in _SCALARS:
            raise CheckpointError(f"{self.path}: key '{key}' has the unknown type {kind}")
        return self._scalar(_SCALARS[kind], f"the value of '{key}'")

    def _array(self, key: str) -> list[Any]:
        kind = self._scalar("I", f"the array type of '{key}'")
        length = self._scalar("Q", f"the array length of '{key}'")
        if kind == _STRING:
            smallest = 8  # an empty string still has its length
        elif kind in _SCALARS:
            smallest = struct.calcsize("<" + _SCALARS[kind])
        else:
            raise CheckpointError(f"{self.path}: key '{key}' is an array of the unknown or nested type {kind}")
        if length > MAX_ARRAY or length * smallest > self._size - self._at:
            raise CheckpointError(
                f"{self.path}: array '{key}' claims {length} entries, more than the file of {self._size} bytes can hold"
            )
        if kind == _STRING:
            return [self._string(f"entry {i} of '{key}'") for i in range(length)]
        return list(struct.unpack(f"<{length}{_SCALARS[kind]}", self._take(length * smallest, f"array '{key}'")))

    # the two tables ---------------------------------------------------------------------------------------------------

    def _read_metadata(self, n_keys: int) -> dict[str, Any]:
        metadata: dict[str, Any] = {}
        for index in range(n_keys):
            key = self._string(f"key {index}", MAX_NAME)
            if key in metadata:
                raise CheckpointError(f"{self.path}: key '{key}' appears twice")
            metadata[key] = self._value(self._scalar("I", f"the type of '{key}'"), key)
        return metadata

    def _read_tensors(self, n_tensors: int) -> dict[str, TensorInfo]:
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1) or alignment > 1 << 20:
            raise CheckpointError(f"{self.path}: general.alignment is {alignment!r}, expected a power of two from 8 up")
        entries = [self._read_tensor_entry(index) for index in range(n_tensors)]
        data_start = -(-self._at // alignment) * alignment
        tensors: dict[str, TensorInfo] = {}
        for name, shape, type_id, offset in entries:
            if name in tensors:
                raise CheckpointError(f"{self.path}: tensor '{name}' appears twice")
            if offset % alignment:
                raise CheckpointError(f"{self.path}: tensor '{name}' starts at {offset}, not a multiple of {alignment}")
            if type_id not in BY_GGML_ID:
                label = OTHER_GGML_NAMES.get(type_id, f"id {type_id}")
                known = ", ".join(fmt.name for fmt in BY_GGML_ID.values())
                raise CheckpointError(f"{self.path}: tensor '{name}' is stored as {label}; this version opens {known}")
            fmt = BY_GGML_ID[type_id]
            nbytes = checked_extent(self.path, name, shape, fmt, data_start + offset, self._size)
            tensors[name] = TensorInfo(name, shape, fmt, data_start + offset, nbytes)
        _refuse_overlaps(self.path, tensors)
        return tensors

    def _read_tensor_entry(self, index: int) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string(f"the name of tensor {index}", MAX_NAME)
        n_dims = self._scalar("I", f"the dimensions of tensor '{name}'")
        if not 1 <= n_dims <= 4:
            raise CheckpointError(f"{self.path}: tensor '{name}' has {n_dims} dimensions, expected 1 to 4")
        dims = struct.unpack(f"<{n_dims}Q", self._take(8 * n_dims, f"the dimensions of tensor '{name}'"))
        type_id = self._scalar("I", f"the type of tensor '{name}'")
        offset = self._scalar("Q", f"the offset of tensor '{name}'")
        return name, tuple(reversed(dims)), type_id, offset  # the file lists the innermost dimension first


def _refuse_overlaps(path: Path, tensors: Mapping[str, TensorInfo]) -> None:
    ordered = sorted(tensors.values(), key=lambda info: info.offset)
    for before, after in zip(ordered, ordered[1:], strict=False):
        if before.offset + before.nbytes > after.offset:
            raise CheckpointError(f"{path}: tensors '{before.name}' and '{after.name}' overlap in the file")


def _canonical(path: Path, tensors: Mapping[str, TensorInfo], n_layers: int) -> dict[str, TensorInfo]:
    """Rename to canonical names. A tensor we do not know would change the answer, so it is an error."""
    renamed: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        target = _TOP.get(name)
        if found := _LAYER_NAME.fullmatch(name):
            number, rest = int(found[1]), found[2]
            if number < n_layers and rest in _LAYER:
                target = f"layers.{number}.{_LAYER[rest]}"
        if target is None:
            raise CheckpointError(f"{path}: tensor '{name}' is not part of the LLaMA architecture")
        renamed[target] = info
    return renamed


def _file_name(canonical: str) -> str:
    """The name a GGUF file gives to a tensor."""
    if not canonical.startswith("layers."):
        return next((name for name, target in _TOP.items() if target == canonical), canonical)
    _, number, part = canonical.split(".", 2)
    return next((f"blk.{number}.{name}" for name, target in _LAYER.items() if target == part), canonical)


def _config(path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> ModelConfig:
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise CheckpointError(f"{path}: architecture {architecture!r}; this version opens 'llama'")
    keys = _Keys(path, metadata)
    dim = keys.integer("llama.embedding_length", 1, 1 << 20)
    n_heads = keys.integer("llama.attention.head_count", 1, 1 << 14)
    n_kv_heads = keys.integer("llama.attention.head_count_kv", 1, n_heads, default=n_heads)
    head_dim = keys.integer("llama.attention.key_length", 1, 1 << 14, default=max(1, dim // n_heads))
    value_dim = keys.integer("llama.attention.value_length", 1, 1 << 14, default=head_dim)
    rope_dim = keys.integer("llama.rope.dimension_count", 1, 1 << 14, default=head_dim)
    if n_heads % n_kv_heads:
        raise CheckpointError(f"{path}: {n_heads} attention heads cannot be shared by {n_kv_heads} key-value heads")
    if head_dim % 2 or value_dim != head_dim or rope_dim != head_dim:
        raise CheckpointError(
            f"{path}: head sizes {head_dim} (key), {value_dim} (value), {rope_dim} (rope); expected one even number"
        )
    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(f"{path}: tensor 'token_embd.weight' is missing or has no two dimensions")
    if metadata.get("llama.expert_count", 0):
        raise CheckpointError(f"{path}: a mixture of experts; this version opens dense models")
    return ModelConfig(
        architecture="llama",
        name=str(metadata.get("general.name") or path.stem),
        dim=dim,
        n_layers=keys.integer("llama.block_count", 1, 1 << 12),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        ffn_dim=keys.integer("llama.feed_forward_length", 1, 1 << 22),
        vocab_size=embedding.shape[0],
        context=keys.integer("llama.context_length", 1, 1 << 30),
        norm_eps=keys.number("llama.attention.layer_norm_rms_epsilon", 0.0, 1.0),
        rope_theta=keys.number("llama.rope.freq_base", 1.0, 1e15, default=10000.0),
        rope_linear_scale=_rope_scale(path, keys, metadata),
        tied_output="output.weight" not in tensors,
    )


def _rope_scale(path: Path, keys: _Keys, metadata: Mapping[str, Any]) -> float:
    kind = metadata.get("llama.rope.scaling.type", "none")
    if kind in ("none", ""):
        return keys.number("llama.rope.scale_linear", 1e-6, 1e6, default=1.0)
    if kind == "linear":
        return keys.number("llama.rope.scaling.factor", 1e-6, 1e6, default=1.0)
    raise CheckpointError(f"{path}: llama.rope.scaling.type is {kind!r}; this version knows 'none' and 'linear'")


class _Keys:
    """Typed, bounded reads of metadata."""

    def __init__(self, path: Path, metadata: Mapping[str, Any]) -> None:
        self._path, self._metadata = path, metadata

    def integer(self, key: str, low: int, high: int, default: int | None = None) -> int:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise CheckpointError(f"{self._path}: {key} is {value!r}, expected a whole number from {low} to {high}")
        return value

    def number(self, key: str, low: float, high: float, default: float | None = None) -> float:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise CheckpointError(f"{self._path}: {key} is {value!r}, expected a number")
        if not low <= value <= high:
            raise CheckpointError(f"{self._path}: {key} is {value!r}, expected {low:g} to {high:g}")
        return float(value)

    def _get(self, key: str, default: Any) -> Any:
        value = self._metadata.get(key, default)
        if value is None:
            raise CheckpointError(f"{self._path}: the key '{key}' is missing")
        return value
