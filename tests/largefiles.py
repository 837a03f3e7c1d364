"""Llama 2 70B as GGUF, as Meta's 8 shards and as 15 safetensors files: true headers, and holes where the weights are.

The files have their true sizes (39 to 138 GB) and take a few megabytes of a disk that knows holes. The tokenizer is a
SentencePiece model of 32,000 made-up pieces.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from tests.smallfiles import gguf_header
from tests.torchfiles import P2, integer, storage, text, tuple_of

DIM, LAYERS, HEADS, KV_HEADS, FFN, VOCABULARY = 8192, 80, 64, 8, 28672, 32000
KEY = DIM // HEADS * KV_HEADS
SHAPES = {
    "wq": (DIM, DIM), "wk": (KEY, DIM), "wv": (KEY, DIM), "wo": (DIM, DIM), "w1": (FFN, DIM), "w2": (DIM, FFN),
    "w3": (FFN, DIM),
}  # fmt: skip


def _sparse(path: Path, head: bytes, data: int, tail: bytes = b"") -> None:
    with open(path, "wb") as file:
        file.write(head)
        file.seek(data, os.SEEK_CUR)
        file.write(tail)
        file.truncate(len(head) + data + len(tail))


def _pieces() -> list[tuple[str, float, int]]:
    start = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3), *((f"<0x{n:02X}>", 0.0, 6) for n in range(256))]
    return [*start, *((f"\u2581w{n:x}", -float(n), 1) for n in range(VOCABULARY - len(start)))]


def write_gguf(folder: Path) -> Path:
    """One file, matrices in Q4_K."""
    folder.mkdir()
    texts, scores, kinds = (list(column) for column in zip(*_pieces(), strict=True))
    keys = {
        "general.architecture": "llama", "general.name": "70B", "llama.block_count": LAYERS,
        "llama.context_length": 4096,
        "llama.embedding_length": DIM, "llama.feed_forward_length": FFN, "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS, "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": texts, "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": kinds,
    }  # fmt: skip
    names = {
        "wq": "attn_q",
        "wk": "attn_k",
        "wv": "attn_v",
        "wo": "attn_output",
        "w1": "ffn_gate",
        "w2": "ffn_down",
        "w3": "ffn_up",
    }
    tensors: dict[str, tuple[int, Sequence[int], int]] = {}
    for name in ("token_embd", "output"):
        tensors[f"{name}.weight"] = 12, (VOCABULARY, DIM), VOCABULARY * DIM // 256 * 144
    norms = ["output_norm.weight", *(f"blk.{n}.{name}_norm.weight" for n in range(LAYERS) for name in ("attn", "ffn"))]
    tensors |= dict.fromkeys(norms, (0, (DIM,), DIM * 4))
    for n in range(LAYERS):
        for name, (rows, columns) in SHAPES.items():
            tensors[f"blk.{n}.{names[name]}.weight"] = 12, (rows, columns), rows * columns // 256 * 144
    _sparse(folder / "model.gguf", gguf_header(3, keys, tensors), sum(nbytes for _, _, nbytes in tensors.values()))
    return folder / "model.gguf"


def write_meta(folder: Path, ranks: int = 8) -> Path:
    """Eight torch zips of float16, params.json, tokenizer.model."""
    folder.mkdir()
    params = {"dim": DIM, "n_heads": HEADS, "n_kv_heads": KV_HEADS, "n_layers": LAYERS, "multiple_of": 4096,
              "ffn_dim_multiplier": 1.3, "norm_eps": 1e-5, "vocab_size": -1}  # fmt: skip
    (folder / "params.json").write_text(json.dumps(params))
    (folder / "tokenizer.model").write_bytes(model_proto(_pieces()))
    names = {"wq": "attention.wq", "wk": "attention.wk", "wv": "attention.wv", "wo": "attention.wo",
    "w1": "feed_forward.w1",
             "w2": "feed_forward.w2", "w3": "feed_forward.w3"}  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {
        "tok_embeddings.weight": (VOCABULARY, DIM // ranks), "norm.weight": (DIM,),
        "output.weight": (VOCABULARY // ranks, DIM),
    }  # fmt: skip
    for n in range(LAYERS):
        for name, (rows, columns) in SHAPES.items():
            cut = (rows, columns // ranks) if name in ("wo", "w2") else (rows // ranks, columns)
            shapes[f"layers.{n}.{names[name]}.weight"] = cut
        shapes |= {f"layers.{n}.{name}_norm.weight": (DIM,) for name in ("attention", "ffn")}
    for rank in range(ranks):
        _sparse_torch(folder / f"consolidated.{rank:02}.pth", shapes)
    return folder


def write_hf(folder: Path, shards: int = 15) -> Path:
    """Fifteen safetensors files of float16 with their index, config.json, tokenizer.model."""
    folder.mkdir()
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": DIM,
    "intermediate_size": FFN,
              "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
              "rms_norm_eps": 1e-5,
              "vocab_size": VOCABULARY, "max_position_embeddings": 4096, "tie_word_embeddings": False}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.model").write_bytes(model_proto(_pieces()))
    names = {"wq": "self_attn.q_proj", "wk": "self_attn.k_proj", "wv": "self_attn.v_proj", "wo": "self_attn.o_proj",
             "w1": "mlp.gate_proj", "w2": "mlp.down_proj", "w3": "mlp.up_proj"}  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, DIM),
        "lm_head.weight": (VOCABULARY, DIM),
    }
    shapes["model.norm.weight"] = (DIM,)
    for n in range(LAYERS):
        shapes |= {f"model.layers.{n}.{names[name]}.weight": shape for name, shape in SHAPES.items()}
        shapes |= {f"model.layers.{n}.{name}_layernorm.weight": (DIM,) for name in ("input", "post_attention")}
    ordered = list(shapes)
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = ordered[len(ordered) * shard // shards : len(ordered) * (shard + 1) // shards]
        weight_map |= dict.fromkeys(part, file)
        header, at = {}, 0
        for name in part:
            end = at + _bytes_of(shapes[name])
            header[name], at = {"dtype": "F16", "shape": list(shapes[name]), "data_offsets": [at, end]}, end
        raw = json.dumps(header).encode()
        _sparse(folder / file, struct.pack("<Q", len(raw)) + raw, at)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def _bytes_of(shape: Sequence[int]) -> int:
    return 2 * shape[0] * (shape[1] if len(shape) == 2 else 1)


def model_proto(pieces: Iterable[tuple[str, float, int]]) -> bytes:
    """A SentencePiece BPE model of these pieces (each text under 100 bytes): text, score, type."""
    parts = []
    for text_, score, kind in pieces:
        raw = text_.encode()
        piece = b"\x0a" + bytes([len(raw)]) + raw + b"\x15" + struct.pack("<f", score) + b"\x18" + bytes([kind])
        parts.append(b"\x0a" + bytes([len(piece)]) + piece)
    return b"".join(parts) + b"\x12\x02\x18\x02"


def _sparse_torch(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """A torch zip: data.pkl, then one stored member for each tensor; the directory with 64-bit offsets."""
    entries = []
    for key, (name, shape) in enumerate(shapes.items()):
        stride = (shape[1], 1) if len(shape) == 2 else (1,)
        sizes = [tuple_of(*map(integer, numbers)) for numbers in (shape, stride)]
        held = storage("HalfStorage", str(key), _bytes_of(shape) // 2)
        made = tuple_of(held, integer(0), *sizes, b"\x89", b"ccollections\nOrderedDict\n)R")
        entries.append(text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n" + made + b"R")
    pickled = P2 + b"}(" + b"".join(entries) + b"u."
    members = {"archive/data.pkl": len(pickled)}
    members |= {f"archive/data/{key}": _bytes_of(shape) for key, shape in enumerate(shapes.values())}
    directory = b""
    with open(path, "wb") as file:
        for member, nbytes in members.items():
            raw, start = member.encode(), file.tell()
            file.write(b"PK\3\4" + struct.pack("<5H3I2H", 45, 0, 0, 0, 0, 0, nbytes, nbytes, len(raw), 0) + raw)
            directory += b"PK\1\2" + struct.pack(
                "<6H3I5H2I", 45, 45, 0, 0, 0, 0, 0, nbytes, nbytes, len(raw), 12, 0, 0, 0, 0, 2**32 - 1
            )
            directory += raw + struct.pack("<2HQ", 1, 8, start)
            if member == "archive/data.pkl":
                file.write(pickled)
            else:
                file.seek(nbytes, os.SEEK_CUR)
        start, count = file.tell(), len(members)
        file.write(directory)
        end = file.tell()
        file.write(b"PK\6\6" + struct.pack("<Q2H2I4Q", 44, 45, 45, 0, 0, count, count, len(directory), start))
        file.write(b"PK\6\7" + struct.pack("<IQI", 0, end, 1))
        file.write(b"PK\5\6" + struct.pack("<4H2IH", 0, 0, count, count, len(directory), 2**32 - 1, 0))
