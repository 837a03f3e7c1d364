"""GPTQ and AWQ layers written by plain loops over bits, from a matrix quantised by rounding.

    layer = quantise(matrix, bits=4, group=64)          # codes, scales, zeros as numbers
    tensors = gptq_layer("model.layers.0.mlp.up_proj", layer, era="c")

Nothing of the product is imported: words are built one code at a time with Python integers or numpy shifts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

AWQ_NIBBLES = (0, 2, 4, 6, 1, 3, 5, 7)  # output that nibble i of a word belongs to


@dataclass(frozen=True)
class Layer:
    """codes (out, in) ints, scales float16 (groups, out), zeros ints (groups, out), groups of the columns (in,)."""

    bits: int
    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray
    index: np.ndarray

    def values(self) -> np.ndarray:
        """float64 (out, in), one value at a time."""
        rows, columns = self.codes.shape
        out = np.empty((rows, columns))
        for column in range(columns):
            group = int(self.index[column])
            for row in range(rows):
                out[row, column] = float(self.scales[group, row]) * (
                    int(self.codes[row, column]) - int(self.zeros[group, row])
                )
        return out


def quantise(matrix: np.ndarray, bits: int = 4, group: int = -1, sym: bool = False, act_order: bool = False) -> Layer:
    """Rounding to the nearest, per group of `group` columns (-1: all), the last group may be short."""
    rows, columns = matrix.shape
    size = columns if group == -1 else group
    index = np.arange(columns) // size
    if act_order:
        index = index[np.random.default_rng(5).permutation(columns)]
    groups, top = int(index.max()) + 1, 2**bits - 1
    scales, zeros = np.zeros((groups, rows), np.float16), np.zeros((groups, rows), np.int64)
    codes = np.zeros((rows, columns), np.int64)
    for g in range(groups):
        part = matrix[:, index == g]
        low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
        if sym:
            high = np.maximum(-low, high)
            low = -high
        scale = ((high - low) / top).astype(np.float16)
        zero = np.full(rows, 2 ** (bits - 1)) if sym else np.clip(np.round(-low / scale), 0, top).astype(np.int64)
        codes[:, index == g] = np.clip(np.round(part / scale[:, None]) + zero[:, None], 0, top)
        scales[g], zeros[g] = scale, zero
    return Layer(bits, codes, scales, zeros, index)


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """(n, m) codes -> int32 (n * bits / 32, m): down each column, as formats.md section 12 lists the bits."""
    n, m = codes.shape
    words = np.zeros((n * bits // 32, m), np.uint64)
    if bits != 3:
        per = 32 // bits
        for row in range(n):
            words[row // per] |= codes[row].astype(np.uint64) << np.uint64(bits * (row % per))
        return words.astype(np.uint32).view(np.int32)
    for start in range(0, n, 32):
        w, v = start // 32 * 3, codes[start : start + 32].astype(np.uint64)
        for j in range(10):
            words[w] |= v[j] << np.uint64(3 * j)
            words[w + 1] |= v[11 + j] << np.uint64(3 * j + 1)
            words[w + 2] |= v[22 + j] << np.uint64(3 * j + 2)
        words[w] |= (v[10] & np.uint64(3)) << np.uint64(30)
        words[w + 1] |= v[10] >> np.uint64(2)
        words[w + 1] |= (v[21] & np.uint64(1)) << np.uint64(31)
        words[w + 2] |= v[21] >> np.uint64(1)
    return words.astype(np.uint32).view(np.int32)


def gptq_layer(
    prefix: str, layer: Layer, era: str = "e", version: int = 1, bias: bool = True
) -> dict[str, torch.Tensor]:
    """One layer. era a: float zeros, needs one group; b: no g_idx; c, d, e: g_idx. version 1: zero - 1 stored."""
    rows, columns = layer.codes.shape
    tensors = {"qweight": pack(layer.codes.T, layer.bits)}
    if bias:
        tensors["bias"] = np.zeros(rows, np.float16)
    if era == "a":
        assert layer.scales.shape[0] == 1
        scale = layer.scales[0].astype(np.float32)[:, None]
        tensors |= {"scales": scale, "zeros": scale * layer.zeros[0].astype(np.float32)[:, None]}
    else:
        stored = (layer.zeros - (version == 1)) & (2**layer.bits - 1)
        tensors |= {"scales": layer.scales, "qzeros": np.ascontiguousarray(pack(stored.T, layer.bits).T)}
    if era in "cde":
        tensors["g_idx"] = layer.index.astype(np.int32)
    return {f"{prefix}.{name}": torch.from_numpy(np.ascontiguousarray(value)) for name, value in tensors.items()}


def awq_layer(prefix: str, layer: Layer) -> dict[str, torch.Tensor]:
    """Version gemm: words along the outputs, nibbles interleaved, zeros as they are."""
    tensors = {
        "qweight": awq_words(layer.codes.T),
        "qzeros": awq_words(layer.zeros),
        "scales": layer.scales,
    }
    return {f"{prefix}.{name}": torch.from_numpy(np.ascontiguousarray(value)) for name, value in tensors.items()}


def awq_words(codes: np.ndarray) -> np.ndarray:
    """(n, out) codes -> int32 (n, out / 8)."""
    words = np.zeros((codes.shape[0], codes.shape[1] // 8), np.uint32)
    for nibble, output in enumerate(AWQ_NIBBLES):
        words |= codes[:, output::8].astype(np.uint32) << np.uint32(4 * nibble)
    return words.view(np.int32)
