"""Files of llama.cpp before GGUF: ggml (no version), ggmf v1, ggjt v1, v2 and v3. Layout: `ggml_header.py`.

Parts (NAME, NAME.1, ...) are Meta's tensor-parallel shards: each has the whole header and its piece of every tensor.
Opening walks the headers only; data stay in the mapped files until they are asked for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from backend.checkpoint.base import TensorInfo, check_tensors
from backend.checkpoint.ggml_header import DOWNLOAD_AGAIN, FTYPES, Extent, Part, file_name, place_of, read_part
from backend.checkpoint.mapped import MappedFile
from backend.errors import CheckpointError
from backend.model.config import ModelConfig
from backend.tokenizer.source import TokenizerSource
from backend.weights.stored import PLAIN_DTYPES, Blocks, Joined, Plain, Stored

MAX_PARTS = 64


class GGMLCheckpoint:
    """An open file, or the first of several parts.

    `notes`: sentences for a person about what the file leaves open and what was assumed instead.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        parts = _open_parts(path)
        first = parts[0]
        self.files: Sequence[Path] = tuple(part.path for part in parts)
        self.format = f"{first.kind}{f' v{first.version}' if first.version else ''}, {FTYPES[first.numbers['ftype']]}"
        self.format += f", {len(parts)} parts" if len(parts) > 1 else ""
        self.tensors: Mapping[str, TensorInfo] = _joined_tensors(parts)
        self.config, self.notes = _config(first, self.tensors)
        check_tensors(path, self.config, self.tensors, file_name)
        vocabulary = {"tokens": first.tokens, "scores": first.scores}
        self.tokenizer = TokenizerSource("ggml", first.path, vocabulary)
        self._parts, self._mapped = parts, dict[Path, MappedFile]()

    def read(self, name: str) -> Stored:
        info = self.tensors[name]
        _, dim = place_of(info.name)
        pieces = [_stored(self._map(part), part.tensors[info.name]) for part in self._parts]
        return pieces[0] if dim is None or len(pieces) == 1 else Joined(pieces, dim)

    def _map(self, part: Part) -> MappedFile:
        """Mapped when first needed: looking at a file should not depend on how much memory may be mapped."""
        if part.path not in self._mapped:
            try:
                mapped = MappedFile(part.path)
            except (OSError, ValueError) as error:  # ValueError: it has become empty
                raise CheckpointError(f"{part.path}: cannot be mapped into memory ({error})") from None
            if mapped.size != part.size:
                raise CheckpointError(f"{part.path}: has changed since it was opened; open it again")
            self._mapped[part.path] = mapped
        return self._mapped[part.path]


# parts --------------------------------------------------------------------------------------------------------------


def _open_parts(path: Path) -> list[Part]:
    """The headers of all parts. The shape of the embeddings says how many there are, as in llama.cpp."""
    first = read_part(path)
    count = _n_parts(first)
    numbered = re.fullmatch(r"(.+)\.([1-9][0-9]?)", path.name)
    if count > 1 and numbered and path.with_name(numbered[1]).is_file():
        first = read_part(path.with_name(numbered[1]))  # the user pointed at a later part
        count = _n_parts(first)
    parts = [first]
    for number in range(1, count):
        other = first.path.with_name(f"{first.path.name}.{number}")
        if not other.is_file():
            raise CheckpointError(f"{first.path}: is the first of {count} parts, but {other.name} is not beside it")
        part = read_part(other)
        if (part.kind, part.version, part.numbers) != (first.kind, first.version, first.numbers):
            raise CheckpointError(f"{other}: belongs to another model than {first.path.name}: its header differs")
        parts.append(part)
    return parts


def _n_parts(part: Part) -> int:
    name, dim = "tok_embeddings.weight", part.numbers["n_embd"]
    embeddings = part.tensors.get(name)
    if embeddings is None or len(embeddings.shape) != 2:
        raise CheckpointError(f"{part.path}: tensor '{name}' is missing or has no two dimensions; {DOWNLOAD_AGAIN}")
    columns = embeddings.shape[1]
    if dim % columns or dim // columns > MAX_PARTS:
        raise CheckpointError(
            f"{part.path}: tensor '{name}' has {columns} columns, expected n_embd {dim}, or in a file of several parts "
            f"an equal share of it"
        )
    return dim // columns


def _joined_tensors(parts: Sequence[Part]) -> dict[str, TensorInfo]:
    """By canonical name, with the shapes of the whole model."""
    first, tensors = parts[0], {}
    for name, extent in first.tensors.items():
        canonical, dim = place_of(name)
        for part in parts[1:]:
            other = part.tensors.get(name)
            if other is None:
                raise CheckpointError(f"{part.path}: tensor '{name}' is missing; {first.path.name} has it")
            if (other.shape, other.format) != (extent.shape, extent.format):
                raise CheckpointError(
                    f"{part.path}: tensor '{name}' is {other.format.name} {other.shape}, expected {extent.format.name} "
                    f"{extent.shape} as in {first.path.name}"
                )
        shape = list(extent.shape)
        if dim is not None and len(shape) == 2:
            shape[dim] *= len(parts)
        tensors[canonical] = TensorInfo(name, tuple(shape), extent.format, extent.nbytes * len(parts))
    return tensors


def _stored(mapped: MappedFile, extent: Extent) -> Stored:
    release = mapped.releaser(extent.offset, extent.nbytes)
    if extent.format in PLAIN_DTYPES:
        values = mapped.typed(extent.offset, extent.nbytes, PLAIN_DTYPES[extent.format])
        return Plain(values.view(extent.shape), release)
    rows = extent.shape[0]
    return Blocks(mapped.slice(extent.offset, extent.nbytes).view(rows, extent.nbytes // rows), extent.format, release)


# numbers -------------------------------------------------------------------------------------------------


def _config(part: Part, tensors: Mapping[str, TensorInfo]) -> tuple[ModelConfig, tuple[str, ...]]:
    """The model, and what had to be assumed.

    The file says neither norm_eps nor the context nor the base of the rotary embedding. The rule:

    * Code Llama, known by its 32016 tokens, or by 48 layers with shared key-value heads (34B): 1e-5, 16384, 1000000
    * otherwise shared key-value heads, so Llama 2 70B: 1e-5, 4096, 10000
    * otherwise n_embd 8192, so LLaMA 65B: 1e-5, 2048, 10000
    * otherwise LLaMA 1: 1e-6, 2048, 10000
    """
    numbers, shapes = part.numbers, {name: tensors[name].shape for name in tensors}
    dim, n_heads, head_dim = numbers["n_embd"], numbers["n_head"], numbers["n_rot"]
    for name in ("layers.0.wk", "layers.0.w1"):
        if len(shapes.get(name, ())) != 2:
            raise CheckpointError(f"{part.path}: tensor '{file_name(name)}' is missing or has no two dimensions")
    key_rows, ffn_dim = shapes["layers.0.wk"][0], shapes["layers.0.w1"][0]
    n_kv_heads = key_rows // head_dim
    if key_rows % head_dim or n_heads % n_kv_heads:
        raise CheckpointError(
            f"{part.path}: tensor 'layers.0.attention.wk.weight' has {key_rows} rows, expected {head_dim} for each of "
            f"the key-value heads, whose number must divide {n_heads}"
        )
    shared = n_kv_heads < n_heads
    norm_eps, context, theta, family = 1e-6, 2048, 10000.0, "LLaMA 1"
    if numbers["n_vocab"] == 32016 or (shared and numbers["n_layer"] == 48):
        norm_eps, context, theta, family = 1e-5, 16384, 1000000.0, "Code Llama"
    elif shared:
        norm_eps, context, family = 1e-5, 4096, "Llama 2 70B"
    elif dim == 8192:
        norm_eps, family = 1e-5, "LLaMA 65B"
    notes = [
        f"the file does not say norm_eps; {norm_eps:g} ({family}) is assumed",
        f"the file does not say the context; {context} tokens ({family}) are assumed",
        f"the file does not say the base of the rotary embedding; {theta:g} ({family}) is assumed",
    ]
    if part.scores is None:
        notes.append("the file has no scores of its tokens; text may be cut into other tokens than in training")
    config = ModelConfig(
        architecture="llama",
        name=part.path.stem,
        dim=dim,
        n_layers=numbers["n_layer"],
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        ffn_dim=ffn_dim,
        vocab_size=numbers["n_vocab"],
        context=context,
        norm_eps=norm_eps,
        rope_theta=theta,
    )
    return config, tuple(notes)
