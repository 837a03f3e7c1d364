"""Tiny random models in Hugging Face's layout, made and written by transformers and safetensors, not by code of ours.

model = tiny_hf(folder, "qwen2", tied=False, dtype=torch.bfloat16, sharded=True)      # model.state_dict() is in it
write_adapter(folder, rank=4, modules={"model.layers.0.self_attn.q_proj": (64, 64)})  # -> {name: tensor}
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

FAMILIES: dict[str, tuple[type, type]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
}
SIZES = {
    "vocab_size": 160, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip


def tiny_hf(
    folder: Path,
    family: str = "llama",
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
    sharded: bool = False,
    container: str = "safetensors",
    seed: int = 0,
    scale: float = 0.1,
    **config: Any,
) -> PreTrainedModel:
    """Write such a model into `folder` and return it. `container`: safetensors | bin (as torch.save writes).

    Values come from the seed alone: matrices N(0, scale), norms around 1, biases N(0, scale). `config`: keys of the
    family's transformers configuration, instead of those in SIZES or besides.
    """
    make_config, make_model = FAMILIES[family]
    model = make_model(make_config(**{**SIZES, "tie_word_embeddings": tied, **config}, attn_implementation="eager"))
    randomize(model, seed, scale)
    model = model.to(dtype).eval()
    folder.mkdir(parents=True, exist_ok=True)
    if container == "safetensors":
        model.save_pretrained(folder, max_shard_size="60KB" if sharded else "5GB")
    else:
        model.config.architectures = [make_model.__name__]
        model.config.save_pretrained(folder)
        write_torch(folder, model.state_dict(), shards=3 if sharded else 1)
    return model


def randomize(model: PreTrainedModel, seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(1 + 0.1 * noise if name.endswith("norm.weight") else scale * noise)


def write_torch(folder: Path, state: Mapping[str, torch.Tensor], shards: int = 1) -> None:
    """pytorch_model.bin, or its shards and their index, as transformers wrote them before safetensors."""
    if shards == 1:
        torch.save(dict(state), folder / "pytorch_model.bin")
        return
    names, weight_map = list(state), {}
    for number in range(shards):
        file = f"pytorch_model-{number + 1:05d}-of-{shards:05d}.bin"
        part = names[number::shards]
        torch.save({name: state[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    write_json(folder / "pytorch_model.bin.index.json", {"metadata": {}, "weight_map": weight_map})


def write_safetensors(file: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})


def write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value), encoding="utf-8")


def change_json(file: Path, **changes: Any) -> None:
    """Set keys; the value `...` takes a key out."""
    values = json.loads(file.read_text(encoding="utf-8"))
    values |= changes
    write_json(file, {key: value for key, value in values.items() if value is not ...})


def write_adapter(
    folder: Path,
    modules: Mapping[str, Sequence[int]],
    rank: int = 4,
    alpha: float = 8,
    seed: int = 1,
    scale: float = 0.1,
    dtype: torch.dtype = torch.float32,
    container: str = "safetensors",
    ranks: Mapping[str, int] | None = None,
    **settings: Any,
) -> dict[str, torch.Tensor]:
    """A PEFT LoRA adapter for modules of shape (out, in). `ranks`: other ranks by module. Its tensors by name."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for module, (rows, columns) in modules.items():
        r = (ranks or {}).get(module, rank)
        stem = f"base_model.model.{module}"
        tensors[f"{stem}.lora_A.weight"] = (scale * torch.randn(r, columns, generator=generator)).to(dtype)
        tensors[f"{stem}.lora_B.weight"] = (scale * torch.randn(rows, r, generator=generator)).to(dtype)
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "tiny", "r": rank,
        "lora_alpha": alpha, "lora_dropout": 0.05, "bias": "none", "fan_in_fan_out": False, "modules_to_save": None,
        "inference_mode": True, "init_lora_weights": True, "use_rslora": False, "use_dora": False,
        "rank_pattern": {}, "alpha_pattern": {},
        "target_modules": sorted({module.rpartition(".")[2] for module in modules}),
    }  # fmt: skip
    write_json(folder / "adapter_config.json", config | settings)
    if container == "safetensors":
        write_safetensors(folder / "adapter_model.safetensors", tensors)
    else:
        torch.save(tensors, folder / "adapter_model.bin")
    return tensors


def to_hf(weight: torch.Tensor, n_heads: int) -> torch.Tensor:
    """Query or key weight (or bias) from Meta's row order to Hugging Face's, as formulas of views."""
    half = weight.shape[0] // n_heads // 2
    return weight.view(n_heads, half, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def to_meta(weight: torch.Tensor, n_heads: int) -> torch.Tensor:
    """The other way."""
    half = weight.shape[0] // n_heads // 2
    return weight.view(n_heads, 2, half, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)
