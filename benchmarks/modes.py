"""Every way to keep weights on the CPU: our tokens per second beside a plain loop of torch's ops on the same bytes.

Both decode one token at a time through two layers of LLaMA 7B's shape with random weights. The plain loop is what one
would write first: one op for each weight, torch's packed product where torch has one for these bytes (bfloat16, int8
by rows, 4 bit by groups), else dequantising the weight to bfloat16 and multiplying; attention over a joined cache.
Ours is the whole engine, sampling and scheduling included. Rounds take turns; what counts is the median of the ratios.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from backend.checkpoint.base import Checkpoint
from backend.checkpoint.open import open_checkpoint
from backend.model.config import ModelConfig
from backend.params import GenerationParams
from backend.presets import Preset
from backend.runtime import Prepared, Runtime, compute_threads

NAME = "modes"
SHAPE = "shape:llama-2-7b:{}:layers=2:vocabulary=2048:context=256"
PROMPT, REPLY, ROUNDS = 4, 24, 5  # tokens, tokens, counted rounds
PLAIN_SECONDS = 1.0  # of a plain reply; one that is slower has fewer tokens
GROUP = 32
# NF4, Dettmers et al. 2023 (arXiv:2305.14314), appendix E.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip

Multiply = Callable[[torch.Tensor], torch.Tensor]  # (1, in) bfloat16 -> (1, out) bfloat16
Plain = Callable[[torch.Tensor], Multiply]  # a float32 weight (out, in) -> its product


def run() -> dict[str, Any]:
    torch.set_num_threads(compute_threads())
    rows: dict[str, Any] = {}
    print(f"{'':12} {'ours t/s':>9} {'plain t/s':>10} {'ratio':>6}   (medians of rounds in turn)")
    for label, (stored, weights, plain) in MODES.items():
        rows[label] = row = _compare(label, SHAPE.format(stored), weights, plain)
        print(f"{label:12} {row['ours']:9.1f} {row['plain']:10.1f} {row['ratio']:6.2f}   {row['plain_ops']}")
    return {
        "shape": SHAPE.format("bf16"),
        "prompt_tokens": PROMPT,
        "reply_tokens": REPLY,
        "modes": rows,
    }


# the plain products ---------------------------------------------------------------------------------------------------


def plain_bf16(weight: torch.Tensor) -> Multiply:
    """F.linear in bfloat16"""
    kept = weight.bfloat16()
    return lambda x: F.linear(x, kept)


def plain_int8(weight: torch.Tensor) -> Multiply:
    """aten::_weight_int8pack_mm"""
    scale = weight.abs().amax(1) / 127
    codes = (weight / scale[:, None]).round().to(torch.int8)
    kept = scale.bfloat16()
    return lambda x: torch.ops.aten._weight_int8pack_mm(x, codes, kept)


def plain_int4(weight: torch.Tensor) -> Multiply:
    """aten::_weight_int4pack_mm_for_cpu, groups of 32"""
    groups = weight.view(weight.shape[0], -1, GROUP)
    low, high = groups.amin(-1), groups.amax(-1)
    scale = (high - low) / 15
    codes = ((groups - low[..., None]) / scale[..., None]).round().clamp(0, 15).to(torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.view(weight.shape), 1)
    scales = torch.stack([scale, low + 8 * scale], dim=-1).transpose(0, 1).contiguous().bfloat16()
    return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, GROUP, scales)


def plain_llm_int8(weight: torch.Tensor) -> Multiply:
    """codes of x and of the weight, outliers apart, dequantised to bfloat16 for F.linear"""
    scale = weight.abs().amax(1) / 127
    codes = (weight / scale[:, None]).round().to(torch.int8)

    def multiply(x: torch.Tensor) -> torch.Tensor:
        outliers = (x.abs() >= 6.0).any(0)
        rest = x.masked_fill(outliers, 0.0)
        unit = rest.abs().amax(1, keepdim=True) / 127
        wide = codes.bfloat16()
        quantised = F.linear((rest / unit).round(), wide).float() * unit.float() * scale
        if outliers.any():
            quantised = quantised + F.linear(x[:, outliers], wide[:, outliers]).float() * scale
        return quantised.bfloat16()

    return multiply


def plain_nf4(weight: torch.Tensor) -> Multiply:
    """a table lookup to bfloat16, times the scales, for F.linear"""
    table = torch.tensor(NF4)
    blocks = weight.view(-1, 64)
    largest = blocks.abs().amax(1, keepdim=True)
    codes = torch.bucketize(blocks / largest, (table[1:] + table[:-1]) / 2).to(torch.uint8)
    packed, scale, short = codes[:, ::2] << 4 | codes[:, 1::2], largest.bfloat16(), table.bfloat16()

    def multiply(x: torch.Tensor) -> torch.Tensor:
        pairs = torch.stack([packed >> 4, packed & 15], dim=-1).view(-1, 64)
        return F.linear(x, (short[pairs.int()] * scale).view(weight.shape))

    return multiply


MODES: dict[str, tuple[str, str, Plain]] = {
    "bf16": ("bf16", "bf16", plain_bf16),
    "int8": ("bf16", "int8", plain_int8),
    "llm-int8": ("bf16", "llm-int8", plain_llm_int8),
    "int4": ("q4_1", "int4", plain_int4),
    "nf4": ("bf16", "nf4", plain_nf4),
    "Q4_0 as is": ("q4_0", "original", plain_int4),
    "Q8_0 as is": ("q8_0", "original", plain_int8),
}


# the plain loop -------------------------------------------------------------------------------------------------------


class PlainModel:
    """One sequence, one token at a time, in bfloat16."""

    def __init__(self, checkpoint: Checkpoint, plain: Plain) -> None:
        self.config: ModelConfig = checkpoint.config
        read = checkpoint.read
        self.table = read("tok_embeddings").float32().bfloat16()
        self.output = plain(read("output").float32())
        names = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")
        self.layers = [
            {name: plain(read(f"layers.{n}.{name}").float32()) for name in names} for n in range(self.config.n_layers)
        ]
        self.norm = torch.ones(self.config.dim, dtype=torch.bfloat16)
        half = self.config.head_dim // 2
        self.frequencies = self.config.rope_theta ** (-torch.arange(half) / half)
        self.cache: list[list[torch.Tensor]] = []

    def reply(self, ids: list[int], count: int) -> float:
        """Read a prompt token by token, write `count` greedy tokens; returns seconds of the writing alone."""
        self.cache = [[] for _ in self.layers]
        with torch.inference_mode():
            for at, token in enumerate(ids):
                logits = self._step(token, at)
            begin = time.perf_counter()
            for at in range(len(ids), len(ids) + count):
                logits = self._step(int(logits.argmax()), at)
            return time.perf_counter() - begin

    def _step(self, token: int, at: int) -> torch.Tensor:
        x = self.table[token][None]
        angles = at * self.frequencies
        turn = torch.polar(torch.ones_like(angles), angles)
        for layer, cache in zip(self.layers, self.cache, strict=True):
            x = x + self._attention(layer, cache, self._normed(x), turn)
            y = self._normed(x)
            x = x + layer["w2"](F.silu(layer["w1"](y)) * layer["w3"](y))
        return self.output(self._normed(x))

    def _attention(
        self, layer: dict[str, Multiply], cache: list[torch.Tensor], x: torch.Tensor, turn: torch.Tensor
    ) -> torch.Tensor:
        heads = (1, -1, 1, self.config.head_dim)
        query, key = (self._turned(layer[name](x).view(heads), turn) for name in ("wq", "wk"))
        value = layer["wv"](x).view(heads)
        if cache:
            key, value = torch.cat([cache[0], key], dim=2), torch.cat([cache[1], value], dim=2)
        cache[:] = [key, value]
        return layer["wo"](F.scaled_dot_product_attention(query, key, value).view(1, -1))

    def _turned(self, x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex(x.float().view(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * turn).view(x.shape).bfloat16()

    def _normed(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (self.config.dim,), self.norm, self.config.norm_eps)


def _compare(label: str, shape: str, weights: str, plain: Plain) -> dict[str, Any]:
    preset = Preset(name=label, model=shape, weights=weights, device="cpu", placement="cpu")
    runtime = Runtime(
        Prepared(dataclasses.replace(preset, context=256, kv_tokens=256, speculation="off"), Path(shape)), 1
    )
    loop = PlainModel(open_checkpoint(Path(shape)), plain)
    ids = list(range(3, 3 + PROMPT))
    params = GenerationParams(max_tokens=REPLY + 1, temperature=0.0, ignore_eos=True)
    ours: list[float] = []
    theirs: list[float] = []
    speed = 1 / loop.reply(ids[:1], 1)
    before = ids if speed > 1 else ids[:1]  # what a slow loop has to read, a token at a time
    count, rounds = max(2, min(REPLY, int(PLAIN_SECONDS * speed))), ROUNDS if speed > 1 else 2
    for number in range(rounds + 1):  # the first round warms up
        *_, chunk = runtime.start(ids, params, use_cache=False)
        if chunk.error is not None:
            raise chunk.error
        torch.set_num_threads(compute_threads())
        speeds = chunk.stats.tokens_per_second or 0.0, count / loop.reply(before, count)
        if number:
            ours.append(speeds[0])
            theirs.append(speeds[1])
    runtime.close(drain=False)
    return {
        "ours": statistics.median(ours),
        "plain": statistics.median(theirs),
        "ratio": statistics.median(a / b for a, b in zip(ours, theirs, strict=True)),
        "ours_min_max": [min(ours), max(ours)],
        "plain_min_max": [min(theirs), max(theirs)],
        "weight_bytes": runtime.weight_bytes,
        "rounds": rounds,
        "plain_ops": plain.__doc__,
    }
