"""Tiny random models as ggml, ggmf and ggjt files of every era, with a packer of their own (numpy only).

    model = GGMLModel(kind="ggjt", version=1, weights="Q4_1")
    paths = model.write(tmp_path / "ggml-model.bin")
    model.decoded()["layers.0.attention.wq.weight"]   # exactly what a reader must get

Quantising is the simplest there is; what counts is that `decoded` and the bytes say the same by the formula of the
format (llama.cpp's ggml.c of that time).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import numpy as np

MAGICS = {"ggml": 0x67676D6C, "ggmf": 0x67676D66, "ggjt": 0x67676A74}
TYPE_IDS = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q4_2": 4, "Q4_3": 5, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "Q4_K": 12,
            "Q6_K": 14}  # fmt: skip
FTYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "ftype 4": 4, "Q4_2": 5, "Q4_3": 6, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9,
          "Q4_K": 15, "Q6_K": 18}  # fmt: skip
BY_COLUMNS = ("tok_embeddings.weight", "attention.wo.weight", "feed_forward.w2.weight")


@dataclass(frozen=True)
class GGMLModel:
    """What to write. `weights` may be "ftype 4": Q4_1 with F16 embeddings and output."""

    kind: str = "ggjt"
    version: int = 3
    weights: str = "F32"
    parts: int = 1
    padded: bool | None = None  # None: as the kind has it
    numbers: Mapping[str, int] = field(default_factory=dict)  # instead of the true hyper-parameters
    drop: tuple[str, ...] = ()  # tensors left out
    rename: Mapping[str, str] = field(default_factory=dict)
    n_layers: int = 2
    dim: int = 64
    n_heads: int = 4
    n_kv_heads: int = 4
    ffn_dim: int = 128
    n_tokens: int = 300
    seed: int = 0

    @property
    def layout(self) -> str:
        """Which era's blocks: v1, v2 or v3."""
        return f"v{self.version}" if self.kind == "ggjt" else "v1"

    def tokens(self) -> list[bytes]:
        """As LLaMA's: unknown, two control tokens, the 256 bytes, then pieces with spaces."""
        start = [" \u2047 ".encode(), b"", b"", *(bytes([value]) for value in range(256))]
        return [*start, *(f" piece{n}".encode() for n in range(self.n_tokens))][: self.n_tokens]

    def scores(self) -> list[float]:
        return [float(-n) for n in range(self.n_tokens)]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        key = self.dim // self.n_heads * self.n_kv_heads
        shapes: dict[str, tuple[int, ...]] = {
            "tok_embeddings.weight": (self.n_tokens, self.dim),
            "norm.weight": (self.dim,),
            "output.weight": (self.n_tokens, self.dim),
        }
        for n in range(self.n_layers):
            shapes |= {
                f"layers.{n}.attention.wq.weight": (self.dim, self.dim),
                f"layers.{n}.attention.wk.weight": (key, self.dim),
                f"layers.{n}.attention.wv.weight": (key, self.dim),
                f"layers.{n}.attention.wo.weight": (self.dim, self.dim),
                f"layers.{n}.feed_forward.w1.weight": (self.ffn_dim, self.dim),
                f"layers.{n}.feed_forward.w2.weight": (self.dim, self.ffn_dim),
                f"layers.{n}.feed_forward.w3.weight": (self.ffn_dim, self.dim),
                f"layers.{n}.attention_norm.weight": (self.dim,),
                f"layers.{n}.ffn_norm.weight": (self.dim,),
            }
        return shapes

    def values(self) -> dict[str, np.ndarray]:
        """float32 before quantising."""
        random = np.random.default_rng(self.seed)
        return {
            name: (random.standard_normal(shape) * 0.1 + (len(shape) == 1)).astype(np.float32)
            for name, shape in self.shapes().items()
        }

    def type_of(self, name: str) -> str:
        if len(self.shapes()[name]) == 1:
            return "F32"
        if self.weights == "ftype 4":
            return "F16" if name in ("tok_embeddings.weight", "output.weight") else "Q4_1"
        return self.weights

    def decoded(self) -> dict[str, np.ndarray]:
        """float32 that a reader must get."""
        return {name: pack(values, self.type_of(name), self.layout)[1] for name, values in self.values().items()}

    def write(self, path: Path) -> list[Path]:
        """All parts: path, path.1, ..."""
        paths = [path, *(path.with_name(f"{path.name}.{n}") for n in range(1, self.parts))]
        for number, part in enumerate(paths):
            part.write_bytes(self.bytes(number))
        return paths

    def bytes(self, part: int = 0) -> bytes:
        return b"".join(piece for piece, _ in self.pieces(part))

    def pieces(self, part: int = 0) -> Iterator[tuple[bytes, bool]]:
        """The file of one part in pieces, and whether each is data of a tensor (or else header)."""
        head = self.header()
        yield head, False
        at = len(head)
        padded = self.kind == "ggjt" if self.padded is None else self.padded
        for name, values in self.values().items():
            if name in self.drop:
                continue
            kind = self.type_of(name)
            piece = values
            if values.ndim == 2 and self.parts > 1:
                piece = np.split(values, self.parts, axis=1 if name.endswith(BY_COLUMNS) else 0)[part]
            spelt = self.rename.get(name, name).encode()
            entry = struct.pack("<3I", piece.ndim, len(spelt), TYPE_IDS[kind])
            entry += struct.pack(f"<{piece.ndim}I", *reversed(piece.shape)) + spelt
            if padded:
                entry += bytes(-(at + len(entry)) % 32)
            data = pack(piece, kind, self.layout)[0].tobytes()
            yield entry, False
            yield data, True
            at += len(entry) + len(data)

    def header(self) -> bytes:
        numbers = {
            "n_vocab": self.n_tokens,
            "n_embd": self.dim,
            "n_mult": 32,
            "n_head": self.n_heads,
            "n_layer": self.n_layers,
            "n_rot": self.dim // self.n_heads,
            "ftype": FTYPES[self.weights],
        } | dict(self.numbers)
        head = struct.pack("<I", MAGICS[self.kind])
        head += b"" if self.kind == "ggml" else struct.pack("<I", self.version)
        head += struct.pack("<7I", *numbers.values())
        for token, score in zip(self.tokens(), self.scores(), strict=True):
            head += struct.pack("<I", len(token)) + token
            head += b"" if self.kind == "ggml" else struct.pack("<f", score)
        return head


def pack(values: np.ndarray, kind: str, layout: str) -> tuple[np.ndarray, np.ndarray]:
    """(bytes of the rows, what they decode to in float32 (rows, columns))."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    if kind == "F32":
        return values.view(np.uint8), values
    if kind == "F16":
        return values.astype(np.float16).view(np.uint8), values.astype(np.float16).astype(np.float32)
    if kind.endswith("_K"):  # K types exist in v3 only, and are today's
        return _random_k_blocks(values, gguf.GGMLQuantizationType[kind])
    size = 16 if kind in ("Q4_2", "Q4_3") else 32
    blocks = values.reshape(-1, size)
    # Q4_0, Q4_1 and Q8_0 had float32 scales until v3; the others never had
    wide = layout != "v3" and kind in ("Q4_0", "Q4_1", "Q8_0")
    codes, scale, low = _quantised(blocks, kind, np.dtype("<f4" if wide else "<f2"))
    fields = [scale.view(np.uint8)]
    if low is not None:
        fields.append(low.view(np.uint8))
    if kind == "Q8_0":
        fields.append(codes.astype(np.int8).view(np.uint8))
    else:
        if kind.startswith("Q5"):
            bits = ((codes >> 4).astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(axis=1).astype("<u4")
            fields.append(bits[:, None].view(np.uint8))
        fields.append(_nibbles((codes & 15).astype(np.uint8), interleaved=layout == "v1"))
    offset = {"Q4_0": 8, "Q4_2": 8, "Q5_0": 16}.get(kind, 0)
    decoded = (codes - offset).astype(np.float32) * scale.astype(np.float32)
    if low is not None:
        decoded = decoded + low.astype(np.float32)
    return np.concatenate(fields, axis=1).reshape(values.shape[0], -1), decoded.reshape(values.shape)


def _quantised(blocks: np.ndarray, kind: str, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """(codes int (blocks, size), scale (blocks, 1), minimum (blocks, 1) or None), scales already of the stored type."""
    if kind in ("Q4_1", "Q4_3", "Q5_1"):
        top = 31 if kind == "Q5_1" else 15
        low = blocks.min(axis=1, keepdims=True).astype(dtype)
        scale = ((blocks.max(axis=1, keepdims=True) - low.astype(np.float32)) / top).astype(dtype)
        codes = np.rint((blocks - low.astype(np.float32)) / scale.astype(np.float32))
        return np.clip(codes, 0, top).astype(np.int64), scale, low
    reach = {"Q4_0": 7, "Q4_2": 7, "Q5_0": 15, "Q8_0": 127}[kind]
    scale = (np.abs(blocks).max(axis=1, keepdims=True) / reach).astype(dtype)
    codes = np.clip(np.rint(blocks / scale.astype(np.float32)), -reach - 1, reach).astype(np.int64)
    return codes + (0 if kind == "Q8_0" else reach + 1), scale, None


def _nibbles(codes: np.ndarray, interleaved: bool) -> np.ndarray:
    """Two codes a byte: neighbours (v1), or element j with element j + 16 (from v2 on)."""
    if interleaved:
        return codes[:, 0::2] | codes[:, 1::2] << 4
    half = codes.shape[1] // 2
    return codes[:, :half] | codes[:, half:] << 4


def _random_k_blocks(values: np.ndarray, kind: gguf.GGMLQuantizationType) -> tuple[np.ndarray, np.ndarray]:
    """Random codes with small scales, one pattern for each shape; the `gguf` package says what they decode to."""
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    random = np.random.default_rng(values.size)
    raw = random.integers(0, 256, (values.shape[0], values.shape[1] // elements, size), dtype=np.uint8)
    scale = np.array([0.001], dtype="<f2").view(np.uint8)
    where = {"Q4_K": (0, 2), "Q6_K": (208,)}[kind.name]
    for at in where:
        raw[..., at : at + 2] = scale
    raw = raw.reshape(values.shape[0], -1)
    return raw, gguf.dequantize(raw, kind)
