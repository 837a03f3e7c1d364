"""The headers of one ggml, ggmf or ggjt file, read and checked; see `ggml.py` for the model in one or several of them.

Layout, all little-endian u32 unless said: magic; version (not in ggml); n_vocab, n_embd, n_mult, n_head, n_layer,
n_rot, ftype; for each token its length, its bytes and (not in ggml) a float32 score; then tensors to the end of the
file: number of dimensions, length of the name, type, the dimensions innermost first, the name, in ggjt zeros up to a
multiple of 32, the data. Sources: llama.cpp's `convert.py` and `llama.cpp` of March to August 2023.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from backend.checkpoint.base import checked_extent
from backend.errors import CheckpointError
from backend.weights.blocks import BY_GGML_ID, OTHER_GGML_NAMES, BlockFormat
from backend.weights.legacy import legacy_format
from backend.weights.stored import PLAIN_DTYPES

# The first four bytes of a file -> the kind's name, and the block layouts of each version of it.
MAGICS: Mapping[bytes, str] = {b"lmgg": "ggml", b"fmgg": "ggmf", b"tjgg": "ggjt"}
_LAYOUTS = {"ggml": {0: "v1"}, "ggmf": {1: "v1"}, "ggjt": {1: "v1", 2: "v2", 3: "v3"}}
_PADDING = 32

MAX_TOKEN = 4096  # bytes; the longest pieces of LLaMA's vocabulary have 48
_LIMITS = {
    "n_vocab": 1 << 20, "n_embd": 1 << 17, "n_mult": 1 << 20, "n_head": 1 << 12, "n_layer": 1 << 10,
    "n_rot": 1 << 14,
}  # fmt: skip
FTYPES = (
    "F32", "F16", "Q4_0", "Q4_1", "Q4_1 with F16 embeddings and output", "Q4_2", "Q4_3", "Q8_0", "Q5_0", "Q5_1", "Q2_K",
    "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K",
)  # fmt: skip
_REMOVED_TYPES = {4: "Q4_2", 5: "Q4_3"}

# Meta's names of tensors -> canonical names, and the dimension along which parts are joined (None: each has it all).
_TOP: dict[str, tuple[str, int | None]] = {
    "tok_embeddings.weight": ("tok_embeddings", 1),
    "norm.weight": ("norm", None),
    "output.weight": ("output", 0),
}
_LAYER: dict[str, tuple[str, int | None]] = {
    "attention_norm.weight": ("attention_norm", None),
    "attention.wq.weight": ("wq", 0),
    "attention.wk.weight": ("wk", 0),
    "attention.wv.weight": ("wv", 0),
    "attention.wo.weight": ("wo", 1),
    "ffn_norm.weight": ("ffn_norm", None),
    "feed_forward.w1.weight": ("w1", 0),
    "feed_forward.w2.weight": ("w2", 1),
    "feed_forward.w3.weight": ("w3", 0),
}
_LAYER_NAME = re.compile(r"layers\.(0|[1-9][0-9]{0,3})\.([a-z0-9_.]+)")
MAX_NAME = 64  # bytes; the longest of these names has 39

DOWNLOAD_AGAIN = "it is incomplete or damaged, download it again"


@dataclass(frozen=True)
class Extent:
    """A tensor of one part: where its bytes are, and what they are."""

    shape: tuple[int, ...]
    format: BlockFormat
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Part:
    """All that the headers of one file say."""

    path: Path
    size: int
    kind: str
    version: int  # 0: none in the file
    numbers: Mapping[str, int]
    tokens: list[bytes]
    scores: list[float] | None
    tensors: Mapping[str, Extent]  # by name in the file


def read_part(path: Path) -> Part:
    try:
        with open(path, "rb") as file:
            if file.seek(0, 2) < 4:
                raise CheckpointError(f"{path}: has fewer than 4 bytes; {DOWNLOAD_AGAIN}")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
                return _Reader(path, view).part()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from None


class _Reader:
    """Reads one file's headers; every read is bounded by the bytes that are left."""

    def __init__(self, path: Path, view: mmap.mmap) -> None:
        self.path, self._view, self._at, self._size = path, view, 0, len(view)

    def part(self) -> Part:
        magic = self._take(4, "the magic")
        kind = MAGICS.get(magic)
        if kind is None:
            raise CheckpointError(f"{self.path}: starts with {magic!r}, expected a ggml, ggmf or ggjt file")
        version = 0 if kind == "ggml" else self._number("the version")
        if version not in _LAYOUTS[kind]:
            known = " to ".join(str(known) for known in (min(_LAYOUTS[kind]), max(_LAYOUTS[kind])))
            raise CheckpointError(f"{self.path}: {kind} version {version}, expected {known}")
        numbers = self._hyper_parameters()
        tokens, scores = self._vocabulary(numbers["n_vocab"], scored=kind != "ggml")
        layout = _LAYOUTS[kind][version]
        tensors = self._tensors(
            layout, numbers["n_layer"], {"ggml": (False,), "ggmf": (False, True)}.get(kind, (True,))
        )
        return Part(self.path, self._size, kind, version, numbers, tokens, scores, tensors)

    def _take(self, length: int, what: str) -> bytes:
        if length > self._size - self._at:
            raise CheckpointError(
                f"{self.path}: ends in the middle of {what}: {length} bytes wanted at {self._at}, "
                f"the file has {self._size}; {DOWNLOAD_AGAIN}"
            )
        piece = self._view[self._at : self._at + length]
        self._at += length
        return piece

    def _number(self, what: str) -> int:
        return int.from_bytes(self._take(4, what), "little")

    def _hyper_parameters(self) -> dict[str, int]:
        numbers = {key: self._number(key) for key in (*_LIMITS, "ftype")}
        if wrong := _what_is_wrong(numbers):
            raise CheckpointError(
                f"{self.path}: not the numbers of a LLaMA ({wrong}); other models' old files (GPT-J, MPT, ...) begin "
                "with the same four bytes and cannot be opened"
            )
        return numbers

    def _vocabulary(self, n_vocab: int, scored: bool) -> tuple[list[bytes], list[float] | None]:
        if n_vocab * (8 if scored else 4) > self._size - self._at:
            raise CheckpointError(
                f"{self.path}: a vocabulary of {n_vocab} tokens cannot be in the {self._size - self._at} bytes that "
                f"follow; {DOWNLOAD_AGAIN}"
            )
        tokens: list[bytes] = []
        scores: list[float] = []
        for index in range(n_vocab):
            length = self._number(f"token {index}")
            if length > MAX_TOKEN:
                raise CheckpointError(f"{self.path}: token {index} claims {length} bytes, expected at most {MAX_TOKEN}")
            tokens.append(self._take(length, f"token {index}"))
            if scored:
                (score,) = struct.unpack("<f", self._take(4, f"the score of token {index}"))
                if not math.isfinite(score):
                    raise CheckpointError(f"{self.path}: the score of token {index} is {score}, expected a number")
                scores.append(score)
        return tokens, scores if scored else None

    def _tensors(self, layout: str, n_layers: int, paddings: Sequence[bool]) -> dict[str, Extent]:
        """The tensors up to the end of the file, with the first of `paddings` with which all headers make sense.

        When none fits, the trouble of the one that came furthest is the real one.
        """
        start, furthest, trouble = self._at, -1, None
        for padded in paddings:
            tensors: dict[str, Extent] = {}
            self._at = start
            try:
                while self._at < self._size:
                    self._tensor(tensors, layout, n_layers, padded)
                return tensors
            except CheckpointError as error:
                if len(tensors) > furthest:
                    furthest, trouble = len(tensors), error
        assert trouble is not None
        raise trouble

    def _tensor(self, tensors: dict[str, Extent], layout: str, n_layers: int, padded: bool) -> None:
        at, after = self._at, f"after {len(tensors)} tensors"
        n_dims, name_length, type_id = struct.unpack("<3I", self._take(12, f"a tensor's header {after}"))
        if n_dims not in (1, 2) or not 1 <= name_length <= MAX_NAME:
            raise CheckpointError(
                f"{self.path}: no tensor begins at byte {at}, {after}: {n_dims} dimensions and a name of {name_length} "
                f"bytes, expected 1 or 2 and at most {MAX_NAME}; {DOWNLOAD_AGAIN}"
            )
        dims = struct.unpack(f"<{n_dims}I", self._take(4 * n_dims, f"a tensor's dimensions {after}"))
        raw_name = self._take(name_length, f"a tensor's name {after}")
        name = raw_name.decode("ascii", errors="replace")
        if not _is_known(name, n_layers):
            raise CheckpointError(f"{self.path}: tensor {name!r} is not part of a LLaMA of {n_layers} layers")
        if name in tensors:
            raise CheckpointError(f"{self.path}: tensor '{name}' appears twice")
        fmt = legacy_format(layout, type_id)
        if fmt is None:
            label = _REMOVED_TYPES.get(type_id) or OTHER_GGML_NAMES.get(type_id)
            label = label or (BY_GGML_ID[type_id].name if type_id in BY_GGML_ID else "unknown")
            raise CheckpointError(
                f"{self.path}: tensor '{name}' has type {type_id} ({label}), which such a file cannot hold"
            )
        if n_dims == 1 and fmt not in PLAIN_DTYPES:
            raise CheckpointError(f"{self.path}: tensor '{name}' is a vector in {fmt.name}, expected F32")
        if padded:
            self._at = -(-self._at // _PADDING) * _PADDING
        shape = tuple(reversed(dims))  # the file lists the innermost dimension first
        nbytes = checked_extent(self.path, name, shape, fmt, self._at, self._size)
        tensors[name] = Extent(shape, fmt, self._at, nbytes)
        self._at += nbytes


def _what_is_wrong(numbers: Mapping[str, int]) -> str | None:
    for key, limit in _LIMITS.items():
        if not 1 <= numbers[key] <= limit:
            return f"{key} is {numbers[key]}"
    dim, n_heads, n_rot = numbers["n_embd"], numbers["n_head"], numbers["n_rot"]
    if dim % n_heads:
        return f"n_embd {dim} is no multiple of n_head {n_heads}"
    if n_rot * n_heads != dim or n_rot % 2:
        return f"n_rot is {n_rot} where n_embd / n_head is {dim // n_heads}; expected one even number"
    return None if numbers["ftype"] < len(FTYPES) else f"ftype is {numbers['ftype']}"


def _is_known(name: str, n_layers: int) -> bool:
    found = _LAYER_NAME.fullmatch(name)
    return name in _TOP or (found is not None and int(found[1]) < n_layers and found[2] in _LAYER)


def place_of(name: str) -> tuple[str, int | None]:
    """(canonical name, dimension along which parts are joined) of a known name."""
    if name in _TOP:
        return _TOP[name]
    _, number, rest = name.split(".", 2)
    target, dim = _LAYER[rest]
    return f"layers.{number}.{target}", dim


def file_name(canonical: str) -> str:
    """The name a file gives to a tensor."""
    if not canonical.startswith("layers."):
        return f"{canonical}.weight"
    _, number, target = canonical.split(".", 2)
    return next((f"layers.{number}.{name}" for name, (known, _) in _LAYER.items() if known == target), canonical)
