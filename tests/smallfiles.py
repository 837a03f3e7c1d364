"""The smallest files of the formats that are not Hugging Face's, see `specimens.py`."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.ggmlfiles import GGMLModel
from tests.metafiles import MetaModel, write_meta
from tests.tiny import CHAT_TEMPLATE, MERGES, tokens

DIM, FFN, HEADS, KV_HEADS, VOCABULARY = 32, 64, 4, 2, 40
KEY = DIM // HEADS * KV_HEADS
_RANDOM = np.random.default_rng


@dataclass(frozen=True)
class Specimen:
    """`files`: those to damage and what they are (see `mutations.mutate`). `entry`: what the user would point at.

    `opens_as`: model, lora, tokenizer, config, preset or easylm; `base`: the model an adapter is for.
    """

    name: str
    folder: Path
    entry: str
    files: Mapping[str, str]
    opens_as: str = "model"
    base: Path | None = None


def made(root: Path, name: str) -> Path:
    folder = root / name.replace(" ", "-")
    folder.mkdir(parents=True)
    return folder


# GGUF ---------------------------------------------------------------------------------------------------------------


def ggufs(root: Path) -> list[Specimen]:
    specimens = []
    for name, version, dim, keys in (
        ("gguf v3", 3, DIM, _byte_bpe()),
        ("gguf v3 k blocks", 3, 256, {}),
        ("gguf v1", 1, DIM, _sentencepiece()),
    ):
        folder = made(root, name)
        tensors = _gguf_tensors(dim, len(keys.get("tokenizer.ggml.tokens", range(VOCABULARY))))
        (folder / "model.gguf").write_bytes(gguf_bytes(version, _gguf_keys(dim) | keys, tensors))
        specimens.append(Specimen(name, folder, "model.gguf", {"model.gguf": "bytes"}))
    folder = made(root, "gguf split")
    names = [f"m-0000{n + 1}-of-00003.gguf" for n in range(3)]
    tensors = _gguf_tensors(DIM, VOCABULARY)
    for n, name in enumerate(names):
        split = {"split.no": n, "split.count": 3, "split.tensors.count": len(tensors)}
        keys = _gguf_keys(DIM) | split if n == 0 else split
        (folder / name).write_bytes(gguf_bytes(3, keys, dict(list(tensors.items())[n::3])))
    specimens.append(Specimen("gguf split", folder, names[0], dict.fromkeys(names, "bytes")))
    return specimens


def gguf_bytes(version: int, keys: Mapping[str, Any], tensors: Mapping[str, tuple[int, Sequence[int], bytes]]) -> bytes:
    """A GGUF file. Tensors: name -> (type id, shape rows first, bytes)."""
    sizes = {name: (kind, shape, len(raw)) for name, (kind, shape, raw) in tensors.items()}
    data = (raw + bytes(-len(raw) % 32) for _, _, raw in tensors.values())
    return gguf_header(version, keys, sizes) + b"".join(data)


def gguf_header(version: int, keys: Mapping[str, Any], tensors: Mapping[str, tuple[int, Sequence[int], int]]) -> bytes:
    """What comes before the data, by the specification. Tensors: name -> (type id, shape rows first, number of bytes),
    which follow each other in the data, each from a multiple of 32 on."""
    length = "<I" if version == 1 else "<Q"

    def text(value: str) -> bytes:
        return struct.pack(length, len(value.encode())) + value.encode()

    def value(content: Any) -> tuple[int, bytes]:
        if isinstance(content, bool):
            return 7, struct.pack("<?", content)
        if isinstance(content, str):
            return 8, text(content)
        if isinstance(content, list):
            kinds = [value(entry) for entry in content]
            head = struct.pack("<I", kinds[0][0]) + struct.pack(length, len(kinds))
            return 9, head + b"".join(raw for _, raw in kinds)
        return (4, struct.pack("<I", content)) if isinstance(content, int) else (6, struct.pack("<f", content))

    parts = [b"GGUF" + struct.pack("<I", version) + struct.pack(length, len(tensors)) + struct.pack(length, len(keys))]
    for key, content in keys.items():
        kind, raw = value(content)
        parts.append(text(key) + struct.pack("<I", kind) + raw)
    offset = 0
    for name, (kind, shape, nbytes) in tensors.items():
        dims = b"".join(struct.pack(length, size) for size in reversed(shape))
        parts.append(text(name) + struct.pack("<I", len(shape)) + dims + struct.pack("<IQ", kind, offset))
        offset += nbytes + -nbytes % 32
    head = b"".join(parts)
    return head + bytes(-len(head) % 32)


# type id -> elements and bytes of a block (ggml.h)
_SMALL = {
    0: (1, 4),
    1: (1, 2),
    30: (1, 2),
    2: (32, 18),
    3: (32, 20),
    6: (32, 22),
    7: (32, 24),
    8: (32, 34),
    20: (32, 18),
}
_LARGE = {10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 23: (256, 136), 21: (256, 110),
          18: (256, 98), 16: (256, 66)}  # fmt: skip


def _gguf_tensors(dim: int, rows: int) -> dict[str, tuple[int, Sequence[int], bytes]]:
    """Every matrix in another type."""
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (rows, dim), "output_norm.weight": (dim,), "output.weight": (rows, dim),
        "blk.0.attn_norm.weight": (dim,), "blk.0.attn_q.weight": (DIM, dim), "blk.0.attn_k.weight": (KEY, dim),
        "blk.0.attn_v.weight": (KEY, dim), "blk.0.attn_output.weight": (dim, DIM), "blk.0.ffn_norm.weight": (dim,),
        "blk.0.ffn_gate.weight": (FFN, dim), "blk.0.ffn_up.weight": (FFN, dim), "blk.0.ffn_down.weight": (dim, FFN),
    }  # fmt: skip
    large, small, random = list(_LARGE), list(_SMALL), _RANDOM(1)
    tensors: dict[str, tuple[int, Sequence[int], bytes]] = {}
    for name, shape in shapes.items():
        kind = 0 if len(shape) == 1 else large.pop() if shape[1] % 256 == 0 else small.pop()
        elements, size = (_SMALL | _LARGE)[kind]
        tensors[name] = kind, shape, random.bytes(int(np.prod(shape)) // elements * size)
    return tensors


def _gguf_keys(dim: int) -> dict[str, Any]:
    return {
        "general.architecture": "llama", "general.name": "small", "llama.block_count": 1, "llama.context_length": 64,
        "llama.embedding_length": dim, "llama.feed_forward_length": FFN, "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS, "llama.attention.key_length": DIM // HEADS,
        "llama.attention.value_length": DIM // HEADS, "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.dimension_count": DIM // HEADS, "llama.rope.freq_base": 1e4, "llama.rope.scaling.type": "linear",
        "llama.rope.scaling.factor": 2.0, "llama.attention.sliding_window": 16,
    }  # fmt: skip


def _byte_bpe() -> dict[str, Any]:
    texts = tokens()
    return {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(texts) - 3), "tokenizer.ggml.merges": list(MERGES),
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }  # fmt: skip


def pieces() -> list[tuple[str, float, int]]:
    """A SentencePiece vocabulary as LLaMA's: text, score, type."""
    start = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    middle = [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]
    words = ("\u2581", "h", "e", "l", "o", "\u2581h", "el", "lo", "ello", "\u2581hello", "[INST]")
    return [*start, *middle, *((word, -float(n), 1) for n, word in enumerate(words))]


def _sentencepiece() -> dict[str, Any]:
    texts, scores, kinds = zip(*pieces())
    return {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": list(texts), "tokenizer.ggml.scores": list(scores),
        "tokenizer.ggml.token_type": list(kinds), "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
    }  # fmt: skip


# ggml, Meta -----------------------------------------------------------------------------------------------------------


def ggmls(root: Path) -> list[Specimen]:
    specimens = []
    for kind, version, weights, parts in (
        ("ggml", 0, "Q4_0", 1), ("ggmf", 1, "F16", 2), ("ggjt", 1, "ftype 4", 1), ("ggjt", 2, "Q5_1", 1), ("ggjt", 3,
        "Q8_0", 1),
    ):  # fmt: skip
        name = f"{kind} v{version}" if version else kind
        model = GGMLModel(
            kind=kind, version=version, weights=weights, parts=parts, n_layers=1, dim=64, ffn_dim=64, n_tokens=264
        )
        folder = made(root, name)
        files = [path.name for path in model.write(folder / "ggml-model.bin")]
        specimens.append(Specimen(name, folder, files[0], dict.fromkeys(files, "bytes")))
    return specimens


def metas(root: Path) -> list[Specimen]:
    model = MetaModel(dim=DIM, n_layers=1, n_heads=HEADS, n_kv_heads=KV_HEADS, ffn_dim=96, vocab_size=VOCABULARY)
    specimens = []
    for ranks in (1, 2, 4):
        name = f"meta {ranks}"
        folder = made(root, name)
        write_meta(folder, model, ranks)
        files = {f"consolidated.{n:02}.pth": "torch" for n in range(ranks)}
        specimens.append(Specimen(name, folder, ".", {**files, "params.json": "json"}))
    return specimens


def write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value), encoding="utf-8")


def hf_config(**more: Any) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": DIM, "intermediate_size": FFN,
        "num_hidden_layers": 1, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "vocab_size": VOCABULARY,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "hidden_act": "silu",
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 8192},
        "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": [2], "attention_bias": False, **more,
    }  # fmt: skip


def easylm(root: Path) -> Specimen:
    """Two arrays whole and one in chunks, as flax's msgpack writes them."""
    folder = made(root, "easylm")

    def text(value: str) -> bytes:
        return (
            bytes([0xA0 + len(value)]) + value.encode()
            if len(value) < 32
            else b"\xd9" + bytes([len(value)]) + value.encode()
        )

    def array(*shape: int) -> bytes:
        raw = _RANDOM(3).bytes(int(np.prod(shape)) * 4)
        inner = (
            b"\x93" + bytes([0x90 + len(shape), *shape]) + text("float32") + b"\xc5" + struct.pack(">H", len(raw)) + raw
        )
        return b"\xc8" + struct.pack(">H", len(inner)) + b"\x01" + inner

    def pair(key: Sequence[str], value: bytes) -> bytes:
        path = b"".join(text(part) for part in key)
        return b"\x92" + bytes([0x90 + len(key)]) + path + b"\xc5" + struct.pack(">H", len(value)) + value

    shape = b"\x82" + text("0") + b"\x08" + text("1") + b"\x04"
    chunks = b"\x82" + text("0") + array(16) + text("1") + array(16)
    chunked = b"\x83" + text("__msgpack_chunked_array__") + b"\xc3" + text("shape") + shape + text("chunks") + chunks
    stream = pair(("params", "transformer", "wte", "embedding"), array(10, 8))
    stream += pair(("params", "transformer", "ln_f", "kernel"), array(8)) + pair(
        ("params", "lm_head", "kernel"), chunked
    )
    (folder / "stream").write_bytes(stream)
    return Specimen("easylm", folder, "stream", {"stream": "bytes"}, "easylm")


# settings alone --------------------------------------------------------------------------------------------------


def settings(root: Path) -> list[Specimen]:
    params = MetaModel(
        n_kv_heads=2, params={"use_scaled_rope": True, "ffn_dim_multiplier": 1.3, "rope_theta": 5e5}
    ).written_params()
    contents = {"config.json": hf_config(sliding_window=None), "params.json": params}
    specimens = []
    for file, value in contents.items():
        folder = made(root, f"{file} alone")
        write_json(folder / file, value)
        specimens.append(Specimen(f"{file} alone", folder, file, {file: "json"}, "config"))
    folder = made(root, "preset")
    (folder / "good.yaml").write_text(
        'title: "Small · f32"\nmodel: starter\nweights: original\ndevice: cpu\ncontext: 256\nkv_tokens: auto\n'
        "prompt_format: chatml\nlora: [a/b, c=0.5]\nsampling:\n  temperature: 0.7\n  top_k: 20\n"
    )
    return [*specimens, Specimen("preset", folder, "good.yaml", {"good.yaml": "yaml"}, "preset")]
