"""Our reader of safetensors files against files that the `safetensors` library wrote, and against damaged ones."""

from __future__ import annotations

import json
import os
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from backend.checkpoint.safetensors import DTYPES, MAX_HEADER, is_safetensors, read_safetensors
from backend.checkpoint.strictjson import MAX_VALUES, parse_json
from backend.errors import CheckpointError


def raw_file(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    """A file with this header, as bytes or as what JSON makes of it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(dtype: Any = "U8", shape: Any = (4,), offsets: Any = (0, 4), **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


# what is right ----------------------------------------------------------------------------------------------------


def test_every_dtype_is_read_bit_for_bit(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, dtype in DTYPES.items():
        values = torch.randint(0, 2 if name == "BOOL" else 256, (6 * dtype.itemsize,), generator=generator)
        tensors[name] = values.to(torch.uint8).view(dtype).view(2, 3)
    save_file(tensors, tmp_path / "all.safetensors")
    found = read_safetensors(tmp_path / "all.safetensors")
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        raw = found[name]
        assert (raw.name, raw.shape, raw.dtype, raw.nbytes) == (name, (2, 3), tensor.dtype, tensor.nbytes)
        assert raw.file == tmp_path / "all.safetensors"
        assert raw.view().dtype == tensor.dtype
        assert torch.equal(raw.view().view(torch.uint8), tensor.view(torch.uint8)), name
        raw.release()
        assert torch.equal(raw.view().view(torch.uint8), tensor.view(torch.uint8)), "after its pages went back"


def test_scalars_empty_tensors_and_odd_names(tmp_path: Path) -> None:
    tensors = {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 7), "naïve/ü": torch.arange(3)}
    save_file(tensors, tmp_path / "x.safetensors")
    found = read_safetensors(tmp_path / "x.safetensors")
    assert {name: raw.shape for name, raw in found.items()} == {"scalar": (), "empty": (0, 7), "naïve/ü": (3,)}
    for name, tensor in tensors.items():
        assert torch.equal(found[name].view(), tensor)


def test_data_that_is_not_aligned_is_copied(tmp_path: Path) -> None:
    values = torch.randn(5, dtype=torch.float64)
    header = {"b": entry(offsets=(0, 1), shape=(1,)), "v": entry("F64", (5,), (1, 41)), "__metadata__": {"a": "b"}}
    file = raw_file(tmp_path / "x.safetensors", header, b"\x07" + values.numpy().tobytes())
    found = read_safetensors(file)
    assert found["b"].view().tolist() == [7]
    assert torch.equal(found["v"].view(), values)
    assert list(found) == ["b", "v"]


def test_a_view_cannot_write_to_the_file(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(4)}, tmp_path / "x.safetensors")
    before = (tmp_path / "x.safetensors").read_bytes()
    read_safetensors(tmp_path / "x.safetensors")["x"].view().fill_(1)
    assert (tmp_path / "x.safetensors").read_bytes() == before


def test_opening_reads_no_data(tmp_path: Path) -> None:
    """A sparse file of 16 GiB opens, and a row of its tensor can be read."""
    rows = 1 << 22
    header = json.dumps({"big": entry("F16", (rows, 2048), (0, rows * 4096))}).encode().ljust(120)  # aligned data
    file = raw_file(tmp_path / "x.safetensors", header)
    os.truncate(file, file.stat().st_size + rows * 4096)
    raw = read_safetensors(file)["big"]
    assert raw.nbytes == rows * 4096
    assert not raw.view()[rows - 1].any()


def test_known_by_its_start(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(4)}, tmp_path / "a")
    (tmp_path / "b").write_bytes(b"GGUF" + bytes(60))
    torch.save({"x": torch.zeros(4)}, tmp_path / "c")
    (tmp_path / "d").write_bytes(b"\x02")
    assert [is_safetensors(tmp_path / name) for name in "abcd"] == [True, False, False, False]


# what is wrong ----------------------------------------------------------------------------------------------------

GOOD = entry()
BAD_HEADERS: dict[str, tuple[Any, str]] = {
    "a list": ([1], "no JSON object"),
    "spaces first": (b' {"x":1}', "no JSON object"),
    "cut JSON": (b'{"x": {', "not valid JSON"),
    "not UTF-8": (b'{"\xff": 1}', "UTF-8"),
    "a name twice": (b'{"x":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"x":{}}', "'x' appears twice"),
    "deep": (b'{"x":' + b"[" * 50_000 + b"]" * 50_000 + b"}", "nested deeper"),
    "deep by a little": (b'{"x":' + b"[" * 60 + b"]" * 60 + b"}", "nested deeper"),
    "a number of many digits": (b'{"x":' + b"9" * 100_000 + b"}", "100000 digits"),
    "metadata of numbers": ({"x": GOOD, "__metadata__": {"a": 1}}, "__metadata__"),
    "metadata a list": ({"x": GOOD, "__metadata__": []}, "__metadata__"),
    "an entry that is none": ({"x": 5}, "tensor 'x' is not described"),
    "an entry with more": ({"x": entry(extra=1)}, "tensor 'x' is not described"),
    "an entry with less": ({"x": {"dtype": "U8", "shape": [4]}}, "tensor 'x' is not described"),
    "an empty name": ({"": GOOD}, "has the name ''"),
    "a name that clears the screen": ({"\x1b[2J": GOOD}, "has the name '\\x1b[2J'"),
    "half a character as name": (b'{"\\ud800":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}', "has the name"),
    "a long name": ({"n" * 2000: GOOD}, "has the name"),
    "unknown dtype": ({"x": entry("F12")}, "dtype 'F12'"),
    "dtype a list": ({"x": entry(["F16"])}, "tensor 'x' has the dtype"),
    "shape a number": ({"x": entry(shape=4)}, "tensor 'x' has the shape 4"),
    "negative shape": ({"x": entry(shape=(-4,))}, "has the shape [-4]"),
    "negative twice": ({"x": entry(shape=(-2, -2))}, "has the shape"),
    "shape of floats": ({"x": entry(shape=(4.0,))}, "has the shape [4.0]"),
    "shape of truth": ({"x": entry(shape=(True, 4))}, "has the shape [True, 4]"),
    "many dimensions": ({"x": entry(shape=[1] * 9 + [4])}, "has the shape"),
    "2^64 wraps to 4": ({"x": entry(shape=(1 << 62, 4, 4))}, "more than any model"),
    "huge but for a zero": ({"x": entry(shape=(1 << 60, 1 << 60, 0), offsets=(0, 0))}, "more than any model"),
    "one value too many": ({"x": entry(shape=(5,))}, "needs 5 bytes, but its offsets give it 4"),
    "wrong width": ({"x": entry("F32")}, "needs 16 bytes, but its offsets give it 4"),
    "three offsets": ({"x": entry(offsets=(0, 4, 4))}, "tensor 'x' has the offsets"),
    "offsets backwards": ({"x": entry(offsets=(4, 0))}, "claims bytes 4 to 0"),
    "one byte after the end": ({"x": entry(shape=(5,), offsets=(0, 5))}, "tensor 'x' claims bytes 0 to 5"),
    "far after the end": ({"x": entry(offsets=(1 << 62, (1 << 62) + 4))}, "tensor 'x' claims bytes"),
    "negative offset": ({"x": entry(offsets=(-4, 0))}, "has the offsets"),
    "overlap": ({"x": GOOD, "y": entry(shape=(2,), offsets=(2, 4))}, "'y' overlaps tensor 'x'"),
    "the same bytes": ({"x": GOOD, "y": GOOD}, "'y' overlaps tensor 'x'"),
    "a hole first": ({"x": entry(shape=(2,), offsets=(2, 4))}, "'x' leaves a gap after the header"),
    "a hole": ({"x": entry(shape=(1,), offsets=(0, 1)), "y": entry(shape=(1,), offsets=(3, 4))}, "'y' leaves a gap"),
    "bytes left over": ({"x": entry(shape=(3,), offsets=(0, 3))}, "1 bytes after tensor 'x' belong to no tensor"),
    "no tensors but bytes": ({}, "4 bytes after the header"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_bad_headers_are_refused_with_a_sentence(tmp_path: Path, case: str) -> None:
    header, words = BAD_HEADERS[case]
    file = raw_file(tmp_path / "bad.safetensors", header, bytes(4))
    with pytest.raises(CheckpointError) as caught:
        read_safetensors(file)
    assert words in caught.value.message
    assert caught.value.message.startswith(str(file))
    assert len(caught.value.message) < 600 + len(str(file))
    assert caught.value.message.isprintable()


def test_the_good_header_of_these_cases_opens(tmp_path: Path) -> None:
    assert list(read_safetensors(raw_file(tmp_path / "good.safetensors", {"x": GOOD}, bytes(4)))) == ["x"]


@pytest.mark.parametrize("length", [MAX_HEADER + 1, 1 << 63, (1 << 64) - 1, 99_000_000, 40])
def test_a_header_length_that_cannot_be(tmp_path: Path, length: int) -> None:
    file = raw_file(tmp_path / "bad.safetensors", {"x": GOOD}, bytes(4), length=length)
    with pytest.raises(CheckpointError, match=str(length) if length > 60 else "JSON"):
        read_safetensors(file)


def test_truncation_at_every_byte(tmp_path: Path) -> None:
    save_file({"a": torch.arange(6.0).view(2, 3), "b": torch.zeros(3, dtype=torch.int8)}, tmp_path / "good.safetensors")
    whole = (tmp_path / "good.safetensors").read_bytes()
    file = tmp_path / "cut.safetensors"
    for size in range(len(whole)):
        file.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"cut\.safetensors"):
            read_safetensors(file)
    assert len(whole) > 100


def test_random_damage_gives_a_sentence_or_values_in_range(tmp_path: Path) -> None:
    save_file({"a": torch.arange(6.0).view(2, 3), "b": torch.zeros(3, dtype=torch.int8)}, tmp_path / "good.safetensors")
    whole = (tmp_path / "good.safetensors").read_bytes()
    file, chance, refused = tmp_path / "bad.safetensors", random.Random(0), 0
    for _ in range(600):
        data = bytearray(whole)
        for _ in range(chance.randint(1, 4)):
            data[chance.randrange(len(data))] = chance.choice((chance.randrange(256), ord("0"), ord("9"), ord('"')))
        file.write_bytes(data)
        try:
            for raw in read_safetensors(file).values():
                assert raw.view().nbytes == raw.nbytes <= len(whole)
                raw.view().view(torch.uint8).sum() if raw.shape else None
        except CheckpointError:
            refused += 1
    assert 200 < refused < 600


def test_a_file_that_is_not_there_or_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("missing", "pipe", ""):
        with pytest.raises(CheckpointError):
            read_safetensors(tmp_path / name)


def test_json_of_many_small_values_is_refused_before_it_is_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    data = b'{"a": [' + b"[]," * MAX_VALUES + b"1]}"
    monkeypatch.setattr("json.loads", lambda *_, **__: pytest.fail("was parsed"))
    with pytest.raises(CheckpointError, match="holds about 8388610 values"):
        parse_json(data, "x")
