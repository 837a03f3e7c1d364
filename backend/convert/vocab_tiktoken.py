"""Llama 3's tokenizer.model: lines of "base64 rank". Ranks become the merges that byte-level BPE files keep."""

from __future__ import annotations

import base64
import binascii
from pathlib import Path

from backend.convert.vocabulary import CONTROL, NORMAL, Vocabulary
from backend.errors import CheckpointError
from backend.tokenizer.bytelevel import byte_spellings

MAX_TOKEN_BYTES = 1 << 10
_LLAMA_4_RANKS = 200000
# Positions among the special tokens behind the ranks, with the latest of Meta's names; all others are called reserved.
_SPECIAL = {
    0: "<|begin_of_text|>", 1: "<|end_of_text|>", 4: "<|finetune_right_pad_id|>", 5: "<|step_id|>",
    6: "<|start_header_id|>", 7: "<|end_header_id|>", 8: "<|eom_id|>", 9: "<|eot_id|>", 10: "<|python_tag|>",
    11: "<|image|>",
}  # fmt: skip


def looks_like_ranks(data: bytes) -> bool:
    """Whether a tokenizer.model holds tiktoken ranks."""
    parts = data.split(b"\n", 1)[0].split(b" ")
    return len(parts) == 2 and parts[1].strip().isdigit()


def vocabulary_of_ranks(path: Path, data: bytes, limit: int) -> Vocabulary:
    """`limit`: rows of the embedding table; what is behind the ranks are special tokens."""
    ranked = _ranks(path, data)
    if len(ranked) == _LLAMA_4_RANKS:
        raise CheckpointError(f"{path}: a vocabulary of Llama 4, which splits text in another way")
    if len(ranked) + 10 > limit:
        raise CheckpointError(
            f"{path}: {len(ranked)} tokens and the special ones, but the embedding table has only {limit} rows"
        )
    spell = byte_spellings()
    tokens = ["".join(spell[byte] for byte in token) for token in ranked]
    merges = []
    ranks = {token: rank for rank, token in enumerate(ranked)}
    for rank, token in enumerate(ranked):
        if len(token) > 1 and (pair := _last_pair(token, rank, ranks)):
            merges.append(" ".join("".join(spell[byte] for byte in part) for part in pair))
    found = Vocabulary("gpt2", tokens, [NORMAL] * len(tokens), merges=merges, pre="llama-bpe", add_bos=True)
    reserved = 0
    for number in range(limit - len(ranked)):
        if number in _SPECIAL:
            found.tokens.append(_SPECIAL[number])
        else:
            found.tokens.append(f"<|reserved_special_token_{reserved}|>")
            reserved += 1
        found.kinds.append(CONTROL)
    found.bos, found.eos = found.id_of("<|begin_of_text|>"), found.id_of("<|end_of_text|>")
    return found


def _ranks(path: Path, data: bytes) -> list[bytes]:
    ranked: list[bytes] = []
    for line in data.splitlines():
        if not line.strip():
            continue
        parts = line.split()
        try:
            token, rank = base64.b64decode(parts[0], validate=True), int(parts[1])
        except (binascii.Error, ValueError, IndexError):
            raise CheckpointError(f"{path}: line {len(ranked) + 1} is not a base64 token and its rank") from None
        if rank != len(ranked) or not 1 <= len(token) <= MAX_TOKEN_BYTES:
            raise CheckpointError(f"{path}: line {len(ranked) + 1} has rank {rank} and {len(token)} bytes")
        ranked.append(token)
    if len(set(ranked)) != len(ranked):
        raise CheckpointError(f"{path}: a token appears twice")
    return ranked


def _last_pair(token: bytes, rank: int, ranks: dict[bytes, int]) -> tuple[bytes, bytes] | None:
    """The two parts that BPE has when only tokens of lower rank were merged; None where it never makes this token."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        best, at = rank, -1
        for i in range(len(parts) - 1):
            found = ranks.get(parts[i] + parts[i + 1], rank)
            if found < best:
                best, at = found, i
        if at < 0:
            return None
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]
