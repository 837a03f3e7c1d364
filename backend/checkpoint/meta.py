"""Meta's checkpoints: a folder with params.json and consolidated.00.pth, 01, ... of LLaMA 1, 2, 3.x or Code Llama.

With model parallelism each file holds a slice of every matrix; slices are joined when a tensor is read, view by view.
Which dimension they join along follows fairscale's layers in llama's `model.py`: column-parallel layers (wq wk wv w1
w3 output) by rows, row-parallel ones (wo w2) by columns, embeddings by columns in v1 and v2 and by rows since Llama 3.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from backend.checkpoint.base import TensorInfo, check_tensors
from backend.checkpoint.container import RawTensor, RawTensors
from backend.checkpoint.metaparams import FILE as PARAMS
from backend.checkpoint.metaparams import MetaParams, meta_config, read_params
from backend.checkpoint.torchzip import read_torch_zip
from backend.errors import CheckpointError
from backend.model.config import ModelConfig
from backend.tokenizer.source import TokenizerSource
from backend.weights.blocks import BF16, F16, F32, BlockFormat
from backend.weights.stored import Joined, Plain, Stored

__all__ = ["MetaCheckpoint", "meta_config"]

MAX_SHARDS = 16
SHARD_NAME = re.compile(r"consolidated\.([0-9]{2})\.pth")
FORMATS: dict[torch.dtype, BlockFormat] = {torch.float32: F32, torch.float16: F16, torch.bfloat16: BF16}

# Names in the file -> canonical names; `layers.N.` stays.
_TOP = {"tok_embeddings.weight": "tok_embeddings", "norm.weight": "norm", "output.weight": "output"}
_LAYER = {
    "attention_norm.weight": "attention_norm",
    "attention.wq.weight": "wq",
    "attention.wk.weight": "wk",
    "attention.wv.weight": "wv",
    "attention.wo.weight": "wo",
    "ffn_norm.weight": "ffn_norm",
    "feed_forward.w1.weight": "w1",
    "feed_forward.w2.weight": "w2",
    "feed_forward.w3.weight": "w3",
}
_LAYER_NAME = re.compile(r"layers\.(0|[1-9][0-9]{0,5})\.(.+)")
_BY_ROWS, _BY_COLUMNS, _COPIES = (
    ("output", "wq", "wk", "wv", "w1", "w3"),
    ("wo", "w2"),
    ("norm", "attention_norm", "ffn_norm"),
)
_ROTARY = "rope.freqs"  # frequencies that follow from rope_theta; some files have them


class MetaCheckpoint:
    """An open folder of Meta's. `path`: the folder, its params.json, or one of its .pth files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        folder = path if path.is_dir() else path.parent
        params = read_params(folder)
        self.files: Sequence[Path] = _shard_files(path, folder)
        self.format = f"Meta, {len(self.files)} shard{'s' if len(self.files) > 1 else ''}"
        shards = [_canonical(file, read_torch_zip(file), params.n_layers) for file in self.files]
        _check_alike(self.files, shards)
        self._parts = {name: _parts(name, [shard[name] for shard in shards], params) for name in shards[0]}
        self.config: ModelConfig = _config(folder, params, self._parts)
        self.tensors: Mapping[str, TensorInfo] = {name: parts.info for name, parts in self._parts.items()}
        check_tensors(folder, self.config, self.tensors, _file_name)
        self.tokenizer = TokenizerSource("folder", folder)

    def read(self, name: str) -> Stored:
        return self._parts[name].read()


class _Parts:
    """One tensor in all shards. `dim` None: every shard has the whole, and the first is taken."""

    def __init__(self, raw: Sequence[RawTensor], dim: int | None, copies: int = 1) -> None:
        self._raw, self._dim, self._copies = (raw if dim is not None else raw[:1]), dim, copies
        kept = self._raw[::copies]
        shape = list(kept[0].shape)
        if dim is not None:
            shape[dim] *= len(kept)
        self.info = TensorInfo(raw[0].name, tuple(shape), FORMATS[raw[0].dtype], sum(part.nbytes for part in kept))

    def read(self) -> Stored:
        if self._copies > 1:
            self._check_copies()
        kept = [Plain(part.view(), part.release) for part in self._raw[:: self._copies]]
        return kept[0] if len(kept) == 1 or self._dim is None else Joined(kept, self._dim)

    def _check_copies(self) -> None:
        """Compared here and not when the folder is opened, because it takes reading them."""
        for index, part in enumerate(self._raw):
            first = self._raw[index - index % self._copies]
            if part is not first and not _same_bits(first.view(), part.view()):
                raise CheckpointError(
                    f"{part.file}: tensor '{part.name}' differs from that in {first.file.name}; with more shards than "
                    "key and value heads they must be copies"
                )
            part.release()


def _same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    return torch.equal(first.contiguous().view(torch.uint8), second.contiguous().view(torch.uint8))


def _shard_files(path: Path, folder: Path) -> list[Path]:
    numbers: dict[int, Path] = {}
    try:
        for file in folder.iterdir():
            if found := SHARD_NAME.fullmatch(file.name):
                numbers[int(found[1])] = file
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read ({error.strerror or error})") from None
    if not numbers:
        raise CheckpointError(f"{folder}: has {PARAMS} but no file consolidated.00.pth with weights")
    if path != folder and path.name != PARAMS and path.name not in {file.name for file in numbers.values()}:
        raise CheckpointError(f"{path}: is not one of the files consolidated.NN.pth that belong to {PARAMS}")
    missing = [f"consolidated.{n:02}.pth" for n in range(max(numbers)) if n not in numbers]
    if missing:
        raise CheckpointError(f"{folder}: {', '.join(missing)} missing; there are shards up to {max(numbers):02}")
    if len(numbers) > MAX_SHARDS:
        raise CheckpointError(f"{folder}: has {len(numbers)} shards; at most {MAX_SHARDS} can be joined")
    return [numbers[n] for n in sorted(numbers)]


def _canonical(file: Path, tensors: RawTensors, n_layers: int) -> RawTensors:
    """By canonical name. A tensor we do not know would change the answer, so it is an error."""
    anchor = next((name for name in tensors if name.endswith("tok_embeddings.weight")), "tok_embeddings.weight")
    prefix = anchor.removesuffix("tok_embeddings.weight")  # of a file that nests the weights, e.g. "model."
    renamed: RawTensors = {}
    for full_name, raw in tensors.items():
        name = full_name.removeprefix(prefix)
        if name == _ROTARY or name.endswith("." + _ROTARY):
            continue
        target = _TOP.get(name)
        if found := _LAYER_NAME.fullmatch(name):
            if int(found[1]) >= n_layers:
                raise CheckpointError(f"{file}: tensor {full_name!r}, but {PARAMS} says there are {n_layers} layers")
            leaf = _LAYER.get(found[2])
            target = f"layers.{found[1]}.{leaf}" if leaf else None
        if target is None:
            raise CheckpointError(f"{file}: tensor {full_name!r} is no part of a LLaMA as Meta writes it")
        if raw.dtype not in FORMATS:
            raise CheckpointError(
                f"{file}: tensor {full_name!r} is stored as {str(raw.dtype).removeprefix('torch.')}; "
                "float32, float16 or bfloat16 is expected"
            )
        if target in renamed:
            raise CheckpointError(f"{file}: tensor {full_name!r} appears twice")
        renamed[target] = raw
    return renamed


def _check_alike(files: Sequence[Path], shards: Sequence[RawTensors]) -> None:
    for file, shard in zip(files[1:], shards[1:]):
        for name in _first(shards[0].keys() ^ shard.keys()):
            has, lacks = (files[0], file) if name in shards[0] else (file, files[0])
            raise CheckpointError(f"{lacks}: has no tensor '{_file_name(name)}', but {has.name} has it")
        for name, raw in shard.items():
            first = shards[0][name]
            if (raw.shape, raw.dtype) != (first.shape, first.dtype):
                raise CheckpointError(
                    f"{file}: tensor '{raw.name}' is {_said(raw)}, but in {files[0].name} it is {_said(first)}"
                )


def _first(names: Iterable[str]) -> list[str]:
    return sorted(names)[:1]


def _said(raw: RawTensor) -> str:
    return f"{str(raw.dtype).removeprefix('torch.')} of shape {raw.shape}"


def _parts(name: str, raw: Sequence[RawTensor], params: MetaParams) -> _Parts:
    """How the shards of a tensor make the whole."""
    leaf, n_shards = name.split(".")[-1], len(raw)
    rank = 1 if leaf in _COPIES else 2
    if len(raw[0].shape) != rank or 0 in raw[0].shape:
        raise CheckpointError(f"{raw[0].file}: tensor '{raw[0].name}' has shape {raw[0].shape}, expected {rank} sizes")
    if leaf in _COPIES:
        return _Parts(raw, None)
    if leaf == "tok_embeddings":
        return _Parts(raw, 0 if raw[0].shape[1] == params.dim else 1)
    if leaf in _BY_COLUMNS:
        return _Parts(raw, 1)
    rows = params.n_kv_heads * params.head_dim
    if leaf in ("wk", "wv") and n_shards > params.n_kv_heads and raw[0].shape[0] * n_shards > rows:
        copies, rest = divmod(raw[0].shape[0] * n_shards, rows)
        if rest == 0 and n_shards % copies == 0:
            return _Parts(raw, 0, copies)
    return _Parts(raw, 0)


def _config(folder: Path, params: MetaParams, parts: Mapping[str, _Parts]) -> ModelConfig:
    """The shapes of the embedding and of w1 are the truth; params.json may leave them out."""
    shapes = {name: parts[name].info.shape for name in ("tok_embeddings", "layers.0.w1") if name in parts}
    vocab_size = params.vocab_size or shapes.get("tok_embeddings", (1,))[0]
    ffn_dim = shapes.get("layers.0.w1", (params.ffn_dim,))[0]
    return params.config(folder.resolve().name, vocab_size, ffn_dim, tied_output="output" not in parts)


def _file_name(canonical: str) -> str:
    *layer, leaf = canonical.split(".")
    for table in (_TOP, _LAYER):
        for name, target in table.items():
            if target == leaf:
                return ".".join([*layer, name])
    return canonical
