"""The starter's weights, rounded to float16, written into every container: by torch, safetensors and the fixture
writers, none of them code of the product.

    values = starter_values()                 # canonical name -> float16, Meta's row order
    write_meta(folder, values, ranks=3)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf.quants import dequantize
from safetensors.torch import save_file

from backend.models import ModelFolder
from backend.settings import PROJECT, Settings
from tests.ggmlfiles import GGMLModel
from tests.gptqfiles import Layer, awq_layer, gptq_layer, quantise
from tests.hffiles import to_hf
from tests.metafiles import CUT

LAYERS, DIM, HEADS, KV_HEADS, FFN, VOCABULARY = 30, 576, 9, 3, 1536, 49152
Values = Mapping[str, torch.Tensor]

_GGUF = {
    "attn_norm": "attention_norm", "attn_q": "attention.wq", "attn_k": "attention.wk", "attn_v": "attention.wv",
    "attn_output": "attention.wo", "ffn_norm": "ffn_norm", "ffn_gate": "feed_forward.w1",
    "ffn_down": "feed_forward.w2", "ffn_up": "feed_forward.w3",
}  # fmt: skip
_HF = {
    "tok_embeddings": "model.embed_tokens", "norm": "model.norm", "attention_norm": "input_layernorm",
    "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm", "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj", "feed_forward.w3": "mlp.up_proj",
}  # fmt: skip
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": DIM, "intermediate_size": FFN,
    "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 100000.0, "vocab_size": VOCABULARY,
    "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "torch_dtype": "float16",
}  # fmt: skip


def starter_path() -> Path:
    return ModelFolder(Settings().models_dir).resolve("starter", PROJECT)


@lru_cache(maxsize=1)
def starter_values() -> dict[str, torch.Tensor]:
    """Meta's names, without `.weight` -> float16, in the file's (Meta's) order of rows."""
    values = {}
    for tensor in gguf.GGUFReader(starter_path()).tensors:
        array = dequantize(tensor.data, tensor.tensor_type).astype(np.float16)
        name = tensor.name.removesuffix(".weight")
        if name.startswith("blk."):
            _, number, part = name.split(".")
            name = f"layers.{number}.{_GGUF[part]}"
        else:
            name = {"token_embd": "tok_embeddings", "output_norm": "norm"}[name]
        values[name] = torch.from_numpy(array)
    return values


def hf_name(name: str) -> str:
    if not name.startswith("layers."):
        return _HF[name]
    _, number, part = name.split(".", 2)
    return f"model.layers.{number}.{_HF[part]}"


def hf_state(values: Values) -> dict[str, torch.Tensor]:
    """Hugging Face's names without `.weight`; query and key rows in its order."""
    state = {}
    for name, value in values.items():
        heads = {"attention.wq": HEADS, "attention.wk": KV_HEADS}.get(name.split(".", 2)[-1])
        state[hf_name(name)] = to_hf(value, heads).contiguous() if heads else value
    return state


def write_config(folder: Path, **changes: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))


def write_hf(folder: Path, values: Values, shards: int = 1, container: str = "safetensors") -> Path:
    write_config(folder)
    state = {f"{name}.weight": value for name, value in hf_state(values).items()}
    names = list(state)
    whole, save, index = {
        "safetensors": ("model.safetensors", save_file, "model.safetensors.index.json"),
        "bin": ("pytorch_model.bin", torch.save, "pytorch_model.bin.index.json"),
    }[container]
    if shards == 1:
        save(state, folder / whole)
        return folder
    stem, _, ending = whole.rpartition(".")
    weight_map = {}
    for number in range(shards):
        file = f"{stem}-{number + 1:05}-of-{shards:05}.{ending}"
        part = {name: state[name] for name in names[number::shards]}
        save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def write_meta(folder: Path, values: Values, ranks: int = 1) -> Path:
    folder.mkdir(parents=True)
    params = {
        "dim": DIM, "n_layers": LAYERS, "n_heads": HEADS, "n_kv_heads": KV_HEADS, "multiple_of": 256, "norm_eps": 1e-5,
        "rope_theta": 100000.0, "vocab_size": VOCABULARY,
    }  # fmt: skip
    (folder / "params.json").write_text(json.dumps(params))
    named = {f"{name}.weight": value for name, value in values.items()}
    named["output.weight"] = named["tok_embeddings.weight"]
    for rank in range(ranks):
        shard = {}
        for name, value in named.items():
            cut = CUT[name.split(".", 2)[2] if name.startswith("layers.") else name]
            shard[name] = value if cut is None else value.chunk(ranks, dim=cut)[rank].clone()
        torch.save(shard, folder / f"consolidated.{rank:02}.pth")
    return folder


def write_gguf(path: Path, values: Values, kind: str = "F16", split: int = 0) -> Path:
    """By the gguf package, with the starter's own metadata."""
    reader = gguf.GGUFReader(starter_path())
    writer = gguf.GGUFWriter(path, "llama", split_max_tensors=split)
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        types = field.types
        sub = types[-1] if types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), types[0], sub_type=sub)
    back = {target: name for name, target in _GGUF.items()}
    quantization = gguf.GGMLQuantizationType[kind]
    for name, value in values.items():
        if name.startswith("layers."):
            _, number, part = name.split(".", 2)
            target = f"blk.{number}.{back[part]}.weight"
        else:
            target = {"tok_embeddings": "token_embd.weight", "norm": "output_norm.weight"}[name]
        array = value.float().numpy()
        if array.ndim == 1:
            writer.add_tensor(target, array)
        else:
            writer.add_tensor(target, gguf.quants.quantize(array, quantization), raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@dataclass(frozen=True)
class StarterGGML(GGMLModel):
    """The starter as a ggml file of any era; the vocabulary is a stand-in, ids are what counts."""

    n_layers: int = LAYERS
    dim: int = DIM
    n_heads: int = HEADS
    n_kv_heads: int = KV_HEADS
    ffn_dim: int = FFN
    n_tokens: int = VOCABULARY

    def values(self) -> dict[str, np.ndarray]:
        named = {f"{name}.weight": value.float().numpy() for name, value in starter_values().items()}
        return {name: named.get(name, named["tok_embeddings.weight"]) for name in self.shapes()}


# quantised folders ----------------------------------------------------------------------------------------------------


def quantised_linears(values: Values, make: Callable[[str, np.ndarray], dict[str, torch.Tensor]]) -> dict:
    """The state of a quantised folder: linears of the blocks through `make`, the rest in float16."""
    state = {}
    for name, value in hf_state(values).items():
        if ".self_attn." in name or ".mlp." in name:
            state |= make(name, value.float().numpy())
        else:
            state[f"{name}.weight"] = value
    return state


def write_quantised(folder: Path, state: dict, settings: dict, file: str = "model.safetensors") -> Path:
    write_config(folder, **({"quantization_config": settings} if settings else {}))
    if file.endswith(".pt"):
        torch.save(state, folder / file)
    else:
        save_file({name: value.contiguous() for name, value in state.items()}, folder / file)
    return folder


def gptq(values: Values, act_order: bool = False, version: int = 1) -> dict:
    def make(name: str, matrix: np.ndarray) -> dict[str, torch.Tensor]:
        return gptq_layer(name, quantise(matrix, 4, 64, act_order=act_order), version=version)

    return quantised_linears(values, make)


def awq(values: Values) -> dict:
    return quantised_linears(values, lambda name, matrix: awq_layer(name, quantise(matrix, 4, 64)))


def llm_int8(values: Values) -> dict:
    def make(name: str, matrix: np.ndarray) -> dict[str, torch.Tensor]:
        scb = np.abs(matrix).max(1).astype(np.float32)
        codes = np.round(matrix / scb[:, None] * 127).astype(np.int8)
        return {f"{name}.weight": torch.from_numpy(codes), f"{name}.SCB": torch.from_numpy(scb)}

    return quantised_linears(values, make)


def decoded(layer: Layer) -> np.ndarray:
    """float64 (out, in) of a grouped layer, all at once."""
    scales, zeros = layer.scales.astype(np.float64)[layer.index].T, layer.zeros[layer.index].T
    return scales * (layer.codes - zeros)
