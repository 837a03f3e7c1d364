"""PEFT LoRA adapters: a checkpoint of any format with low-rank products added to its linears.

Format: https://huggingface.co/docs/peft/developer_guides/checkpoint. adapter_config.json says r and alpha,
adapter_model.safetensors (or .bin) holds, by the names of the Hugging Face model, lora_A (r, in) and lora_B (out, r).
W' = W + strength * alpha / r * B A.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from backend.checkpoint.base import Checkpoint, TensorInfo
from backend.checkpoint.container import RawTensor, RawTensors
from backend.checkpoint.hf import LINEARS, plain_info, plain_reader
from backend.checkpoint.hf_config import Keys
from backend.checkpoint.hf_files import read_all
from backend.checkpoint.permute import to_interleaved
from backend.checkpoint.strictjson import read_json
from backend.errors import CheckpointError
from backend.model.config import ModelConfig
from backend.tokenizer.source import TokenizerSource
from backend.weights.lora import LowRank
from backend.weights.stored import Stored

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
MAX_RANK = 1 << 14
# Settings that change what the tensors mean. Absent, null, false, 0 and empty are all "not used".
_UNSUPPORTED = (
    "use_dora", "lora_bias", "modules_to_save", "fan_in_fan_out", "layer_replication", "alora_invocation_tokens",
    "trainable_token_indices", "target_parameters", "use_qalora", "use_bdlora", "arrow_config", "enable_lora",
    "kasa_config", "monteclora_config",
)  # fmt: skip
# Initialisations that leave the base as it is. Others (PiSSA, OLoRA, CorDA, LoftQ) change the base too.
_INITIALISATIONS = (None, True, False, "gaussian", "eva", "orthogonal")
_NAME = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.[^.]+)?\.weight")
# The two tables as the adapter knew them, which PEFT saves when one of them is adapted or grew.
_WHOLE = re.compile(r"(?:base_model\.model\.)?(lm_head|(?:model\.)*embed_tokens)(?:\.base_layer)?\.weight")
_LAYER = re.compile(r"(?:model\.)*layers\.(0|[1-9]\d{0,4})\.(.+)")
_PATTERN = re.compile(r"\^?[\w.-]+")  # PEFT takes these keys as regular expressions; plain names are all it writes
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class _Pair:
    """What is added to one weight; the values are read when asked for."""

    a: RawTensor  # (r, in)
    b: RawTensor  # (out, r)
    scale: float
    heads: int | None  # not None: the rows must go from half-split to interleaved order, so many heads


class LoraCheckpoint:
    """`base` with an adapter. `read` gives a `LowRank` for what the adapter changes, else what the base gives."""

    def __init__(
        self, base: Checkpoint, pairs: Mapping[str, _Pair], whole: Mapping[str, RawTensor], files: Sequence[Path]
    ) -> None:
        self._base, self._pairs, self._whole = base, pairs, whole
        self.path: Path = base.path
        self.files: Sequence[Path] = [*base.files, *files]
        self.format: str = f"{base.format}, LoRA on {len(pairs)} weights"
        self.config: ModelConfig = base.config
        self.tokenizer: TokenizerSource = base.tokenizer
        tensors = {**base.tensors, **{name: plain_info(raw) for name, raw in whole.items()}}
        if self.config.tied_output and "output" in {*pairs, *whole}:  # the output changes, the embedding does not
            self.config = replace(base.config, tied_output=False)
            tensors.setdefault("output", tensors["tok_embeddings"])
        for name, pair in pairs.items():
            rows, rank = pair.b.shape
            kept = 4 * rank * (rows + pair.a.shape[1])  # A and B in float32
            tensors[name] = replace(tensors[name], beside=tensors[name].beside + kept)
        self.tensors: Mapping[str, TensorInfo] = tensors

    @property
    def changed(self) -> frozenset[str]:
        """Canonical names of the tensors that the adapter changes."""
        return frozenset(self._pairs)

    def read(self, name: str) -> Stored:
        stored, pair = self._without_product(name), self._pairs.get(name)
        if pair is None:
            return stored
        a, b = pair.a.view().float(), pair.b.view().float()
        if pair.heads is not None:
            b = b[to_interleaved(b.shape[0], pair.heads)]
        return LowRank(stored, a.clone(), b.clone(), pair.scale)

    def _without_product(self, name: str) -> Stored:
        if name in self._whole:
            return plain_reader(self._whole[name])()
        if name == "output" and self._base.config.tied_output:
            return self._without_product("tok_embeddings")
        return self._base.read(name)


def parse_adapter(text: str) -> tuple[str, float]:
    """PATH or PATH=STRENGTH, as presets and --lora have it."""
    place, equals, strength = text.rpartition("=")
    try:
        return (place, float(strength)) if equals and place else (text, 1.0)
    except ValueError:  # the sign is part of the path
        return text, 1.0


def with_lora(checkpoint: Checkpoint, adapter: Path, strength: float = 1.0) -> LoraCheckpoint:
    """The checkpoint with a PEFT adapter (its folder, or the weight file in it) added, `strength` times.

    Adapters stack: the result is a checkpoint. The base may be of any format; query and key rows are put into its
    order. Only headers are read here. Raises CheckpointError when the adapter needs anything but W + scale * B A, or
    does not fit the model.
    """
    if not math.isfinite(strength):
        raise CheckpointError(f"{adapter}: the strength of an adapter is {strength}, expected a number")
    folder = adapter if adapter.is_dir() else adapter.parent
    file = adapter if adapter.is_file() and adapter.name != ADAPTER_CONFIG else _weights(folder)
    settings = _Settings(folder / ADAPTER_CONFIG)
    raws = read_all([file], None)
    whole = _whole_tables(file, raws, checkpoint)
    pairs: dict[str, _Pair] = {}
    for module, (a, b) in _modules(file, raws).items():
        name = _canonical(file, module, checkpoint.config)
        if name in pairs:
            raise CheckpointError(f"{file}: two pairs of tensors are for {module!r}")
        rank = settings.rank(module)
        _check_shapes(file, module, a, b, rank, checkpoint.tensors[_stored_as(name, checkpoint)].shape)
        pairs[name] = _Pair(a, b, strength * settings.scale(module, rank), _heads(name, checkpoint.config))
    return LoraCheckpoint(checkpoint, pairs, whole, [file])


def _stored_as(name: str, checkpoint: Checkpoint) -> str:
    return "tok_embeddings" if name == "output" and checkpoint.config.tied_output else name


def _whole_tables(file: Path, raws: RawTensors, checkpoint: Checkpoint) -> dict[str, RawTensor]:
    """Embedding and output that the adapter brings whole, by canonical name; they take the place of the model's."""
    whole: dict[str, RawTensor] = {}
    for full_name, raw in raws.items():
        if found := _WHOLE.fullmatch(full_name):
            name = "output" if found[1] == "lm_head" else "tok_embeddings"
            shape = checkpoint.tensors[_stored_as(name, checkpoint)].shape
            if raw.shape != shape:
                raise CheckpointError(
                    f"{file}: '{full_name}' has shape {raw.shape}, but the model's has {shape}; an adapter that "
                    "changes the vocabulary has to be merged with PEFT first"
                )
            if name in whole:
                raise CheckpointError(f"{file}: '{full_name}' and '{whole[name].name}' are the same weight twice")
            whole[name] = raw
    return whole


def _weights(folder: Path) -> Path:
    for name in ADAPTER_FILES:
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError(f"{folder}: holds no adapter; expected {ADAPTER_CONFIG} and {' or '.join(ADAPTER_FILES)}")


def _modules(file: Path, raws: RawTensors) -> dict[str, tuple[RawTensor, RawTensor]]:
    """Module name as the base model has it -> A, B."""
    found: dict[str, dict[str, RawTensor]] = {}
    for name, raw in raws.items():
        match = _NAME.fullmatch(name)
        if _WHOLE.fullmatch(name):
            continue
        if "lora_embedding_" in name:
            raise CheckpointError(f"{file}: {name[:200]!r} adapts the embedding; this version adapts linear layers")
        if match is None:
            raise CheckpointError(f"{file}: {name[:200]!r} is no LoRA pair (lora_A, lora_B)")
        if raw.dtype not in _FLOATS:
            raise CheckpointError(f"{file}: {name[:200]!r} is stored as {raw.dtype}, expected floating-point numbers")
        pair = found.setdefault(match[1], {})
        if match[2] in pair:
            raise CheckpointError(f"{file}: there are two tensors for lora_{match[2]} of {match[1][:200]!r}")
        pair[match[2]] = raw
    if not found:
        raise CheckpointError(f"{file}: holds no LoRA pairs")
    for module, pair in found.items():
        if len(pair) != 2:
            raise CheckpointError(
                f"{file}: {module[:200]!r} has lora_{next(iter(pair))}, but not the other of the pair"
            )
    return {module: (pair["A"], pair["B"]) for module, pair in found.items()}


def _canonical(file: Path, module: str, config: ModelConfig) -> str:
    if module == "lm_head":
        return "output"
    match = _LAYER.fullmatch(module)
    if match is None or match[2] not in LINEARS:
        raise CheckpointError(f"{file}: the adapter changes {module[:200]!r}, which is no linear layer of this model")
    if int(match[1]) >= config.n_layers:
        raise CheckpointError(
            f"{file}: the adapter changes {module[:200]!r}, but the model has {config.n_layers} layers"
        )
    return f"layers.{match[1]}.{LINEARS[match[2]]}"


def _heads(name: str, config: ModelConfig) -> int | None:
    if not config.rope_interleaved:
        return None
    return {"wq": config.n_heads, "wk": config.n_kv_heads}.get(name.rpartition(".")[2])


def _check_shapes(file: Path, module: str, a: RawTensor, b: RawTensor, rank: int, shape: tuple[int, ...]) -> None:
    for letter, raw, expected in (("A", a, (rank, shape[1])), ("B", b, (shape[0], rank))):
        if raw.shape != expected:
            raise CheckpointError(
                f"{file}: lora_{letter} of '{module}' has shape {raw.shape}, expected {expected}; the adapter is for "
                "another model, or its adapter_config.json is"
            )


class _Settings:
    """adapter_config.json, checked: everything that is not plain LoRA is refused by name."""

    def __init__(self, file: Path) -> None:
        self._file = file
        values = read_json(file)
        keys = Keys(file, values)
        if values.get("peft_type") != "LORA":
            raise CheckpointError(
                f"{file}: peft_type is {str(values.get('peft_type'))[:80]!r}; this version opens LORA"
            )
        for key in _UNSUPPORTED:
            if values.get(key):
                raise CheckpointError(f"{file}: uses {key}; this version opens plain LoRA without it")
        if values.get("bias", "none") not in ("none", None):
            raise CheckpointError(
                f"{file}: bias is {str(values['bias'])[:80]!r}; this version opens adapters with 'none'"
            )
        start = values.get("init_lora_weights")
        if not any(start is known or (isinstance(start, str) and start == known) for known in _INITIALISATIONS):
            raise CheckpointError(
                f"{file}: init_lora_weights is {str(start)[:80]!r}, which changes the base model; convert the adapter "
                "to plain LoRA with PEFT"
            )
        self._rank = keys.integer("r", 1, MAX_RANK)
        self._alpha = keys.number("lora_alpha", -1e6, 1e6)
        self._root = keys.flag("use_rslora")
        self._ranks = self._pattern(values, "rank_pattern", lambda inner, key: inner.integer(key, 1, MAX_RANK))
        self._alphas = self._pattern(values, "alpha_pattern", lambda inner, key: inner.number(key, -1e6, 1e6))

    def rank(self, module: str) -> int:
        return int(_matching(self._ranks, module, self._rank))

    def scale(self, module: str, rank: int) -> float:
        alpha = _matching(self._alphas, module, self._alpha)
        return alpha / (math.sqrt(rank) if self._root else rank)

    def _pattern(self, values: Mapping[str, Any], name: str, read: Callable[[Keys, str], float]) -> dict[str, float]:
        patterns = values.get(name) or {}
        if not isinstance(patterns, dict):
            raise CheckpointError(f"{self._file}: {name} is no object")
        for key in patterns:
            if not _PATTERN.fullmatch(key):
                raise CheckpointError(
                    f"{self._file}: {name} has the key {key[:80]!r}; plain module names are expected, no expressions"
                )
        inner = Keys(self._file, patterns, name + ".")
        return {key: read(inner, key) for key in patterns}


def _matching(patterns: Mapping[str, float], module: str, default: float) -> float:
    """The first whose key is the module's name or its end at a dot, as in PEFT; "^": the whole name."""
    for key, value in patterns.items():
        if module == key.removeprefix("^") or (not key.startswith("^") and module.endswith("." + key)):
            return value
    return default
