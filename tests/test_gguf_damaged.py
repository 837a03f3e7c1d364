"""Damaged GGUF files: every wrong header ends in one sentence, every cut and flipped byte in words or not at all.

The malformed files follow the named cases of llama.cpp's tests/test-gguf.cpp.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from backend.checkpoint.base import Checkpoint
from backend.checkpoint.gguf_header import read_header
from backend.checkpoint.open import open_checkpoint
from backend.errors import CheckpointError
from backend.placement.load import load_model
from backend.text.templates import ChatTemplate
from backend.tokenizer.open import open_tokenizer

Write = Callable[..., Path]

# a small writer of wrong files ------------------------------------------------------------------------------------


def text(value: str | bytes) -> bytes:
    data = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(data)) + data


def key(name: str | bytes, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor(name: str, dims: list[int], kind: int = 0, offset: int = 0, n_dims: int | None = None) -> bytes:
    count = len(dims) if n_dims is None else n_dims
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", count, *dims, kind, offset)


U32, STRING, ARRAY = 4, 8, 9
ARCHITECTURE = key("general.architecture", STRING, text("llama"))


def file(
    keys: list[bytes] = (),  # type: ignore[assignment]
    tensors: list[bytes] = (),  # type: ignore[assignment]
    *,
    data: int = 0,
    magic: bytes = b"GGUF",
    version: int = 3,
    n_tensors: int | None = None,
    n_keys: int | None = None,
    alignment: int = 32,
) -> bytes:
    counts = (len(tensors) if n_tensors is None else n_tensors, len(keys) if n_keys is None else n_keys)
    header = magic + struct.pack("<IQQ", version, *counts) + b"".join(keys) + b"".join(tensors)
    return header + bytes(-len(header) % alignment) + bytes(data)


def array(name: str, kind: int, length: int, data: bytes = b"") -> bytes:
    return key(name, ARRAY, struct.pack("<IQ", kind, length) + data)


def u32(name: str, value: int) -> bytes:
    return key(name, U32, struct.pack("<I", value))


HUGE = 2**64 - 1
# what is wrong -> (the file, a word of the error that names the part)
MALFORMED: dict[str, tuple[bytes, str]] = {
    # header
    "bad magic": (file(magic=b"FUGG"), "FUGG"),
    "big-endian magic": (file(magic=b"FUUG"), "FUUG"),
    "version 0": (file(version=0), "version 0"),
    "version 1 with the lengths of version 2": (file([ARCHITECTURE], version=1), "architecture None"),
    "version of the future": (file(version=4), "version 4"),
    "version huge": (file(version=2**32 - 1), "version 4294967295"),
    "big-endian 2": (file(version=0x02000000), "big-endian"),
    "big-endian 3": (file(version=0x03000000), "big-endian"),
    "empty": (b"", "starts with"),
    "only the magic": (b"GGUF", "too few"),
    "number of tensors huge": (file(n_tensors=HUGE), "number of tensors"),
    "number of tensors signed": (file(n_tensors=2**63), "number of tensors"),
    "number of tensors too large for the file": (file(n_tensors=100, alignment=1), "name of tensor 0"),
    "number of keys huge": (file(n_keys=HUGE), "number of keys"),
    "number of keys too large for the file": (file([ARCHITECTURE], n_keys=50, alignment=1), "key 1"),
    # keys
    "key of the wrong type": (file([key("a.key", 13, b"\0" * 8)]), "a.key"),
    "key type huge": (file([key("a.key", 2**32 - 1, b"\0" * 8)]), "a.key"),
    "array of the wrong type": (file([array("a.key", 13, 1, b"\0" * 8)]), "a.key"),
    "array of arrays": (file([array("a.key", ARRAY, 1, struct.pack("<IQ", 0, 0))]), "a.key"),
    "array length huge": (file([array("a.key", 0, HUGE)]), "a.key"),
    "array length wraps": (file([array("a.key", 10, 2**61)]), "a.key"),
    "array length beyond the file": (file([array("a.key", U32, 1000)]), "a.key"),
    "array of texts beyond the file": (file([array("a.key", STRING, 1000)]), "a.key"),
    "a text in an array beyond the file": (file([array("a.key", STRING, 1, struct.pack("<Q", 500))]), "a.key"),
    "text length huge": (file([key("a.key", STRING, struct.pack("<Q", HUGE))]), "a.key"),
    "text beyond the file": (file([key("a.key", STRING, struct.pack("<Q", 4000))]), "a.key"),
    "text that is no UTF-8": (file([key("a.key", STRING, text(b"\xff\xfe"))]), "a.key"),
    "key length huge": (file([struct.pack("<Q", HUGE)], n_keys=1), "key 0"),
    "key that is no UTF-8": (file([key(b"\xff", U32, b"\0" * 4)]), "key 0"),
    "duplicate key": (file([u32("a.key", 1), u32("a.key", 1)]), "'a.key' appears twice"),
    # alignment
    "alignment 0": (file([u32("general.alignment", 0)]), "general.alignment"),
    "alignment 1": (file([u32("general.alignment", 1)]), "general.alignment"),
    "alignment no power of two": (file([u32("general.alignment", 24)]), "general.alignment"),
    "alignment huge": (file([u32("general.alignment", 2**31)]), "general.alignment"),
    "alignment a text": (file([key("general.alignment", STRING, text("32"))]), "general.alignment"),
    "alignment an array": (file([array("general.alignment", U32, 1, b"\x20\0\0\0")]), "general.alignment"),
    "alignment a bool": (file([key("general.alignment", 7, b"\1")]), "general.alignment"),
    # tensors
    "no dimensions": (file([], [tensor("t", [])], data=64), "'t' has 0 dimensions"),
    "five dimensions": (file([], [tensor("t", [1] * 5)], data=64), "'t' has 5 dimensions"),
    "dimensions huge": (file([], [tensor("t", [1], n_dims=2**32 - 1)], data=64), "'t' has 4294967295 dimensions"),
    "dimension 0": (file([], [tensor("t", [32, 0])], data=64), "'t' has shape"),
    "all dimensions 0": (file([], [tensor("t", [0, 0, 0, 0])], data=64), "'t' has shape"),
    "dimension huge": (file([], [tensor("t", [HUGE])], data=64), "'t' claims"),
    "product of dimensions wraps to 0": (file([], [tensor("t", [2**32, 2**32])], data=64), "'t' claims"),
    "product of dimensions wraps to little": (file([], [tensor("t", [2**33 + 1, 2**31])], data=64), "'t' claims"),
    "bytes wrap": (file([], [tensor("t", [2**62])], data=64), "'t' claims"),
    "bytes wrap with padding": (file([], [tensor("t", [2**60 - 8, 4], 1)], data=64), "'t' claims"),
    "larger than the file": (file([], [tensor("t", [17])], data=64), "'t' needs bytes"),
    "name huge": (file([], [struct.pack("<Q", HUGE)], data=64, n_tensors=1), "tensor 0"),
    "name longer than allowed": (file([], [text("x" * 70000)], n_tensors=1), "tensor 0"),
    "type unknown": (file([], [tensor("t", [32], 77)], data=640), "'t' is stored as id 77"),
    "type huge": (file([], [tensor("t", [32], 2**32 - 1)], data=640), "'t' is stored as id"),
    "type removed from ggml": (file([], [tensor("t", [32], 4)], data=640), "'t' is stored as id 4"),
    "a type that no model has": (file([], [tensor("t", [256], 26)], data=1024), "'t' is stored as I32"),
    "row no multiple of the block": (file([], [tensor("t", [33], 2)], data=640), "'t': a row of 33"),
    "row shorter than the block": (file([], [tensor("t", [16, 2], 8)], data=640), "'t': a row of 16"),
    "duplicate tensor": (file([], [tensor("t", [1]), tensor("t", [1], offset=32)], data=64), "'t' appears twice"),
    "offset not aligned": (file([], [tensor("t", [1], offset=4)], data=64), "'t' starts at 4"),
    "offset aligned to less": (
        file([u32("general.alignment", 64)], [tensor("t", [1], offset=32)], data=64, alignment=64), "'t' starts at 32"
    ),
    "offset past the end": (file([], [tensor("t", [1], offset=64)], data=64), "'t' needs bytes"),
    "offset huge": (file([], [tensor("t", [1], offset=2**64 - 32)], data=64), "'t' needs bytes"),
    "last byte missing": (file([], [tensor("t", [16])], data=64)[:-1], "'t' needs bytes"),
    "overlap": (file([], [tensor("t", [16]), tensor("u", [8], offset=32)], data=64), "'t' and 'u' overlap"),
    "one in the other": (file([], [tensor("u", [1], offset=32), tensor("t", [16])], data=64), "'t' and 'u' overlap"),
    "the same place": (file([], [tensor("t", [8]), tensor("u", [8])], data=64), "overlap"),
    # what it is
    "no keys": (file(), "architecture None"),
    "architecture unknown": (file([key("general.architecture", STRING, text("gpt2"))]), "architecture 'gpt2'"),
    "architecture a number": (file([u32("general.architecture", 7)]), "architecture 7"),
    "nothing but the architecture": (file([ARCHITECTURE]), "llama.embedding_length"),
}  # fmt: skip


@pytest.mark.parametrize(("data", "part"), MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed(tmp_path: Path, data: bytes, part: str) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert str(path) in caught.value.message
    assert part in caught.value.message
    assert len(caught.value.message) < 1000


def test_the_writer_of_wrong_files_can_write_right_ones(tiny_path: Write) -> None:
    # Otherwise the cases above might fail for a reason of their own.
    good = file(
        [u32("a", 1), array("b", STRING, 1, text("x"))], [tensor("t", [16]), tensor("u", [1], offset=64)], data=96
    )
    path = tiny_path()
    path.write_bytes(good)
    with pytest.raises(CheckpointError, match="architecture None"):  # reached only after all tables are read
        open_checkpoint(path)


# every cut, many flips --------------------------------------------------------------------------------------------


def everything(path: Path) -> Checkpoint:
    """All that is read of a file before it answers."""
    checkpoint = open_checkpoint(path)
    source = open_tokenizer(checkpoint.tokenizer, checkpoint.config.vocab_size).chat_template
    if isinstance(source, str):
        ChatTemplate(source, {})
    load_model(checkpoint, "original", "tiny")
    return checkpoint


def test_cut_at_every_byte_of_the_header(tiny_path: Write) -> None:
    path = tiny_path(weights="Q4_0", n_layers=1)
    everything(path)
    data_start = min(entry.offset for entry in read_header(path).tensors.values())
    assert data_start > 3000
    for size in range(data_start - 1, -1, -1):
        with path.open("r+b") as handle:
            handle.truncate(size)
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(path)
        assert str(path) in caught.value.message


def test_cut_in_the_data_names_the_tensor_and_the_bytes(tiny_path: Write) -> None:
    path = tiny_path(weights="Q8_0")
    infos = sorted(read_header(path).tensors.values(), key=lambda info: info.offset)
    for info in reversed(infos):
        end = info.offset + info.nbytes
        for size in (end - 1, info.offset):
            with path.open("r+b") as handle:
                handle.truncate(size)
            with pytest.raises(CheckpointError) as caught:
                open_checkpoint(path)
            assert f"'{info.name}'" in caught.value.message
            assert f"{info.offset} to {end}" in caught.value.message
            assert f"has {size}" in caught.value.message


def test_flipped_bytes_end_in_words_or_not_at_all(tiny_path: Write) -> None:
    path = tiny_path(weights="Q4_1", n_layers=1, rope_freqs=True)
    good = path.read_bytes()
    everything(path)
    header = min(entry.offset for entry in read_header(path).tensors.values())
    tables = good.index(b"token_embd.weight")
    chance = random.Random(1)
    refused = 0
    for number in range(900):
        data = bytearray(good)
        for _ in range(chance.choice([1, 1, 2, 8])):
            at = chance.randrange(*chance.choice([(0, 1200), (0, header), (tables, header)]))
            data[at] = chance.choice([0, 1, 127, 128, 255, chance.randrange(256), data[at] ^ 1 << chance.randrange(8)])
        path.write_bytes(data)
        try:
            everything(path) if number % 3 == 0 else open_checkpoint(path)
        except CheckpointError as error:
            refused += 1
            assert str(path) in error.message or "chat template" in error.message
    assert 200 < refused < 870, "both kinds of mutation are wanted"
