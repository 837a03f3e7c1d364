"""The smallest Hugging Face folders: plain and quantised weights, adapters, tokenizers; see `specimens.py`."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from tests.gptqfiles import awq_layer, gptq_layer, quantise
from tests.smallfiles import DIM, FFN, KEY, VOCABULARY, Specimen, hf_config, made, pieces, write_json
from tests.tiny import CHAT_TEMPLATE, MERGES, tokens

LINEARS = {
    "self_attn.q_proj": (DIM, DIM), "self_attn.k_proj": (KEY, DIM), "self_attn.v_proj": (KEY, DIM),
    "self_attn.o_proj": (DIM, DIM),
    "mlp.gate_proj": (FFN, DIM), "mlp.up_proj": (FFN, DIM), "mlp.down_proj": (DIM, FFN),
}  # fmt: skip
Tensors = dict[str, torch.Tensor]


def _tables(rows: int = VOCABULARY, dtype: torch.dtype = torch.float16) -> Tensors:
    layer = "model.layers.0."
    return {
        "model.embed_tokens.weight": torch.randn(rows, DIM, dtype=dtype), "model.norm.weight": torch.ones(DIM,
        dtype=dtype),
        layer + "input_layernorm.weight": torch.ones(DIM, dtype=dtype),
        layer + "post_attention_layernorm.weight": torch.ones(DIM, dtype=dtype),
        "lm_head.weight": torch.randn(rows, DIM, dtype=dtype),
    }  # fmt: skip


def _plain_tensors(rows: int = VOCABULARY, dtype: torch.dtype = torch.bfloat16) -> Tensors:
    return _tables(rows, dtype) | {
        f"model.layers.0.{name}.weight": torch.randn(shape, dtype=dtype) for name, shape in LINEARS.items()
    }


def _shards(folder: Path, tensors: Tensors, stem: str, suffix: str, kind: str) -> dict[str, str]:
    names = [f"{stem}-0000{n + 1}-of-00002{suffix}" for n in range(2)]
    weight_map = {tensor: names[n % 2] for n, tensor in enumerate(tensors)}
    for name in names:
        part = {tensor: tensors[tensor] for tensor, place in weight_map.items() if place == name}
        if kind == "torch":
            torch.save(part, folder / name)
        else:
            save_file(part, folder / name, metadata={"format": "pt"})
    index = f"{stem}{suffix}.index.json"
    write_json(folder / index, {"metadata": {"total_size": 1}, "weight_map": weight_map})
    return {**dict.fromkeys(names, kind), index: "json"}


def plain_hf(root: Path) -> list[Specimen]:
    specimens = []
    for name, stem, suffix, kind in (
        ("safetensors", "model", ".safetensors", "safetensors"), ("torch bin", "pytorch_model", ".bin", "torch"),
    ):  # fmt: skip
        folder = made(root, f"hf {name}")
        files = _shards(folder, _plain_tensors(), stem, suffix, kind)
        write_json(folder / "config.json", hf_config())
        specimens.append(Specimen(f"hf {name}", folder, ".", files | {"config.json": "json"}))
    return specimens


def quantised_hf(root: Path) -> list[Specimen]:
    random = np.random.default_rng(2)
    matrices = {f"model.layers.0.{name}": random.standard_normal(shape) for name, shape in LINEARS.items()}
    gptq, old, awq, int8, nf4 = (_tables() for _ in range(5))
    for prefix, matrix in matrices.items():
        gptq |= gptq_layer(prefix, quantise(matrix, 4, 16, act_order=True), "e")
        old |= gptq_layer(prefix, quantise(matrix, 8 if "down" in prefix else 4), "a" if "mlp" in prefix else "b")
        awq |= awq_layer(prefix, quantise(matrix, 4, 16))
        int8 |= {prefix + ".weight": _noise(torch.int8, *matrix.shape), prefix + ".SCB": torch.rand(len(matrix))}
        nf4 |= _nf4(prefix, matrix.shape)
    specimens = []
    for name, tensors, file, settings in (
        (
            "gptq safetensors",
            gptq,
            "model.safetensors",
            {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": True},
        ),
        ("gptq pt", old, "small-4bit.pt", None),
        ("awq", awq, "model.safetensors", {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm"}),
        ("bnb int8", int8, "model.safetensors", {"quant_method": "bitsandbytes", "load_in_8bit": True}),
        ("bnb nf4", nf4, "model.safetensors", {"quant_method": "bitsandbytes", "load_in_4bit": True}),
    ):
        folder = made(root, name)
        kind = "torch" if file.endswith(".pt") else "safetensors"
        torch.save(tensors, folder / file) if kind == "torch" else save_file(tensors, folder / file)
        files = {file: kind, "config.json": "json"}
        if name == "gptq safetensors":
            write_json(folder / "config.json", hf_config())
            write_json(folder / "quantize_config.json", settings)
            files["quantize_config.json"] = "json"
        else:
            write_json(folder / "config.json", hf_config(**({"quantization_config": settings} if settings else {})))
        specimens.append(Specimen(name, folder, ".", files))
    return specimens


def _noise(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randint(-127 if dtype == torch.int8 else 0, 127, shape, dtype=dtype)


def _nf4(prefix: str, shape: Sequence[int]) -> Tensors:
    rows, columns = shape
    blocks = rows * columns // 64
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": [rows, columns],
    "nested_blocksize": 256,
             "nested_dtype": "float32", "nested_offset": 0.1}  # fmt: skip
    parts = {
        "weight": _noise(torch.uint8, rows * columns // 2, 1), "weight.absmax": _noise(torch.uint8, blocks),
        "weight.quant_map": torch.linspace(-1, 1, 16), "weight.nested_absmax": torch.rand(-(-blocks // 256)),
        "weight.nested_quant_map": torch.linspace(-1, 1, 256),
        "weight.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }  # fmt: skip
    return {f"{prefix}.{name}": value for name, value in parts.items()}


def adapters(root: Path) -> list[Specimen]:
    base = made(root, "base of adapters")
    save_file(_plain_tensors(), base / "model.safetensors")
    write_json(base / "config.json", hf_config())
    tensors: Tensors = {}
    for name in ("self_attn.q_proj", "mlp.down_proj"):
        rows, columns = LINEARS[name]
        stem = f"base_model.model.model.layers.0.{name}.lora_"
        tensors |= {f"{stem}A.weight": torch.randn(4, columns), f"{stem}B.weight": torch.randn(rows, 4)}
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 16, "bias": "none", "use_rslora": False,
    "init_lora_weights": True,
                "rank_pattern": {"down_proj": 4}, "alpha_pattern": {"q_proj": 3}, "target_modules": ["q_proj",
                "down_proj"]}  # fmt: skip
    specimens = []
    for name, file, kind in (
        ("lora", "adapter_model.safetensors", "safetensors"),
        ("lora bin", "adapter_model.bin", "torch"),
    ):
        folder = made(root, name)
        torch.save(tensors, folder / file) if kind == "torch" else save_file(tensors, folder / file)
        write_json(folder / "adapter_config.json", settings)
        specimens.append(Specimen(name, folder, ".", {file: kind, "adapter_config.json": "json"}, "lora", base))
    return specimens


# tokenizers --------------------------------------------------------------------------------------------------------


def tokenizers(root: Path) -> list[Specimen]:
    named = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "add_bos_token": True,
    "chat_template": CHAT_TEMPLATE,
             "added_tokens_decoder": {"270": {"content": "[PAD]", "special": True}}}  # fmt: skip
    side: dict[str, tuple[str, Any]] = {
        "tokenizer_config.json": ("json", named),
        "special_tokens_map.json": ("json", {"bos_token": "<s>", "additional_special_tokens": ["[INST]"]}),
        "added_tokens.json": ("json", {"[PAD]": 270}),
        "generation_config.json": ("json", {"eos_token_id": [2], "bos_token_id": 1}),
    }
    template = {"chat_template.jinja": ("template", CHAT_TEMPLATE), "tokenizer_config.json": ("json", named)}
    kinds: dict[str, dict[str, tuple[str, Any]]] = {
        "tokenizer.model": {"tokenizer.model": ("protobuf", _model_proto()), **side},
        "tiktoken": {"tokenizer.model": ("lines", _ranks())},
        "tokenizer.json": {"tokenizer.json": ("json", _llama_json()), **side},
        "tokenizer.json bytes": {"tokenizer.json": ("json", _byte_level_json())},
        "chat template": {"tokenizer.json": ("json", _llama_json()), **template},
    }
    specimens = []
    for name, contents in kinds.items():
        folder = made(root, name)
        for file, (_, content) in contents.items():
            raw = content.encode() if isinstance(content, str) else content
            (folder / file).write_bytes(raw if isinstance(raw, bytes) else json.dumps(raw).encode())
        files = {file: kind for file, (kind, _) in contents.items()}
        if name == "chat template":
            files = {"chat_template.jinja": "template"}
        specimens.append(Specimen(name, folder, ".", files, "tokenizer"))
    return specimens


def _model_proto() -> bytes:
    def field(number: int, value: int | bytes) -> bytes:
        key = number << 3 | (2 if isinstance(value, bytes) else 0)
        head = bytes([key]) if key < 128 else bytes([key & 127 | 128, key >> 7])
        return head + (bytes([len(value)]) + value if isinstance(value, bytes) else bytes([value]))

    messages = [
        field(1, text.encode()) + b"\x15" + struct.pack("<f", score) + field(3, kind) for text, score, kind in pieces()
    ]
    trainer = field(3, 2) + field(35, 1) + field(40, 0) + field(41, 1) + field(42, 2)
    normalizer = field(1, b"identity") + field(3, 1) + field(4, 0) + field(5, 1)
    return b"".join(field(1, message) for message in messages) + field(2, trainer) + field(3, normalizer)


def _ranks() -> bytes:
    found = [bytes([value]) for value in range(256)] + [b"he", b"ll", b"hell", b"hello", b" w", b"or", b" wor"]
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(found))


def _llama_json() -> dict[str, Any]:
    vocab = {text: token for token, (text, _, _) in enumerate(pieces())}
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    merges = ["\u2581 h", "e l", "l o", "el lo", "\u2581h ello"]
    return {
        "version": "1.0", "added_tokens": [{"id": n, "content": pieces()[n][0], **special} for n in range(3)],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "\u2581"}, {"type": "Replace", "pattern": {"String": " "},
            "content": "\u2581"}]},
        "pre_tokenizer": None,
        "post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
                                                                    {"Sequence": {"id": "A", "type_id": 0}}]},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}, {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True, "vocab": vocab,
                  "merges": merges},
    }  # fmt: skip


def _byte_level_json() -> dict[str, Any]:
    texts = tokens()
    return {
        "added_tokens": [{"id": n, "content": text, "special": True} for n, text in enumerate(texts[:3])],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": "\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+"},
            "behavior": "Isolated",
             "invert": False},
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}]},
        "post_processor": None, "decoder": {"type": "ByteLevel"},
        "model": {"type": "BPE", "vocab": {text: n for n, text in enumerate(texts)},
        "merges": [merge.split(" ") for merge in MERGES],
                  "ignore_merges": False},
    }  # fmt: skip
