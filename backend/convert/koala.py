"""Koala: EasyLM's `diff_checkpoint --recover_diff`, leaf by leaf: tuned = base + diff, written as bfloat16.

EasyLM keeps Meta's weights transposed ("kernel", (in, out)), with Meta's rotary order and the shards joined.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from backend.checkpoint.base import Checkpoint
from backend.checkpoint.easylm import Leaf, looks_like_easylm, read_easylm
from backend.checkpoint.hf import file_name
from backend.checkpoint.open import open_checkpoint
from backend.checkpoint.permute import to_half_split, to_interleaved
from backend.convert.easylm_writer import write_leaf
from backend.convert.gguf_writer import OutTensor
from backend.convert.hf_config import config_json
from backend.convert.output import ConvertError, check_space, whole_file
from backend.convert.recover import Progress, write_recovered
from backend.convert.rows import magnitude, pieces
from backend.convert.side_files import TOKENIZER_FILES
from backend.convert.to_hf import small_files
from backend.convert.vocab import vocabulary_keys
from backend.events import LoadProgress
from backend.model.config import ModelConfig, tensor_shapes
from backend.weights.blocks import BF16

_LAYER_KEY = re.compile(
    r"transformer/h/(0|[1-9][0-9]{0,4})/(attention/w[qkvo]|feed_forward/w[123]|attention_norm|ffn_norm)/kernel"
)
_TOP_KEYS = {
    "transformer/wte/embedding": "tok_embeddings",
    "transformer/ln_f/kernel": "norm",
    "lm_head/kernel": "output",
}
_HEADS = {4096: 32, 5120: 40, 6656: 52, 8192: 64}  # LLaMA 1: head size 128 always
_EPS = {8192: 1e-5}  # 65B; the others 1e-6
Rows = Callable[[int, int], torch.Tensor]


@dataclass(frozen=True)
class _Base:
    """Where the original weights come from: an EasyLM stream, or any checkpoint read as if it were one."""

    leaves: Mapping[str, Leaf]  # by canonical name
    checkpoint: Checkpoint | None

    def rows(self, name: str, config: ModelConfig) -> tuple[tuple[int, ...], torch.dtype, Rows, Callable[[], None]]:
        """Shape (out, in), number type, rows in Meta's order, and what to call when done."""
        if self.checkpoint is None:
            leaf = self.leaves[name]
            values = _upright(name, leaf.values())
            return tuple(values.shape), leaf.dtype, lambda start, stop: values[start:stop], leaf.release
        stored, theirs = self.checkpoint.read(name), self.checkpoint.config
        turned = not theirs.rope_interleaved and name.split(".")[-1] in ("wq", "wk")

        def rows(start: int, stop: int) -> torch.Tensor:
            found = stored.float32(start, stop) if len(stored.shape) > 1 else stored.float32()
            return found[to_interleaved(stop - start, (stop - start) // config.head_dim)] if turned else found

        return stored.shape, stored.dtype or torch.float32, rows, stored.release


def recover_koala(
    base_path: Path,
    diff_path: Path,
    target: Path,
    progress: Progress,
    stream: bool = False,
    heads: int | None = None,
    tokenizer: Path | None = None,
) -> ModelConfig:
    """Write `target`: a Hugging Face folder, or an EasyLM stream. Returns what model it is.

    `heads`: number of attention heads, where the size does not tell; `tokenizer`: a folder with its files, or one file.
    """
    diff = _canonical(diff_path, read_easylm(diff_path))
    base = _open_base(base_path)
    config = base.checkpoint.config if base.checkpoint else _config(diff_path, diff, heads)
    shapes = tensor_shapes(config)
    for where, names in ((diff_path, set(diff)), (base_path, set(base.leaves) or set(shapes))):
        if missing := sorted(set(shapes) - names) or sorted(names - set(shapes)):
            raise ConvertError(f"{where}: '{missing[0]}' is not on both sides; the diff does not belong to this base")
    for name, shape in shapes.items():
        found = _upright(name, torch.empty(diff[name].shape, device="meta")).shape
        if tuple(found) != shape:
            raise ConvertError(f"{diff_path}: '{name}' has the shape {tuple(found)}, but the base has {shape}")
    if stream:
        _write_stream(base, diff, config, target, progress)
        return config
    tensors = [OutTensor(file_name(name), shape, BF16) for name, shape in shapes.items()]
    canonical = {tensor.name: name for tensor, name in zip(tensors, shapes)}

    def rows(tensor: OutTensor, put: Callable[[torch.Tensor], None]) -> None:
        name = canonical[tensor.name]
        turned = name.split(".")[-1] in ("wq", "wk")
        whole = _upright(name, _sum(base, diff[name], name, config))
        for start, stop in pieces(tensor.shape, config.head_dim if turned else 1):
            part = whole[start:stop]
            put(part[to_half_split(stop - start, (stop - start) // config.head_dim)] if turned else part)

    write_recovered(target, BF16, tensors, rows, _files(base, config, base_path, diff_path, tokenizer), progress)
    return config


def _sum(base: _Base, diff: Leaf, name: str, config: ModelConfig) -> torch.Tensor:
    """One leaf of the tuned model in EasyLM's own layout, bfloat16; added in the type both have, else in float32."""
    shape, dtype, rows, release = base.rows(name, config)
    values = _upright(name, diff.values())
    if tuple(values.shape) != tuple(shape):
        raise ConvertError(f"'{name}' has the shape {tuple(shape)} in the base and {tuple(values.shape)} in the diff")
    common = diff.dtype if diff.dtype == dtype else torch.float32
    out = torch.empty(diff.shape, dtype=torch.bfloat16)
    upright = _upright(name, out)
    for start, stop in pieces(tuple(shape), config.head_dim):
        upright[start:stop] = rows(start, stop).to(common) + values[start:stop].to(common)
    release()
    diff.release()
    return out


def _upright(name: str, values: torch.Tensor) -> torch.Tensor:
    """(out, in) of a kernel; the embedding and the vectors are as elsewhere."""
    return values.T if values.ndim == 2 and name != "tok_embeddings" else values


def _write_stream(base: _Base, diff: Mapping[str, Leaf], config: ModelConfig, target: Path, progress: Progress) -> None:
    total = sum(2 * leaf.nbytes // leaf.dtype.itemsize for leaf in diff.values())
    check_space(target, total)
    done, stage = 0, f"Recovering {target.name}"
    progress(LoadProgress(stage, 0, total))
    with whole_file(target) as file:
        for name, leaf in diff.items():
            values = _sum(base, leaf, name, config)
            if not math.isfinite(magnitude(values)):
                raise ConvertError(f"'{name}' of the sum is not finite: base and diff do not fit")
            write_leaf(file, leaf.key.split("/"), values)
            done += 2 * values.numel()
            progress(LoadProgress(stage, done, total))


def _open_base(path: Path) -> _Base:
    if path.is_file() and looks_like_easylm(path):
        return _Base(_canonical(path, read_easylm(path)), None)
    checkpoint = open_checkpoint(path)
    if checkpoint.config.architecture != "llama" or checkpoint.config.tied_output or checkpoint.config.biases:
        raise ConvertError(f"{path}: is no LLaMA 1 model, which is what Koala's diffs were made from")
    return _Base({}, checkpoint)


def _canonical(path: Path, leaves: Mapping[str, Leaf]) -> dict[str, Leaf]:
    found: dict[str, Leaf] = {}
    for key, leaf in leaves.items():
        name = _TOP_KEYS.get(key)
        if layer := _LAYER_KEY.fullmatch(key):
            name = f"layers.{layer[1]}.{layer[2].split('/')[-1]}"
        if name is None:
            raise ConvertError(f"{path}: the key '{key}' is not part of EasyLM's LLaMA")
        if len(leaf.shape) != (1 if name.endswith("norm") else 2):
            raise ConvertError(f"{path}: the array '{key}' has the shape {leaf.shape}")
        found[name] = leaf
    return found


def _config(path: Path, leaves: Mapping[str, Leaf], heads: int | None) -> ModelConfig:
    for name in ("tok_embeddings", "layers.0.w1", "layers.0.wk"):
        if name not in leaves:
            raise ConvertError(f"{path}: '{name}' is missing, so the size of the model is unknown")
    vocabulary, dim = leaves["tok_embeddings"].shape
    n_heads = heads or _HEADS.get(dim)
    if n_heads is None or n_heads < 1 or dim % (2 * n_heads):
        raise ConvertError(f"{path}: the model has {dim} dimensions, which is no LLaMA 1; say --heads N")
    head_dim = dim // n_heads
    return ModelConfig(
        architecture="llama", name="koala", dim=dim, n_layers=sum(name.endswith(".wq") for name in leaves),
        n_heads=n_heads, n_kv_heads=max(1, leaves["layers.0.wk"].shape[1] // head_dim), head_dim=head_dim,
        ffn_dim=leaves["layers.0.w1"].shape[1], vocab_size=vocabulary, context=2048, norm_eps=_EPS.get(dim, 1e-6),
    )  # fmt: skip


def _files(
    base: _Base, config: ModelConfig, base_path: Path, diff_path: Path, tokenizer: Path | None
) -> dict[str, bytes | Path]:
    """config.json, and the tokenizer from where it was said to be, from the base, or from beside the files."""
    files: dict[str, bytes | Path] = {}
    if tokenizer is None and base.checkpoint is not None:
        keys = vocabulary_keys(base.checkpoint.tokenizer, config.vocab_size)
        files |= small_files(base.checkpoint, keys)
    else:
        files |= next((found for found in _tokenizer_files(tokenizer, base_path, diff_path) if found), {})
        if tokenizer is not None and not files:
            raise ConvertError(f"{tokenizer}: there is no tokenizer file")
    values = config_json(config, BF16.name, config.rope_scaling, {"bos": 1, "eos": 2})
    return files | {"config.json": (json.dumps(values, indent=2) + "\n").encode()}


def _tokenizer_files(tokenizer: Path | None, *beside: Path) -> Iterator[dict[str, Path]]:
    if tokenizer is not None and tokenizer.is_file():
        yield {"tokenizer.model" if tokenizer.suffix != ".json" else "tokenizer.json": tokenizer}
        return
    for folder in [tokenizer] if tokenizer is not None else [path.parent for path in beside]:
        yield {name: folder / name for name in TOKENIZER_FILES if (folder / name).is_file()}
