"""Torch zip files: what torch.save writes opens bit for bit; what an accident or an attacker writes is an error."""

from __future__ import annotations

import io
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from backend.checkpoint.torchzip import read_torch_zip
from backend.checkpoint.unpickle import STORAGES
from tests.torchfiles import P2, SIX, assert_same, holding, refused, saved, storage, tensor, text, torch_zip

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("kind", sorted(STORAGES.values(), key=str), ids=str)
def test_every_type_and_protocol(tmp_path: Path, kind: torch.dtype, protocol: int) -> None:
    values = {f"t{n}": (torch.arange(24 * n).reshape(2, 3, 4 * n) - 5 * n).to(kind) for n in (1, 2)}
    values |= {"scalar": torch.tensor(1).to(kind), "none": torch.empty(0, 3, dtype=kind)}
    assert_same(saved(tmp_path / "x.pth", values, pickle_protocol=protocol), values)


def test_views_into_one_storage(tmp_path: Path) -> None:
    whole = torch.arange(60, dtype=torch.int32)
    values = {
        "rows": whole.view(6, 10)[2:4],
        "columns": whole.view(6, 10)[:, 3:5],
        "turned": whole.view(6, 10).T,
        "every third": whole[1::3],
        "overlapping": torch.as_strided(whole, (4, 5), (2, 1), 7),
        "repeated": whole[5].expand(3, 4),
        "one": whole[59],
        "same": whole,
        "again": whole,
    }
    path = saved(tmp_path / "x.pth", values)
    assert_same(path, values)
    with zipfile.ZipFile(path) as archive:
        assert sum("/data/" in name for name in archive.namelist()) == 1  # torch wrote one storage for all of them


def test_views_are_of_the_mapped_file(tmp_path: Path) -> None:
    whole = torch.arange(1000.0)
    found = read_torch_zip(saved(tmp_path / "x.pth", {"a": whole, "b": whole[10:]}))
    assert found["b"].view().data_ptr() - found["a"].view().data_ptr() == 40


def test_a_module_with_its_version_numbers(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Embedding(5, 2)).half()
    state = module.state_dict()
    assert hasattr(state, "_metadata")
    assert_same(saved(tmp_path / "x.pth", state), dict(state))
    parameters = dict(module.named_parameters())
    assert isinstance(parameters["0.weight"], torch.nn.Parameter)
    assert_same(saved(tmp_path / "y.pth", parameters), parameters)


def test_nested_names_are_joined(tmp_path: Path) -> None:
    one, two = torch.ones(2), torch.zeros(3)
    path = tmp_path / "x.pth"
    assert_same(
        saved(path, {"model": OrderedDict(a=one, b={"c": two, 7: one})}),
        {"model.a": one, "model.b.c": two, "model.b.7": one},
    )
    extra = {
        "step": 7,
        "rate": 0.5,
        "name": "x",
        "best": None,
        "done": True,
        "sizes": [1, (2, 3)],
        "big": 1 << 40,
        "kind": torch.float16,
    }
    assert_same(saved(path, {"state_dict": {"a": one}, "more": {"e": 1}, **extra}), {"state_dict.a": one})
    assert_same(saved(path, {"a": one, "b": {"c": two}}), {"a": one, "b.c": two})
    assert "several groups of tensors ('model', 'optimizer')" in refused(
        saved(path, {"model": {"a": one}, "optimizer": {"a": two}})
    )


def test_an_ordered_dict_made_of_pairs(tmp_path: Path) -> None:
    pairs = b"](" + b"](" + text("w") + tensor() + b"ee" + b"\x85"
    path = torch_zip(tmp_path / "x.pth", P2 + b"ccollections\nOrderedDict\n" + pairs + b"R.", {"0": SIX})
    assert_same(path, {"w": torch.arange(6.0).view(2, 3)})


def test_a_member_that_is_not_aligned_is_read_all_the_same(tmp_path: Path) -> None:
    for pad in range(4):
        path = torch_zip(tmp_path / f"{pad}.pth", holding(tensor()), {"0": SIX}, root="a" * (pad + 1))
        assert_same(path, {"w": torch.arange(6.0).view(2, 3)})


def test_a_file_beyond_four_gigabytes(tmp_path: Path) -> None:
    """Sizes and offsets of 64 bits, in a file of holes: the second tensor lies behind the first's 5 GB."""
    path = tmp_path / "x.pth"
    with torch.serialization.skip_data():
        torch.save({"a": torch.empty(5 << 28, dtype=torch.float32), "b": torch.empty(8)}, path)
    assert path.stat().st_size > 5 << 30
    found = read_torch_zip(path)
    assert (found["a"].shape, found["b"].shape) == ((5 << 28,), (8,))
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo("x/data/1")
    with open(path, "r+b") as file:
        file.seek(info.header_offset + 26)
        name, extra = struct.unpack("<2H", file.read(4))
        file.seek(name + extra, 1)
        file.write(struct.pack("<8f", *range(8)))
    assert found["b"].view().tolist() == list(range(8))


# sizes that lie ---------------------------------------------------------------------------------------------------

HUGE = 1 << 61


@pytest.mark.parametrize(
    "lie",
    [
        tensor(shape=(3, 3)),
        tensor(shape=(2, 4), stride=(4, 1)),
        tensor(offset=1),
        tensor(offset=6, shape=(1,), stride=(1,)),
        tensor(stride=(4, 1)),
        tensor(stride=(-3, 1)),
        tensor(shape=(-2, 3)),
        tensor(shape=(-2, -3)),
        tensor(offset=-1),
        tensor(shape=(1 << 40,), stride=(0,)),
        tensor(shape=(7,), stride=(0,)),
        tensor(shape=(1 << 31, 1 << 31), stride=(0, 0)),
        tensor(shape=(HUGE, HUGE, 0), stride=(1, 1, 1), offset=HUGE * 4 - 1),
        tensor(shape=(2, 3), stride=(HUGE, HUGE)),
        tensor(shape=(1 << 32, 1 << 32), stride=(1, 1)),
        tensor(shape=(2,), stride=(1, 1)),
        tensor(shape=(1,) * 9, stride=(1,) * 9),
        tensor(held=storage(elements=7)),
        tensor(held=storage(elements=HUGE), shape=(1 << 60,), stride=(1,)),
        tensor(held=storage("DoubleStorage")),
        tensor(held=storage(key="1")),
        tensor(held=storage(key="../data.pkl")),
        tensor(held=storage(key="")),
        tensor(held=storage("ComplexFloatStorage", elements=3)),
        tensor(held=storage("QInt8Storage")),
        tensor(held=b"N"),
        tensor(held=b"ctorch\nFloatStorage\n"),
    ],
)
def test_a_tensor_that_reaches_out_of_its_storage(tmp_path: Path, lie: bytes) -> None:
    path = tmp_path / "x.pth"
    refused(torch_zip(path, holding(lie), {"0": SIX, "2": b"\0" * 4096}))


def test_the_same_builder_makes_a_good_file(tmp_path: Path) -> None:
    expected = torch.arange(6.0)
    for value, whole in [
        (tensor(), expected.view(2, 3)),
        (tensor(stride=(1, 2)), torch.as_strided(expected, (2, 3), (1, 2))),
        (tensor(shape=(4,), stride=(1,), offset=2), expected[2:]),
        (tensor(shape=(6,), stride=(0,), offset=5), torch.full((6,), 5.0)),
        (tensor(shape=(), stride=(), offset=4), expected[4]),
        (tensor(held=storage(elements=6)), expected.view(2, 3)),
    ]:
        assert_same(torch_zip(tmp_path / "x.pth", holding(value), {"0": SIX}), {"w": whole})
    raw = tensor(held=storage("UntypedStorage", module="torch.storage"))
    assert_same(
        torch_zip(tmp_path / "x.pth", holding(raw), {"0": bytes(range(6))}),
        {"w": torch.arange(6, dtype=torch.uint8).view(2, 3)},
    )
    bools = read_torch_zip(
        torch_zip(tmp_path / "x.pth", holding(tensor(held=storage("BoolStorage"))), {"0": bytes([0, 1, 2, 255, 0, 7])})
    )
    assert bools["w"].view().int().tolist() == [[0, 1, 1], [1, 0, 1]]


# containers -------------------------------------------------------------------------------------------------------


def test_old_formats_say_what_to_do(tmp_path: Path) -> None:
    value = {"w": torch.ones(3)}
    path = tmp_path / "x.pth"
    for protocol in (2, 3, 4):
        saved(path, value, _use_new_zipfile_serialization=False, pickle_protocol=protocol)
        assert "before version 1.6" in refused(path)
    with tarfile.open(path, "w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    assert "write it again with torch.save" in refused(path)
    path.write_bytes(pickle.dumps({"w": 1}))
    assert "bare Python pickle" in refused(path)
    for start in (b"", b"P", b"GGUF" + b"\0" * 300, b"PK\5\6" + b"\0" * 18):
        path.write_bytes(start)
        assert "no torch file" in refused(path)


def test_programs_and_other_zips(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    assert "TorchScript" in refused(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("word/document.xml", "x")
    assert "0 files data.pkl" in refused(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", P2 + b"}.")
        archive.writestr("b/data.pkl", P2 + b"}.")
    assert "2 files data.pkl" in refused(path)
    assert "no such file" in refused(tmp_path)
    assert "no such file" in refused(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    assert "no such file" in refused(tmp_path / "pipe")


def test_byte_order(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    assert_same(torch_zip(path, holding(tensor()), {"0": SIX}, order=None), {"w": torch.arange(6.0).view(2, 3)})
    assert "byte order is b'big'" in refused(torch_zip(path, holding(tensor()), {"0": SIX}, order=b"big"))
    refused(torch_zip(path, holding(tensor()), {"0": SIX}, order=b"little" * 10_000))


def test_members_that_are_compressed_or_twice_there(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", holding(tensor()))
        archive.writestr("archive/data/0", SIX)
    assert "compressed" in refused(path)
    whole = torch_zip(path, holding(tensor()), {"0": SIX, "1": b"\0" * 24}).read_bytes()
    path.write_bytes(whole.replace(b"archive/data/1", b"archive/data/0"))
    assert "two members called 'archive/data/0'" in refused(path)


def good(tmp_path: Path) -> bytes:
    return torch_zip(tmp_path / "good.pth", holding(tensor()), {"0": SIX}).read_bytes()


def test_every_truncation_of_a_file_and_of_its_pickle(tmp_path: Path) -> None:
    path, whole = tmp_path / "x.pth", good(tmp_path)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        refused(path)
    data = holding(tensor())
    for length in range(len(data)):
        refused(torch_zip(path, data[:length], {"0": SIX}))
    path.write_bytes(whole)
    assert list(read_torch_zip(path)) == ["w"]


def test_a_directory_that_lies(tmp_path: Path) -> None:
    path, whole = tmp_path / "x.pth", good(tmp_path)
    entry = whole.index(b"PK\1\2", whole.index(b"PK\1\2") + 1)  # of byteorder
    last = whole.rindex(b"PK\1\2")  # of data/0
    end = whole.rindex(b"PK\5\6")
    head = whole.rindex(b"PK\3\4")  # of data/0
    lies: list[tuple[int, str, tuple[int, ...]]] = [
        (last + 8, "<H", (1,)),  # encrypted
        (last + 20, "<I", (25,)),
        (last + 24, "<I", (25,)),
        (last + 20, "<2I", (25, 25)),
        (last + 20, "<2I", (0xFFFFFFFF, 0xFFFFFFFF)),
        (last + 28, "<H", (65535,)),
        (last + 30, "<H", (65535,)),
        (last + 34, "<H", (1,)),  # another disk
        *[(last + 42, "<I", (offset,)) for offset in (0, 1, len(whole), 0xFFFFFFFF)],
        (last + 46, "<B", (0xFF,)),
        (entry, "<I", (0,)),
        (end + 4, "<H", (1,)),
        (end + 8, "<H", (9,)),
        *[(end + 8, "<2H", (count, count)) for count in (0, 2, 9, 0xFFFF)],
        *[(end + at, "<I", (number,)) for at in (12, 16) for number in (1, 0xFFFFFFFF)],
        (end + 20, "<H", (3,)),
        (head + 8, "<H", (8,)),  # compressed, says the member's own head
        (head + 26, "<H", (9,)),
        (head + 28, "<H", (9,)),
        (head + 30, "<B", (66,)),
    ]
    for at, fmt, values in lies:
        changed = bytearray(whole)
        struct.pack_into(fmt, changed, at, *values)
        path.write_bytes(changed)
        refused(path)


MUTATE = """
import random, sys
from pathlib import Path
from backend.checkpoint.torchzip import read_torch_zip
from backend.errors import CheckpointError

def alarm(event, arguments):
    if event.split(".")[0] in ("os", "subprocess", "exec", "compile", "socket", "import", "pickle", "shutil", "ctypes"):
        if event not in ("os.listdir", "os.scandir", "os.putenv"):
            seen.append(event)

path, rounds = Path(sys.argv[1]), int(sys.argv[2])
whole, random, opened, seen = path.read_bytes(), random.Random(1), 0, []
for raw in read_torch_zip(path).values():
    raw.view().float().sum()
sys.addaudithook(alarm)
changed_path = path.with_name("changed.pth")
for _ in range(rounds):
    changed = bytearray(whole)
    for _ in range(random.choice((1, 1, 2, 4))):
        changed[random.randrange(len(whole))] = random.choice((0, 1, 0x7F, 0x80, 0xFF, random.randrange(256)))
    changed_path.write_bytes(changed)
    try:
        for raw in read_torch_zip(changed_path).values():
            values = raw.view()
            assert tuple(values.shape) == raw.shape and values.dtype == raw.dtype
            assert raw.nbytes <= len(whole)
            values.double().sum()
            raw.release()
        opened += 1
    except CheckpointError:
        pass
print(opened, sorted(set(seen)))
"""


def test_random_changes_end_in_an_error_or_a_sound_tensor(tmp_path: Path) -> None:
    """In a child process, which must end by itself: no signal, no other exception, no code run (audit hook)."""
    whole = torch.arange(24.0)
    path = saved(tmp_path / "x.pth", OrderedDict(a=whole.view(4, 6)[:, 1:3], b=whole[3:], c=torch.ones(3).half()))
    squeezed = squeeze(path)
    done = subprocess.run(
        [sys.executable, "-c", MUTATE, str(squeezed), "1000"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    opened, seen = done.stdout.split(maxsplit=1)
    assert seen == "[]\n"
    assert 0 < int(opened) < 1000


def squeeze(path: Path) -> Path:
    """The same members without torch's padding, so that a random change is likely to meet something."""
    with zipfile.ZipFile(path) as archive:
        content = {name.split("/", 1)[1]: archive.read(name) for name in archive.namelist()}
    storages = {name.removeprefix("data/"): data for name, data in content.items() if name.startswith("data/")}
    return torch_zip(path.with_name("squeezed.pth"), content["data.pkl"], storages)
