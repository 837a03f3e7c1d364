"""Which block format each tensor of a GGUF file gets: the named mixes of llama.cpp's quantize command.

Rules: docs/formats.md, as in llama.cpp's `llama-quant.cpp` without an importance matrix. Pure: names and sizes only.
"""

from __future__ import annotations

from dataclasses import dataclass

from backend.model.config import ModelConfig
from backend.weights.blocks import (
    BF16,
    F16,
    F32,
    Q2_K,
    Q3_K,
    Q4_0,
    Q4_1,
    Q4_K,
    Q5_0,
    Q5_1,
    Q5_K,
    Q6_K,
    Q8_0,
    BlockFormat,
)


@dataclass(frozen=True)
class Mix:
    """What `--type` names: the format of most matrices, and the number for general.file_type."""

    base: BlockFormat
    file_type: int


MIXES: dict[str, Mix] = {
    "f32": Mix(F32, 0),
    "f16": Mix(F16, 1),
    "bf16": Mix(BF16, 32),
    "q4_0": Mix(Q4_0, 2),
    "q4_1": Mix(Q4_1, 3),
    "q5_0": Mix(Q5_0, 8),
    "q5_1": Mix(Q5_1, 9),
    "q8_0": Mix(Q8_0, 7),
    "q2_k": Mix(Q2_K, 10),
    "q3_k_s": Mix(Q3_K, 11),
    "q3_k_m": Mix(Q3_K, 12),
    "q3_k_l": Mix(Q3_K, 13),
    "q4_k_s": Mix(Q4_K, 14),
    "q4_k_m": Mix(Q4_K, 15),
    "q5_k_s": Mix(Q5_K, 16),
    "q5_k_m": Mix(Q5_K, 17),
    "q6_k": Mix(Q6_K, 18),
}
# A row that is not whole blocks gets the nearest format with blocks of 32. Where llama.cpp takes IQ4_NL, which has no
# writer here, it is Q4_0: the same size.
_SMALLER_BLOCKS = {Q2_K: Q4_0, Q3_K: Q4_0, Q4_K: Q5_0, Q5_K: Q5_1, Q6_K: Q8_0}


def tensor_format(kind: str, name: str, shape: tuple[int, ...], config: ModelConfig) -> BlockFormat:
    """The format of the tensor with this canonical name in a file of type `kind` (a key of MIXES)."""
    if len(shape) == 1:
        return F32
    base = MIXES[kind].base
    if base.plain:
        return base
    if name == "output" or (name == "tok_embeddings" and config.tied_output):
        wanted = Q8_0 if base is Q8_0 or shape[-1] % Q6_K.elements else Q6_K
    elif name.startswith("layers."):
        _, number, part = name.split(".")
        wanted = _of_layer(kind, part, int(number), config)
    else:
        wanted = base
    return _that_fits(wanted, shape[-1])


def _of_layer(kind: str, part: str, layer: int, config: ModelConfig) -> BlockFormat:
    base, n = MIXES[kind].base, config.n_layers
    groups = config.n_heads // config.n_kv_heads
    wanted = base
    if part == "wv":
        if kind == "q2_k":
            wanted = Q4_K if groups >= 4 else Q3_K
        elif kind == "q3_k_m":
            wanted = Q5_K if layer < 2 else Q4_K
        elif kind == "q3_k_l":
            wanted = Q5_K
        elif kind in ("q4_k_m", "q5_k_m") and _more_bits(layer, n):
            wanted = Q6_K
        elif kind == "q4_k_s" and layer < 4:
            wanted = Q5_K
        if n == 80 and groups == 8 and wanted in (Q3_K, Q4_K):  # 70B: eight heads share it, so it costs little
            wanted = Q5_K
    elif part == "w2":
        if kind == "q2_k":
            wanted = Q3_K
        elif kind == "q3_k_m":
            wanted = Q5_K if layer < n // 16 else Q4_K
        elif kind == "q3_k_l":
            wanted = Q5_K
        elif kind in ("q4_k_m", "q5_k_m") and _more_bits(layer, n):
            wanted = Q6_K
        elif kind == "q4_k_s" and layer < n // 8:
            wanted = Q5_K
    elif part == "wo":
        wanted = {"q2_k": Q3_K, "q3_k_m": Q4_K, "q3_k_l": Q5_K}.get(kind, base)
    return wanted


def _more_bits(layer: int, n: int) -> bool:
    """The first and last eighth of the layers, and every third between."""
    return layer < n // 8 or layer >= 7 * n // 8 or (layer - n // 8) % 3 == 2


def _that_fits(fmt: BlockFormat, columns: int) -> BlockFormat:
    if columns % fmt.elements == 0:
        return fmt
    smaller = _SMALLER_BLOCKS.get(fmt, F16)
    return smaller if columns % smaller.elements == 0 else F16
