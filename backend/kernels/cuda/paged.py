"""Triton: rotary turn with the write into the cache, and attention of one token per sequence over its blocks.

Split-KV decoding (Flash-Decoding, Dao et al. 2023): the tokens of a sequence are divided among several programs, so
that one long conversation keeps the whole device busy, and their parts of one softmax are mixed by a second kernel.
Everything that changes from step to step is read from device memory, and the number of programs depends on nothing
that does, so a captured graph stays right. Imported only through `available.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from backend.kernels.cuda.skinny import operand

_BLOCK = 32  # keys at a time
_FILL = 264  # programs wanted: two for each multiprocessor of a large device
_MOST_SPLITS = 32


@triton.jit
def _to_nearest(x):
    """To whole numbers, halves to the even one, as torch.round does."""
    below = tl.floor(x)
    part = x - below
    odd = below - 2.0 * tl.floor(below * 0.5)
    return below + tl.where((part > 0.5) | ((part == 0.5) & (odd == 1.0)), 1.0, 0.0)


@triton.jit
def _keep(first, second, one, other, to, scales, at, inside, HALF: tl.constexpr, INT8: tl.constexpr):
    """The two halves of one head into slot `at`; as codes and a scale (cache/int8.py) where INT8."""
    start = to + at * (2 * HALF)
    if INT8:
        largest = tl.maximum(tl.max(tl.abs(first), axis=0), tl.max(tl.abs(second), axis=0))
        odd = tl.sum(first * 0.0 + second * 0.0, axis=0)  # NaN where something is not finite
        none = largest < 1e-30
        inverse = tl.where(none, 0.0, tl.div_rn(127.0, largest))
        scale = tl.where(none, 0.0, tl.div_rn(largest, 127.0))
        tl.store(scales + at, tl.where(odd == 0.0, scale, odd))
        first = tl.where(odd == 0.0, _to_nearest(first * inverse), 0.0)
        second = tl.where(odd == 0.0, _to_nearest(second * inverse), 0.0)
    tl.store(start + one, first.to(to.dtype.element_ty), mask=inside)
    tl.store(start + other, second.to(to.dtype.element_ty), mask=inside)


@triton.jit
def _turn_and_store(
    heads, turns, slots, keys, values, key_scales, value_scales, query, pool_slots,
    N_HEADS: tl.constexpr, N_KV: tl.constexpr, HALF: tl.constexpr, LANES: tl.constexpr, INTERLEAVED: tl.constexpr,
    INT8: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    head = tl.program_id(1)
    pair = tl.arange(0, LANES)
    inside = pair < HALF
    start = heads + (token * (N_HEADS + 2 * N_KV) + head) * (2 * HALF)
    if INTERLEAVED:
        one, other = 2 * pair, 2 * pair + 1
    else:
        one, other = pair, pair + HALF
    first = tl.load(start + one, mask=inside, other=0.0)
    second = tl.load(start + other, mask=inside, other=0.0)
    if head < N_HEADS + N_KV:
        at = turns + token * (2 * HALF) + 2 * pair
        cosine = tl.load(at, mask=inside, other=0.0)
        sine = tl.load(at + 1, mask=inside, other=0.0)
        turned = first * cosine - second * sine
        second = first * sine + second * cosine
        first = turned
    if head < N_HEADS:
        out = query + (token * N_HEADS + head) * (2 * HALF)
        tl.store(out + one, first, mask=inside)
        tl.store(out + other, second, mask=inside)
    else:
        slot = tl.load(slots + token).to(tl.int64)
        if head < N_HEADS + N_KV:
            at = (head - N_HEADS).to(tl.int64) * pool_slots + slot
            _keep(first, second, one, other, keys, key_scales, at, inside, HALF, INT8)
        else:
            at = (head - N_HEADS - N_KV).to(tl.int64) * pool_slots + slot
            _keep(first, second, one, other, values, value_scales, at, inside, HALF, INT8)


@triton.jit
def _split(
    query, keys, values, key_scales, value_scales, table, lengths, out, log_sum, pool_slots, table_width, window, scale,
    OPERAND: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, LANES: tl.constexpr,
    PAGE: tl.constexpr, BLOCK: tl.constexpr, INT8: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    n_kv = tl.num_programs(1)
    splits = tl.num_programs(2)
    length = tl.load(lengths + sequence)
    begin = tl.maximum(length - window, 0)
    # Whole blocks for each split; the last ones of a short sequence get nothing.
    share = tl.cdiv(tl.cdiv(length - begin, BLOCK), splits) * BLOCK
    first = begin + split * share
    last = tl.minimum(first + share, length)
    row = tl.arange(0, ROWS)
    lane = tl.arange(0, LANES)
    wanted = (row[:, None] < GROUP) & (lane[None, :] < HEAD_DIM)
    head = kv_head * GROUP + row
    at = (sequence * n_kv * GROUP + head[:, None]) * HEAD_DIM + lane[None, :]
    q = tl.load(query + at, mask=wanted, other=0.0).to(OPERAND)  # (rows, head_dim)
    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    weight = tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((ROWS, LANES), tl.float32)
    base = kv_head.to(tl.int64) * pool_slots
    for start in range(first, last, BLOCK):
        place = start + tl.arange(0, BLOCK)
        there = place < last
        page = tl.load(table + sequence * table_width + place // PAGE, mask=there, other=0).to(tl.int64)
        own = base + page * PAGE + place % PAGE
        slot = own[:, None] * HEAD_DIM + lane[None, :]
        readable = there[:, None] & (lane[None, :] < HEAD_DIM)
        key = tl.load(keys + slot, mask=readable, other=0.0).to(OPERAND)  # (block, head_dim)
        scores = tl.dot(q, tl.trans(key), input_precision="ieee") * scale
        if INT8:  # codes are exact in 16 bits, so scales come after the product, and before the other
            scores *= tl.load(key_scales + own, mask=there, other=0.0)[None, :]
        scores = tl.where(there[None, :], scores, float("-inf"))
        top = tl.maximum(highest, tl.max(scores, axis=1))
        share_of = tl.exp(scores - top[:, None])
        shrink = tl.exp(highest - top)
        value = tl.load(values + slot, mask=readable, other=0.0).to(OPERAND)
        weight = weight * shrink + tl.sum(share_of, axis=1)
        if INT8:
            share_of *= tl.load(value_scales + own, mask=there, other=0.0)[None, :]
        mixed = tl.dot(share_of.to(OPERAND), value, mixed * shrink[:, None], input_precision="ieee")
        highest = top
    used = weight > 0.0
    mixed = mixed / tl.where(used, weight, 1.0)[:, None]
    total = tl.where(used, highest + tl.log(tl.where(used, weight, 1.0)), float("-inf"))
    # NaN must come out as NaN: it is neither above zero nor nothing.
    total = tl.where(weight == weight, total, weight)
    part = (sequence * n_kv * GROUP + head) * splits + split
    tl.store(out + part[:, None] * HEAD_DIM + lane[None, :], mixed, mask=wanted)
    tl.store(log_sum + part, total, mask=row < GROUP)


@triton.jit
def _merge(parts, log_sum, out, splits, HEAD_DIM: tl.constexpr, LANES: tl.constexpr, SPLITS: tl.constexpr):
    head = tl.program_id(0)  # of all sequences
    split = tl.arange(0, SPLITS)
    lane = tl.arange(0, LANES)
    total = tl.load(log_sum + head * splits + split, mask=split < splits, other=float("-inf"))
    share = tl.exp(total - tl.max(total, axis=0))
    share = share / tl.sum(share, axis=0)
    at = (head * splits + split[:, None]) * HEAD_DIM + lane[None, :]
    mask = (split[:, None] < splits) & (lane[None, :] < HEAD_DIM)
    mixed = tl.sum(tl.load(parts + at, mask=mask, other=0.0) * share[:, None], axis=0)
    tl.store(out + head * HEAD_DIM + lane, mixed, mask=lane < HEAD_DIM)


def turn_and_store(
    heads: torch.Tensor,
    turns: torch.Tensor,
    slots: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    n_heads: int,
    interleaved: bool,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """Turn queries and keys; write keys and values into their slots; return the queries, float32.

    heads float32 (tokens, n_heads + 2 n_kv_heads, head_dim); turns float32 (tokens, 1, head_dim / 2, 2), cosine and
    sine; slots int32 (tokens,); keys, values (n_kv_heads, slots of the pool, head_dim), one layer of it; scales
    float32 (n_kv_heads, slots) where they are int8.
    """
    n_kv, pool_slots, head_dim = keys.shape
    tokens = heads.shape[0]
    query = torch.empty(tokens, n_heads, head_dim, dtype=torch.float32, device=heads.device)
    _turn_and_store[(tokens, n_heads + 2 * n_kv)](
        heads.contiguous(), turns, slots, keys, values, keys if key_scales is None else key_scales,
        values if value_scales is None else value_scales, query, pool_slots,
        N_HEADS=n_heads, N_KV=n_kv, HALF=head_dim // 2, LANES=triton.next_power_of_2(head_dim // 2),
        INTERLEAVED=interleaved, INT8=key_scales is not None, num_warps=1,
    )  # fmt: skip
    return query


def decode(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    table: torch.Tensor,
    lengths: torch.Tensor,
    page: int,
    window: int | None = None,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """One token of each sequence looks at all of its sequence, itself included, or at the last `window` of it.

    query float32 (sequences, n_heads, head_dim); keys, values (n_kv_heads, slots, head_dim), scales float32
    (n_kv_heads, slots) where they are int8; token t of sequence s is in slot table[s, t // page] * page + t % page,
    table int32 (sequences, any width); lengths int32 (sequences,). Returns float32 (sequences, n_heads, head_dim).
    """
    sequences, n_heads, head_dim = query.shape
    n_kv, pool_slots, _ = keys.shape
    group = n_heads // n_kv
    splits = max(1, min(_MOST_SPLITS, _FILL // (sequences * n_kv)))
    lanes = max(16, triton.next_power_of_2(head_dim))
    parts = torch.empty(sequences, n_heads, splits, head_dim, dtype=torch.float32, device=query.device)
    log_sum = torch.empty(sequences, n_heads, splits, dtype=torch.float32, device=query.device)
    _split[(sequences, n_kv, splits)](
        query, keys, values, keys if key_scales is None else key_scales,
        values if value_scales is None else value_scales, table, lengths, parts, log_sum, pool_slots, table.stride(0),
        window or 2**31 - 1, head_dim**-0.5, OPERAND=operand(keys.dtype), GROUP=group,
        ROWS=max(16, triton.next_power_of_2(group)), HEAD_DIM=head_dim, LANES=lanes, PAGE=page, BLOCK=_BLOCK,
        INT8=key_scales is not None, num_warps=4, num_stages=2,
    )  # fmt: skip
    if splits == 1:
        return parts.view(sequences, n_heads, head_dim)
    out = torch.empty_like(query)
    _merge[(sequences * n_heads,)](
        parts, log_sum, out, splits,
        HEAD_DIM=head_dim, LANES=lanes, SPLITS=triton.next_power_of_2(splits), num_warps=4,
    )  # fmt: skip
    return out
