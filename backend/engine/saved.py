"""Cached blocks in a file, and back: so that what was read once need not be read again after a restart.

A safetensors file (https://github.com/huggingface/safetensors#format), its tensors in this order:

    model   U8 (32,)            fingerprint of the model and of how it computes: elsewhere the numbers mean nothing
    parents I32 (blocks,)       which earlier block a block follows; -1: it begins a sequence
    lengths I32 (blocks,)       its tokens
    tokens  I32 (blocks, size)  and which, filled up with zeros
    array.N (blocks, layers, n_kv_heads, size, ...)  what the pool has of it, one for each of `KVPool.arrays`
    digest  U8 (32,)            SHA-256 of everything before in the file

Blocks are in the order of their last use, the latest first, parents before children.
"""

from __future__ import annotations

import hashlib
import json
import struct
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from backend.cache.blocks import BlockPool
from backend.cache.host import copy_block
from backend.cache.kv import KVPool
from backend.cache.tree import NOWHERE, Node
from backend.checkpoint.container import RawTensors
from backend.checkpoint.safetensors import DTYPES, read_safetensors
from backend.errors import CheckpointError, SavedCacheError
from backend.store.files import replacing

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_PIECE = 1 << 20  # bytes of a file that are hashed at a time


def save_blocks(path: Path, model: bytes, kv: KVPool, nodes: Sequence[Node], seconds: float = float("inf")) -> int:
    """Write blocks and what they hold, with all their ancestors among them, to `path`, whole or not at all.

    `model`: 32 bytes. Returns how many tokens were saved. Raises UserError where the file cannot be written, and
    SavedCacheError when it takes longer than `seconds`.
    """
    until = time.monotonic() + seconds
    numbers = {node: number for number, node in enumerate(nodes)}
    parents = [numbers.get(node.parent, NOWHERE) if node.parent is not None else NOWHERE for node in nodes]
    lengths = [len(node.tokens) for node in nodes]
    tokens = [[*node.tokens, *[0] * (kv.block_size - len(node.tokens))] for node in nodes]
    small = {
        "model": torch.frombuffer(bytearray(model), dtype=torch.uint8),
        "parents": torch.tensor(parents, dtype=torch.int32),
        "lengths": torch.tensor(lengths, dtype=torch.int32),
        "tokens": torch.tensor(tokens, dtype=torch.int32),
    }
    shapes = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in small.items()]
    shapes += _array_shapes(kv, len(nodes))
    digest = hashlib.sha256()
    with replacing(path, to_disk=False) as file:  # its digest says later whether it is whole

        def write(data: bytes | memoryview) -> None:
            digest.update(data)
            file.write(data)

        write(_header([*shapes, ("digest", torch.uint8, (32,))]))
        for tensor in small.values():
            write(_bytes_of(tensor))
        for number in range(len(kv.arrays)):
            for node in nodes:
                whole = _copy(_content(kv, node)[number])
                whole[:, :, len(node.tokens) :] = 0  # of whoever had the block before
                write(_bytes_of(whole))
                if time.monotonic() > until:
                    raise SavedCacheError(f"{path}: writing the cache took longer than {seconds:g} s")
        file.write(digest.digest())
    return sum(lengths)


def load_blocks(path: Path, model: bytes, pool: BlockPool, kv: KVPool, vocabulary: int, salt: bytes = b"") -> int:
    """Put the blocks of a file into the cache, as far as there is room without evicting. Returns tokens put there.

    Moves that are written down in the pool are carried out before. Raises SavedCacheError, and nothing is put there,
    for a file that is missing, damaged, or of another model.
    """
    try:
        tensors = read_safetensors(path)
    except CheckpointError as error:
        raise SavedCacheError(error.message) from None
    blocks = _checked(path, tensors, model, kv, vocabulary)
    kv.carry_out(pool.take_moves())
    arrays = [tensors[name].view() for name, _, _ in _array_shapes(kv, len(blocks))]
    planted: list[Node | None] = []
    found = 0
    for number, (parent, tokens) in enumerate(blocks):
        above = planted[parent] if parent != NOWHERE else None
        made = pool.plant(above, tokens, salt, age=number) if parent == NOWHERE or above is not None else None
        planted.append(made[0] if made else None)
        if made and made[1]:
            for ours, theirs in zip(_content(kv, made[0]), arrays, strict=True):
                copy_block(ours, theirs[number])
            found += len(tokens)
    return found


def _content(kv: KVPool, node: Node) -> list[torch.Tensor]:
    """What a node holds, wherever it is: one view for each of `KVPool.arrays`."""
    if node.block != NOWHERE:
        return kv.block(node.block)
    assert kv.host is not None
    return kv.host.block(node.slot)


def _array_shapes(kv: KVPool, blocks: int) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
    return [(f"array.{n}", array.dtype, (blocks, *array.shape)) for n, array in enumerate(kv.block(0))]


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.view(torch.uint8).numpy()).cast("B")


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    """On the CPU, in one piece."""
    whole = torch.empty(tensor.shape, dtype=tensor.dtype)
    copy_block(whole, tensor)
    return whole


def _header(shapes: Sequence[tuple[str, torch.dtype, tuple[int, ...]]]) -> bytes:
    entries, at = {}, 0
    for name, dtype, shape in shapes:
        end = at + torch.Size(shape).numel() * dtype.itemsize
        entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _checked(
    path: Path, tensors: RawTensors, model: bytes, kv: KVPool, vocabulary: int
) -> list[tuple[int, tuple[int, ...]]]:
    """Parent and tokens of every block of a file that is whole and made for this model."""

    def wrong(what: str) -> SavedCacheError:
        return SavedCacheError(f"{path}: {what}")

    if "model" not in tensors or "parents" not in tensors:
        raise wrong("is no saved cache")
    if bytes(tensors["model"].view().tolist()) != model:
        raise wrong("was made for another model, or another way to run it")
    count = tensors["parents"].shape[0] if tensors["parents"].shape else 0
    expected = {
        "model": (torch.uint8, (32,)), "parents": (torch.int32, (count,)), "lengths": (torch.int32, (count,)),
        "tokens": (torch.int32, (count, kv.block_size)), "digest": (torch.uint8, (32,)),
    }  # fmt: skip
    expected |= {name: (dtype, shape) for name, dtype, shape in _array_shapes(kv, count)}
    if {name: (raw.dtype, raw.shape) for name, raw in tensors.items()} != expected or list(tensors)[-1] != "digest":
        raise wrong("has other tensors than a cache of this model has; it is damaged")
    digest = hashlib.sha256()
    for piece in _pieces(path, path.stat().st_size - 32):
        digest.update(piece)
    if digest.digest() != bytes(tensors["digest"].view().tolist()):
        raise wrong("does not match its check sum; it is damaged")
    parents, lengths = tensors["parents"].view().tolist(), tensors["lengths"].view().tolist()
    blocks = [
        (parent, tuple(row[:length]))
        for parent, length, row in zip(parents, lengths, tensors["tokens"].view().tolist(), strict=True)
    ]
    for number, (parent, tokens) in enumerate(blocks):
        follows = parent == NOWHERE or (0 <= parent < number and len(blocks[parent][1]) == kv.block_size)
        if not follows or not tokens or not all(0 <= token < vocabulary for token in tokens):
            raise wrong(f"block {number} is none of this model; it is damaged")
    return blocks


def _pieces(path: Path, size: int) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while size > 0 and (piece := file.read(min(size, _PIECE))):
            size -= len(piece)
            yield piece
