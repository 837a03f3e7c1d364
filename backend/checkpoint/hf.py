"""Hugging Face folders: config.json beside safetensors or old torch files, whole or sharded, plain or quantised.

Names: https://huggingface.co/docs/transformers, `LlamaForCausalLM`; w1 = gate_proj, w2 = down_proj, w3 = up_proj. Query
and key rows are in half-split order, so `rope_interleaved` is False.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from backend.checkpoint.base import TensorInfo, check_tensors
from backend.checkpoint.container import RawTensor, RawTensors
from backend.checkpoint.gptq_single import config_from_tensors
from backend.checkpoint.hf_config import CONFIG_FILE, model_config
from backend.checkpoint.hf_files import read_all, weight_files
from backend.checkpoint.quantized import quantization_name, quantized_tensors
from backend.checkpoint.safetensors import MAX_NAME
from backend.checkpoint.strictjson import read_json
from backend.errors import CheckpointError
from backend.model.config import ModelConfig
from backend.tokenizer.source import TokenizerSource
from backend.weights.blocks import BF16, F16, F32, BlockFormat
from backend.weights.stored import CHUNK_ELEMENTS, Plain, Stored

LINEARS = {
    "self_attn.q_proj": "wq", "self_attn.k_proj": "wk", "self_attn.v_proj": "wv", "self_attn.o_proj": "wo",
    "mlp.gate_proj": "w1", "mlp.down_proj": "w2", "mlp.up_proj": "w3",
}  # fmt: skip
_NORMS = {"input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm"}
_TOP = {"embed_tokens": "tok_embeddings", "norm": "norm", "lm_head": "output"}
_LAYER = re.compile(r"layers\.(0|[1-9]\d{0,4})\.(.+)")
# What old versions of transformers saved beside the weights: tables that follow from the config.
_IGNORED = re.compile(r"(.*\.)?(rotary_emb\.(inv_freq|cos_cached|sin_cached)|attn\.(masked_)?bias)")
_QUANTISED_NAME = re.compile(r".*\.(qweight|SCB|weight\.quant_state\..*)")
# In the order GPTQ's own loaders look.
_QUANTISE_FILES = ("quantize_config.json", "quant_config.json")
# float64 counts as F32: the values are read in full and rounded to float32, the widest type the model computes in.
_FORMATS: dict[torch.dtype, BlockFormat] = {
    torch.float64: F32, torch.float32: F32, torch.float16: F16, torch.bfloat16: BF16,
}  # fmt: skip
Read = Callable[[], Stored]


class HFCheckpoint:
    """A folder, or one of its weight files with config.json beside it. Opening reads headers only.

    `config.vocab_size` is the number of rows of the embedding; `config.biases` are those that are stored.
    Raises CheckpointError.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        config_file = _config_file(path)
        folder = config_file.parent
        self.files, weight_map = weight_files(path)
        # GPTQ files of 2023 came alone; the shapes of their tensors say which LLaMA they are.
        values = read_json(config_file) if config_file.is_file() else {}
        everything = read_all(self.files, weight_map)
        if not config_file.is_file() and not any(name.endswith(".qweight") for name in everything):
            raise CheckpointError(f"{config_file}: is missing; the shape of the model is written there")
        raws = _needed(path, everything)
        settings = _quantisation(folder, values, raws)
        if settings is not None:
            raws = _without_zero_biases(raws)
        if values:
            config = model_config(config_file, values, _vocabulary(path, raws))
        else:
            config = config_from_tensors(path, everything)
        self.config = replace(config, biases=_biases(path, raws, config), tied_output=_tied(values, raws, config))
        if self.config.tied_output:
            raws.pop("lm_head.weight", None)
        self.tensors: dict[str, TensorInfo] = {}
        self._reads: dict[str, Read] = {}
        if settings is not None:
            raws = self._add_quantised(settings, raws)
        for name, raw in raws.items():
            self._add(_canonical(path, name, raw.name, self.config), plain_info(raw), plain_reader(raw))
        check_tensors(path, self.config, self.tensors, file_name)
        self.format = self._label()
        self.tokenizer = TokenizerSource("folder", folder)

    def read(self, name: str) -> Stored:
        """A tensor by canonical name, as views of the mapped file."""
        return self._reads[name]()

    def _add(self, name: str, info: TensorInfo, read: Read) -> None:
        if name in self.tensors:
            raise CheckpointError(
                f"{self.path}: '{info.name}' and '{self.tensors[name].name}' are the same weight twice"
            )
        self.tensors[name], self._reads[name] = info, read

    def _add_quantised(self, settings: Mapping[str, Any], raws: RawTensors) -> RawTensors:
        """Take the quantised linears; what is left of `raws` is plain."""
        named = {_full(name): raw for name, raw in raws.items()}
        found = quantized_tensors(self.path, settings, self.config, named)
        prefixes = {_short(prefix) for prefix in found}
        for prefix, (info, read) in found.items():
            self._add(_canonical(self.path, _short(prefix) + ".weight", prefix, self.config), info, read)
        return {
            name: raw for name, raw in raws.items() if name.endswith(".bias") or prefixes.isdisjoint(_parents(name))
        }

    def _label(self) -> str:
        kind = "safetensors" if self.files[0].suffix == ".safetensors" else "torch"
        shards = f", {len(self.files)} shards" if len(self.files) > 1 else ""
        quantised = quantization_name(info.format for info in self.tensors.values() if not info.format.plain)
        return f"Hugging Face {kind}{shards}" + (f", {quantised}" if quantised else "")


def _config_file(path: Path) -> Path:
    """config.json in the folder, beside the file, or in the folder that text-generation-webui names like the file."""
    if path.is_dir():
        return path / CONFIG_FILE
    named = [path.with_name(path.stem), path.with_name(path.stem.rpartition("-4bit")[0] or path.stem)]
    places = [path.parent, *named]
    return next((place / CONFIG_FILE for place in places if (place / CONFIG_FILE).is_file()), path.parent / CONFIG_FILE)


def file_name(canonical: str) -> str:
    """The name Hugging Face files give to a canonical tensor."""
    for short, name in _TOP.items():
        if name == canonical:
            return f"{'' if short == 'lm_head' else 'model.'}{short}.weight"
    _, number, part = canonical.split(".", 2)
    kind = "bias" if part.endswith("_bias") else "weight"
    names = {name: short for short, name in (LINEARS | _NORMS).items()}
    return f"model.layers.{number}.{names[part.removesuffix('_bias')]}.{kind}"


def _short(name: str) -> str:
    """Without "model.", which the files of a bare LlamaModel do not have."""
    return name.removeprefix("model.")


def _full(short: str) -> str:
    return short if short.startswith("lm_head.") else f"model.{short}"


def _parents(name: str) -> set[str]:
    """Every prefix of a dotted name: of "a.b.c" these are "a" and "a.b"."""
    parts = name.split(".")
    return {".".join(parts[:count]) for count in range(1, len(parts))}


def _needed(path: Path, everything: RawTensors) -> RawTensors:
    """By short name, without the tables nobody needs."""
    raws: RawTensors = {}
    for name, raw in everything.items():
        if _IGNORED.fullmatch(name):
            continue
        if not name.isprintable() or len(name) > MAX_NAME:
            raise CheckpointError(f"{raw.file}: a tensor has the name {name[:100]!r}, which no model has")
        if (short := _short(name)) in raws:
            raise CheckpointError(f"{path}: '{name}' and '{raws[short].name}' are the same weight twice")
        raws[short] = raw
    return raws


def _quantisation(folder: Path, values: Mapping[str, Any], raws: RawTensors) -> Mapping[str, Any] | None:
    """The settings of a quantised model, {} where only its tensors show that it is one; None for a plain model."""
    for name in _QUANTISE_FILES:
        if (folder / name).is_file():
            return read_json(folder / name)
    settings = values.get("quantization_config")
    if settings is not None:
        if not isinstance(settings, dict):
            raise CheckpointError(f"{folder / CONFIG_FILE}: quantization_config is no object")
        return settings
    return {} if any(_QUANTISED_NAME.fullmatch(name) for name in raws) else None


def _vocabulary(path: Path, raws: RawTensors) -> int:
    table = raws.get("embed_tokens.weight")
    if table is None:
        raise CheckpointError(f"{path}: tensor 'model.embed_tokens.weight' is missing; the model needs it")
    if len(table.shape) != 2 or table.shape[0] < 1:
        raise CheckpointError(f"{path}: tensor '{table.name}' has shape {table.shape}, expected (tokens, dimensions)")
    return table.shape[0]


def _biases(path: Path, raws: RawTensors, config: ModelConfig) -> frozenset[str]:
    """Which linears have a bias stored. All layers must have the same ones."""
    layers: list[set[str]] = [set() for _ in range(config.n_layers)]
    for name in raws:
        found = _LAYER.fullmatch(name)
        if found and found[2].endswith(".bias") and int(found[1]) < config.n_layers:
            linear = LINEARS.get(found[2].removesuffix(".bias"))
            layers[int(found[1])] |= {linear} if linear else set()
    for number, biases in enumerate(layers):
        if other := biases ^ layers[0]:
            raise CheckpointError(
                f"{path}: layers 0 and {number} differ in whether they have "
                f"'{file_name(f'layers.{number}.{min(other)}_bias')}'; all layers must be alike"
            )
    return frozenset(layers[0])


def _tied(values: Mapping[str, Any], raws: RawTensors, config: ModelConfig) -> bool:
    """Is the output the embedding? A stored output that differs wins over what the config says."""
    if "lm_head.weight" in raws:
        return config.tied_output and _same_values(raws["lm_head.weight"], raws["embed_tokens.weight"])
    if any(name.startswith("lm_head.") for name in raws):
        return False
    return config.tied_output or values.get("tie_word_embeddings") is None


def _same_values(one: RawTensor, other: RawTensor) -> bool:
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    left, right = one.view(), other.view()
    if left.data_ptr() == right.data_ptr() and left.stride() == right.stride():
        return True
    step = max(1, CHUNK_ELEMENTS // one.shape[1])
    same = all(torch.equal(a, b) for a, b in zip(left.split(step), right.split(step)))
    one.release()
    other.release()
    return same


def _without_zero_biases(raws: RawTensors) -> RawTensors:
    """Quantisers write a bias of zeros for every linear: drop those that are zero in all layers."""
    kinds: dict[str, list[str]] = {}
    for name, raw in raws.items():
        found = _LAYER.fullmatch(name)
        if found and found[2].removesuffix(".bias") in LINEARS and raw.dtype in _FORMATS:
            kinds.setdefault(found[2], []).append(name)
    zero = {name for names in kinds.values() if not any(raws[name].view().any() for name in names) for name in names}
    return {name: raw for name, raw in raws.items() if name not in zero}


def _canonical(path: Path, short: str, original: str, config: ModelConfig) -> str:
    """The canonical name. A tensor we do not know would change the answer, so it is an error."""
    stem, _, kind = short.rpartition(".")
    if kind == "weight" and stem in _TOP:
        return _TOP[stem]
    if found := _LAYER.fullmatch(stem):
        number, rest = int(found[1]), found[2]
        if number >= config.n_layers:
            raise CheckpointError(
                f"{path}: tensor '{original}' is of layer {number}, but {CONFIG_FILE} says there are {config.n_layers}"
            )
        if kind == "weight" and rest in LINEARS | _NORMS:
            return f"layers.{number}.{(LINEARS | _NORMS)[rest]}"
        if kind == "bias" and rest in LINEARS:
            return f"layers.{number}.{LINEARS[rest]}_bias"
    raise CheckpointError(f"{path}: tensor '{original}' is not part of the {config.architecture} architecture")


def plain_info(raw: RawTensor) -> TensorInfo:
    """What is known of a tensor of plain numbers. CheckpointError for whole numbers and 8-bit floats."""
    if raw.dtype not in _FORMATS:
        kind = str(raw.dtype).removeprefix("torch.")
        raise CheckpointError(f"{raw.file}: tensor '{raw.name}' is stored as {kind}, expected floating-point numbers")
    return TensorInfo(raw.name, raw.shape, _FORMATS[raw.dtype], raw.nbytes)


def plain_reader(raw: RawTensor) -> Read:
    """A function that gives its values as they are."""
    return lambda: Plain(raw.view(), raw.release)
