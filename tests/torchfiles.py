"""Torch files made by hand: pickles out of single opcodes, in a zip like torch.save's. And what a test asks of them."""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from backend.checkpoint.torchzip import read_torch_zip
from backend.errors import CheckpointError

P2 = b"\x80\x02"
SIX = struct.pack("<6f", *range(6))


def torch_zip(
    path: Path,
    data: bytes,
    storages: dict[str, bytes] | None = None,
    order: bytes | None = b"little",
    root: str = "archive",
) -> Path:
    """A zip of stored members as torch.save writes them, around any pickle."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(f"{root}/data.pkl", data)
        if order is not None:
            archive.writestr(f"{root}/byteorder", order)
        for key, values in (storages or {}).items():
            archive.writestr(f"{root}/data/{key}", values)
    return path


def refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        for raw in read_torch_zip(path).values():
            raw.view()
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600 + len(str(path))
    return str(caught.value)


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def integer(value: int) -> bytes:
    raw = value.to_bytes(8, "little", signed=True)
    return b"\x8a\x08" + raw


def tuple_of(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def storage(kind: str = "FloatStorage", key: str = "0", elements: int = 6, module: str = "torch") -> bytes:
    name = f"c{module}\n{kind}\n".encode()
    return tuple_of(text("storage"), name, text(key), text("cpu"), integer(elements)) + b"Q"


def tensor(
    shape: tuple[int, ...] = (2, 3), stride: tuple[int, ...] = (3, 1), offset: int = 0, held: bytes | None = None
) -> bytes:
    sizes = [tuple_of(*(integer(number) for number in numbers)) for numbers in (shape, stride)]
    hooks = b"ccollections\nOrderedDict\n)R"
    arguments = tuple_of(storage() if held is None else held, integer(offset), *sizes, b"\x89", hooks)
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"R"


def holding(value: bytes) -> bytes:
    return P2 + b"}" + text("w") + value + b"s."


def saved(path: Path, value: Any, **options: Any) -> Path:
    torch.save(value, path, **options)
    return path


def assert_same(path: Path, expected: dict[str, torch.Tensor]) -> None:
    found = read_torch_zip(path)
    assert list(found) == list(expected)
    for name, value in expected.items():
        raw = found[name]
        assert (raw.name, raw.shape, raw.dtype, raw.file) == (name, tuple(value.shape), value.dtype, path)
        assert raw.nbytes == value.numel() * value.element_size()
        assert torch.equal(raw.view(), value), name
        raw.release()
        assert torch.equal(raw.view(), value), name
