"""A torch file (.pth, .pt, .bin as torch.save writes them since 1.6): named tensors, mapped and lazy.

A zip archive of stored members: <root>/data.pkl describes nested dictionaries of tensors, <root>/data/<key> are the
storages they are views of, <root>/byteorder says "little". The pickle is read as data (`unpickle`), so that opening a
stranger's file runs nothing of it. Files from before 1.6 are refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from backend.checkpoint.container import RawTensor, RawTensors
from backend.checkpoint.mapped import MappedFile
from backend.checkpoint.unpickle import TensorRef, unpickle
from backend.checkpoint.zipindex import LOCAL, Member, read_members
from backend.errors import CheckpointError

MAX_PICKLE = 1 << 26  # bytes of data.pkl; that of a 405B shard has a quarter of a million
MAX_TENSORS = 1 << 16
MAX_VISITED = 1 << 18  # entries of dictionaries, a shared one counted each time
MAX_NAME = 1 << 10  # letters of a joined name
MAX_DEPTH = 8  # of dictionaries in dictionaries
LEGACY = bytes.fromhex("8a0a6cfc9c46f9206aa85019")  # the number 0x1950a86a20f9469cfc6c, as a pickle writes it


def read_torch_zip(path: Path) -> RawTensors:
    """The tensors of a torch zip file by name, in the file's order. Only headers are read.

    Names of nested dictionaries are joined with "."; values that are no tensors are left out. A file whose tensors are
    all in several nested dictionaries (a training state) is refused, since it does not say which one is the model.
    Raises CheckpointError.
    """
    try:
        if not path.is_file():  # a pipe would wait for ever
            raise CheckpointError(f"{path}: there is no such file")
        with open(path, "rb", buffering=0) as file:
            _check_start(path, file.read(262))
            members = read_members(path, file)
            root = _root(path, members)
            _check_byte_order(path, root, members, lambda member: _content(file, member))
            pickled = members[f"{root}/data.pkl"]
            if pickled.nbytes > MAX_PICKLE:
                raise CheckpointError(f"{path}: data.pkl has {pickled.nbytes} bytes, at most {MAX_PICKLE} can be right")
            tree = unpickle(path, _content(file, pickled))
        mapped = MappedFile(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from None
    views = _Views(path, mapped, root, members)
    tensors: RawTensors = {}
    for name, found in _named(path, tree):
        if name in tensors or len(tensors) == MAX_TENSORS:
            raise CheckpointError(f"{path}: tensor {name!r} appears twice, or after {MAX_TENSORS} others")
        tensors[name] = views.tensor(name, found)
    return tensors


def _content(file: Any, member: Member) -> bytes:
    file.seek(member.start)
    data = b""
    while len(data) < member.nbytes and (piece := file.read(member.nbytes - len(data))):
        data += piece
    return data


def _check_start(path: Path, start: bytes) -> None:
    if start.startswith(LOCAL):
        return
    if LEGACY in start[:32] or start[257:262] == b"ustar":
        raise CheckpointError(
            f"{path}: is in PyTorch's format from before version 1.6, which cannot be opened without running code; "
            "open it with PyTorch where you trust it and write it again with torch.save"
        )
    if start[:1] == b"\x80":
        raise CheckpointError(f"{path}: is a bare Python pickle and no torch file; no code from a file is run")
    raise CheckpointError(f"{path}: starts with {start[:4]!r}, so it is no torch file (a zip archive with data.pkl)")


def _root(path: Path, members: dict[str, Member]) -> str:
    roots = [name.split("/")[0] for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise CheckpointError(f"{path}: is a zip archive with {len(roots)} files data.pkl, a torch file has one")
    if f"{roots[0]}/constants.pkl" in members:
        raise CheckpointError(f"{path}: is a TorchScript program; a file of weights (a state dict) is expected")
    for name, member in members.items():
        if not member.stored:
            raise CheckpointError(
                f"{path}: {name!r} in this zip archive is compressed; only stored members, as PyTorch writes them, can "
                "be mapped into memory"
            )
    return roots[0]


def _check_byte_order(path: Path, root: str, members: dict[str, Member], content: Callable[[Member], bytes]) -> None:
    """Files from before torch 2.1 do not say; they are little-endian wherever anyone uses them."""
    member = members.get(f"{root}/byteorder")
    if member is None:
        return
    order = content(member) if member.nbytes <= 16 else b"something long"
    if order != b"little":
        raise CheckpointError(f"{path}: its byte order is {order!r}; only little-endian files can be opened")


class _Views:
    """Makes tensors of a mapped file, after checking that each lies within its storage and that within its member."""

    def __init__(self, path: Path, mapped: MappedFile, root: str, members: dict[str, Member]) -> None:
        self._path, self._mapped, self._root, self._members = path, mapped, root, members

    def tensor(self, name: str, found: TensorRef) -> RawTensor:
        storage, dtype = found.storage, found.storage.dtype
        member = self._members.get(f"{self._root}/data/{storage.key}")
        where = f"{self._path}: tensor {name!r}"
        if member is None:
            raise CheckpointError(f"{where}: its storage {storage.key[:50]!r} is not in the file")
        if storage.elements * dtype.itemsize > member.nbytes or member.start + member.nbytes > self._mapped.size:
            raise CheckpointError(
                f"{where}: its storage claims {storage.elements} values of {dtype.itemsize} bytes, but the file has "
                f"{member.nbytes} bytes for it; it is incomplete or damaged, download it again"
            )
        elements = math.prod(found.shape)
        last = found.offset + sum((size - 1) * stride for size, stride in zip(found.shape, found.stride))
        if elements > storage.elements or (elements and last >= storage.elements):
            raise CheckpointError(
                f"{where} has shape {found.shape}, stride {found.stride} and offset {found.offset}, which does not "
                f"fit in its storage of {storage.elements} values"
            )
        view, release = self._view(member, found, (last - found.offset + 1) if elements else 0)
        return RawTensor(name, found.shape, dtype, elements * dtype.itemsize, self._path, view, release)

    def _view(
        self, member: Member, found: TensorRef, span: int
    ) -> tuple[Callable[[], torch.Tensor], Callable[[], None]]:
        """`span`: elements from the tensor's first to its last. Both functions keep the mapping alive."""
        mapped, dtype = self._mapped, found.storage.dtype
        start, nbytes = member.start + found.offset * dtype.itemsize, span * dtype.itemsize

        def view() -> torch.Tensor:
            if not span:
                return torch.empty(found.shape, dtype=dtype)
            if dtype == torch.bool:  # a byte that is neither 0 nor 1 would be no truth value
                return torch.as_strided(mapped.slice(start, nbytes), found.shape, found.stride).ne(0)
            return torch.as_strided(mapped.typed(start, nbytes, dtype), found.shape, found.stride)

        return view, mapped.releaser(start, nbytes)


def _named(path: Path, tree: Any) -> list[tuple[str, TensorRef]]:
    """Tensors of a tree of dictionaries and their joined names."""
    if type(tree) is not dict:
        raise CheckpointError(f"{path}: holds a {_kind(tree)}; a dictionary of tensors is expected")
    named = list(_walk(path, tree))
    groups = {str(top): None for top, _, _ in named if type(tree[top]) is dict}
    if not named:
        raise CheckpointError(f"{path}: holds no tensors; a dictionary of tensors is expected")
    if len(groups) > 1 and not any(type(value) is TensorRef for value in tree.values()):
        raise CheckpointError(
            f"{path}: holds several groups of tensors ({', '.join(repr(group[:50]) for group in list(groups)[:5])}), "
            "so it is the state of a training; save the model's state dict alone"
        )
    return [(name, found) for _, name, found in named]


def _walk(path: Path, tree: dict[str | int, Any]) -> Iterator[tuple[str | int, str, TensorRef]]:
    """(top key, joined name, tensor), depth first with a stack of our own.

    Bounded in every way, because a dictionary may hold itself, or the same one many times.
    """
    visited = 0
    top: str | int = ""
    levels = [("", iter(tree.items()))]
    while levels:
        prefix, items = levels[-1]
        for key, value in items:
            visited += 1
            top = key if len(levels) == 1 else top
            name = f"{prefix}{key}"
            if visited > MAX_VISITED or len(name) > MAX_NAME:
                raise CheckpointError(
                    f"{path}: has more than {MAX_VISITED} names in its dictionaries, or one of more than {MAX_NAME} "
                    "letters, which cannot be right"
                )
            if type(value) is TensorRef:
                yield top, name, value
            elif type(value) is dict:
                if len(levels) == MAX_DEPTH:
                    raise CheckpointError(f"{path}: has dictionaries more than {MAX_DEPTH} deep")
                levels.append((f"{name}.", iter(value.items())))
                break
        else:
            levels.pop()


def _kind(value: Any) -> str:
    return "tensor" if type(value) is TensorRef else type(value).__name__
