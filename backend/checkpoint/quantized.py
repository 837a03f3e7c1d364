"""Quantised linears of Hugging Face shaped checkpoints: GPTQ, AWQ and bitsandbytes, told apart by their tensors.

Labels (quantization_config, quantize_config.json, file names) are asked only where the tensors leave a question open,
or name a packing that cannot be opened. `modules_to_not_convert` is not asked: what is plain in the file is plain.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from backend.checkpoint.base import TensorInfo
from backend.checkpoint.bnb import codebook_linear, int8_linear
from backend.checkpoint.container import RawTensors
from backend.checkpoint.gptq import LinearPlace, awq_linear, check_words, gptq_linear, stored_zero_is_value
from backend.errors import CheckpointError
from backend.model.config import ModelConfig
from backend.weights.blocks import StorageFormat
from backend.weights.stored import Stored

QuantizedTensors = dict[str, tuple[TensorInfo, Callable[[], Stored]]]

_METHODS = ("", "gptq", "awq", "bitsandbytes")
_GPTQ_FORMATS = ("", "gptq", "gptq_v2")
_AWQ_VERSIONS = ("", "gemm")
_PACKED_NAMES = (".B", ".B_24", ".qweight_packed", ".weight_packed", ".marlin_qweight")


def hf_linears(config: ModelConfig) -> dict[str, tuple[str, int, int]]:
    """Hugging Face name of every linear -> (canonical part such as "wq", out features, in features)."""
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    of_layer = {
        "self_attn.q_proj": ("wq", q, config.dim),
        "self_attn.k_proj": ("wk", kv, config.dim),
        "self_attn.v_proj": ("wv", kv, config.dim),
        "self_attn.o_proj": ("wo", config.dim, q),
        "mlp.gate_proj": ("w1", config.ffn_dim, config.dim),
        "mlp.up_proj": ("w3", config.ffn_dim, config.dim),
        "mlp.down_proj": ("w2", config.dim, config.ffn_dim),
    }
    found = {f"model.layers.{n}.{name}": place for n in range(config.n_layers) for name, place in of_layer.items()}
    return found | {"lm_head": ("output", config.vocab_size, config.dim)}


def quantized_tensors(
    path: Path, settings: Mapping[str, Any], config: ModelConfig, raws: RawTensors
) -> QuantizedTensors:
    """What is quantised, by Hugging Face name of the linear ("model.layers.0.self_attn.q_proj"): a description, and a
    function that gives the matrix as views of `raws`. Linears that are plain numbers are left out.

    `settings`: quantization_config of config.json or the content of quantize_config.json; may be empty. Small tensors
    (g_idx, a sample of the zero points, biases) are read here, the weights are not. Raises CheckpointError.
    """
    method = _refuse_labels(path, settings)
    found: QuantizedTensors = {}
    linears = hf_linears(config)
    places = {prefix: LinearPlace(path, prefix, rows, columns, raws) for prefix, (_, rows, columns) in linears.items()}
    packed = [place for prefix, place in places.items() if prefix + ".qweight" in raws]
    layouts = {place.prefix: check_words(place) for place in packed}
    gptq = [place for place in packed if layouts[place.prefix].kind == "gptq"]
    if method == "awq" and gptq:
        raise CheckpointError(
            f"{path}: tensor '{gptq[0].prefix}.qweight' of shape {gptq[0].raw('qweight').shape} is labelled AWQ but "
            "not packed as AWQ version 'gemm', the one that can be opened"
        )
    is_value = stored_zero_is_value(gptq, layouts, settings)
    for prefix, place in places.items():
        if prefix in layouts:
            if layouts[prefix].kind == "awq":
                found[prefix] = awq_linear(place)
            else:
                found[prefix] = gptq_linear(place, layouts[prefix].bits, is_value, settings)
        elif place.has("weight.absmax") or place.has("weight.quant_map"):
            found[prefix] = codebook_linear(place)
        elif place.is_int8():
            found[prefix] = int8_linear(place)
        else:
            _refuse_packed(place)
    if method in ("gptq", "awq") and not packed:
        raise CheckpointError(
            f"{path}: is labelled {method.upper()}, but has no tensor such as 'model.layers.0.self_attn.q_proj.qweight'"
        )
    for prefix in found:
        _refuse_bias(places[prefix], linears[prefix][0], config)
    return found


def quantization_name(formats: Iterable[StorageFormat]) -> str:
    """The most common of the formats for people, e.g. "GPTQ 4-bit g128 act-order"; "" when there are none."""
    counted = Counter(fmt.name for fmt in formats).most_common(1)
    return counted[0][0] if counted else ""


def _refuse_labels(path: Path, settings: Mapping[str, Any]) -> str:
    """Refuse by name what has another packing; the method that is labelled, "" for none."""
    method = _word(settings, "quant_method")
    if method not in _METHODS:
        raise CheckpointError(
            f"{path}: quantised with {method!r} (quant_method); GPTQ, AWQ and bitsandbytes can be opened"
        )
    layout = _word(settings, "checkpoint_format")
    if settings.get("is_marlin_format") is True:
        layout = "marlin"
    if method in ("", "gptq") and layout not in _GPTQ_FORMATS:
        raise CheckpointError(
            f"{path}: GPTQ weights packed as {layout!r} (checkpoint_format); 'gptq' and 'gptq_v2' can be opened"
        )
    version = _word(settings, "version")
    if method == "awq" and version not in _AWQ_VERSIONS:
        raise CheckpointError(f"{path}: AWQ weights packed as version {version!r}; version 'gemm' can be opened")
    return method


def _word(settings: Mapping[str, Any], key: str) -> str:
    value = settings.get(key)
    return "" if value is None else str(value)[:40].lower()


def _refuse_packed(place: LinearPlace) -> None:
    """A linear that is not plain and not known: say so here, better than "weight is missing" later."""
    for ending in _PACKED_NAMES:
        if place.prefix + ending in place.raws:
            raise CheckpointError(
                f"{place.path}: tensor '{place.prefix}{ending}' belongs to a packing made for one GPU kernel (such as "
                "Marlin), which cannot be opened; get the model as plain GPTQ, AWQ gemm, GGUF or unquantised"
            )


def _refuse_bias(place: LinearPlace, part: str, config: ModelConfig) -> None:
    """GPTQ files often hold biases of zeros for models without biases; any other number would change the answer."""
    if not place.has("bias") or part in config.biases:
        return
    bias = place.raw("bias")
    if bias.shape != (place.rows,):
        raise CheckpointError(f"{place.path}: tensor '{bias.name}' has shape {bias.shape}, expected {(place.rows,)}")
    if bool(bias.view().any()):
        raise CheckpointError(
            f"{place.path}: tensor '{bias.name}' is not all zero, but this model's config has no such bias"
        )
    bias.release()
