"""Hostile pickles in torch files: each is an error, and none runs anything.

They are made with Python's own pickle and out of single opcodes; a canary file would show that code was run.
"""

from __future__ import annotations

import os
import pickle
import random
import subprocess
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from backend.checkpoint import unpickle
from backend.checkpoint.torchzip import read_torch_zip
from backend.checkpoint.unpickle import MAX_OPCODES
from backend.errors import CheckpointError
from tests.torchfiles import P2, SIX, refused, storage, tensor, text, torch_zip, tuple_of


class Calls:
    """Pickles as a call of `function`."""

    def __init__(self, function: Callable[..., Any], *arguments: Any, state: Any = None) -> None:
        self.reduced = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> Any:
        return self.reduced


class Stated:
    def __setstate__(self, state: Any) -> None:
        os.system(state)

    def __getstate__(self) -> str:
        return "true"


def test_the_attack_is_real(tmp_path: Path) -> None:
    """What the corpus is made of does run code where pickle reads it."""
    canary = tmp_path / "canary"
    pickle.loads(pickle.dumps(Calls(os.system, f"touch {canary}")))
    assert canary.exists()


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_no_pickle_runs_code(tmp_path: Path, protocol: int) -> None:
    canary = tmp_path / "canary"
    touch = Calls(os.system, f"touch {canary}")
    hidden = Calls(eval, f"__import__('os').system('touch {canary}')")
    corpus: dict[str, Any] = {
        "system": touch,
        "eval": hidden,
        "exec": Calls(exec, f"open({str(canary)!r}, 'w')"),
        "open": Calls(open, str(canary), "w"),
        "popen": Calls(subprocess.Popen, ["touch", str(canary)]),
        "getattr": Calls(getattr, os, "system"),
        "pickle in a pickle": Calls(pickle.loads, pickle.dumps(touch)),
        "torch.load": Calls(torch.load, str(canary)),
        "hub": Calls(torch.hub.load, str(tmp_path), "x"),
        "as a value": {"w": touch},
        "in a list": {"w": [1, (2, touch)]},
        "as a key": {Calls(str, "w"): 1},
        "in a state": Calls(OrderedDict, state={"_metadata": touch}),
        "as an argument": Calls(torch._utils._rebuild_parameter, touch, True, OrderedDict()),
        "as a storage": Calls(torch._utils._rebuild_tensor_v2, touch, 0, (1,), (1,), False, OrderedDict()),
        "as hooks": Calls(torch._utils._rebuild_tensor_v2, 0, 0, (1,), (1,), False, touch),
        "setstate": Stated(),
        "instance": {"w": Path("x")},
        "set": {"w": {1, 2}},
        "bytes": {"w": b"x" * 300},
        "complex": {"w": 1j},
        "huge number": {"w": 1 << 2000},
        "function": {"w": os.getcwd},
        "class": {"w": Stated},
    }  # fmt: skip
    for label, value in corpus.items():
        try:
            data = pickle.dumps(value, protocol=protocol)
        except (TypeError, pickle.PicklingError):  # modules cannot be pickled; the rest of the corpus can
            assert label == "getattr"
            continue
        message = refused(torch_zip(tmp_path / "x.pth", data))
        assert "data.pkl" in message, label
        bare = tmp_path / "bare.pth"
        bare.write_bytes(data)
        refused(bare)
    assert not canary.exists()


def test_the_message_names_what_was_asked_for(tmp_path: Path) -> None:
    for value, name in [
        (Calls(os.system, "true"), f"{os.system.__module__}.system"),
        (Calls(eval, "1"), "builtins.eval"),
    ]:
        for protocol in (2, 4):
            message = refused(torch_zip(tmp_path / "x.pth", pickle.dumps({"w": value}, protocol=protocol)))
            assert name.replace("builtins", "__builtin__" if protocol == 2 else "builtins") in message
            assert "no code from a file is run" in message


METADATA = b"}" + text("_metadata") + b"}s"
RAW = {
    "INST": b"(S'true'\nios\nsystem\n.",
    "INST of an allowed name": b"(icollections\nOrderedDict\n.",
    "OBJ": b"(ccollections\nOrderedDict\no.",
    "NEWOBJ": b"ccollections\nOrderedDict\n)\x81.",
    "NEWOBJ_EX": b"ccollections\nOrderedDict\n)}\x92.",
    "EXT1": b"\x82\x01.",
    "EXT2": b"\x83\x01\0.",
    "EXT4": b"\x84\x01\0\0\0.",
    "PERSID as text": b"Pstorage\n.",
    "STACK_GLOBAL": b"\x8c\x05posix\x8c\x06system\x93\x8c\x04true\x85R.",
    "STACK_GLOBAL with a dotted name": b"\x8c\x05torch\x8c\x15serialization.os.system\x93)R.",
    "STACK_GLOBAL of numbers": b"K\1K\2\x93.",
    "GLOBAL with a dotted name": b"ctorch\nserialization.os.system\n)R.",
    "GLOBAL that splits an allowed name elsewhere": b"ctorch._utils._rebuild_tensor_v2\n__globals__\n.",
    "GLOBAL without an end": b"c" + b"a" * 500,
    "GLOBAL of no text": b"c\xff\xfe\n\xff\n.",
    "a storage called": b"ctorch\nFloatStorage\nK\6\x85R.",
    "a type called": b"ctorch\nfloat16\n)R.",
    "a tuple called": b"))R.",
    "a call without a tuple": b"ccollections\nOrderedDict\nK\1R.",
    "a dictionary of a tuple": b"ccollections\nOrderedDict\n))\x86R.",
    "a dictionary of no pairs": b"ccollections\nOrderedDict\n](K\1K\2e\x85R.",
    "state of a list": b"]" + METADATA + b"b.",
    "state of a name": b"ctorch\nFloatStorage\n" + METADATA + b"b.",
    "state with more": b"}" + METADATA + text("__class__") + b"NSb.",
    "state of another kind": b"}" + METADATA + text("__class__") + b"Nsb.",
    "state that is a list": b"}]b.",
    "a key that is a tuple": b"})Ns.",
    "a key that is a list": b"}]Ns.",
    "a key without a value": b"}(K\1u.",
    "items for a list": b"](K\1K\2u.",
    "an item for a dictionary": b"}K\1a.",
    "values below a mark": b"K\1(\x85t.",
    "a mark that stays": b"}(.",
    "no mark": b"}t.",
    "two values": b"}}.",
    "no value": b".",
    "more after the end": b"}.}.",
    "a value that was never stored": b"h\7.",
    "storing nothing": b"q\0.",
    "storing below a mark": b"}(q\0t.",
    "protocol 9": b"\x80\x09}.",
    "LONG4": b"\x8b\xff\xff\xff\x7f.",
    "LONG1 of 255 bytes": b"\x8a\xff" + b"\1" * 255 + b".",
    "BINUNICODE": b"X\xff\xff\xff\xffabc.",
    "BINUNICODE8": b"\x8d\xff\xff\xff\xff\xff\xff\xff\x7fabc.",
    "BINBYTES8": b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7fabc.",
    "BYTEARRAY8": b"\x96\xff\xff\xff\xff\xff\xff\xff\x7fabc.",
    "FRAME": b"\x95\xff\xff\xff\xff\xff\xff\xff\x7f}.",
    "text that is no UTF-8": b"X\2\0\0\0\xff\xfe.",
    "half a surrogate": b"X\3\0\0\0\xed\xa0\x80.",
    "a storage of four": tuple_of(text("storage"), b"ctorch\nFloatStorage\n", text("0"), text("cpu")) + b"Q.",
    "a storage of another module": tuple_of(text("module"), b"N", text("0"), text("cpu"), b"K\1") + b"Q.",
    "a storage of no type":
        tuple_of(text("storage"), text("torch.FloatStorage"), text("0"), text("cpu"), b"K\1") + b"Q.",
    "a storage of an allowed call": storage("OrderedDict", module="collections") + b".",
    "a storage with a number for a key":
        tuple_of(text("storage"), b"ctorch\nFloatStorage\n", b"K\0", text("cpu"), b"K\1") + b"Q.",
    "a storage of minus one": storage(elements=-1) + b".",
    "a storage of half":
        tuple_of(text("storage"), b"ctorch\nFloatStorage\n", text("0"), text("cpu"), b"G?\xe0\0\0\0\0\0\0") + b"Q.",
    "a storage of yes": tuple_of(text("storage"), b"ctorch\nFloatStorage\n", text("0"), text("cpu"), b"\x88") + b"Q.",
    "nothing inside": b"}.",
    "a tensor alone": tensor() + b".",
    "a list": b"].",
    "no pickle": b"",
}  # fmt: skip


@pytest.mark.parametrize("label", RAW)
def test_opcodes_out_of_place(tmp_path: Path, label: str) -> None:
    path = tmp_path / "x.pth"
    refused(torch_zip(path, P2 + RAW[label], {"0": SIX}))


@pytest.mark.parametrize(
    "body",
    [
        b"}q\0" + b"h\0" * 200_000,
        b"]" * 200_000,
        b"(" * 200_000,
        b")" + b"\x85" * 200_000,
        b"}" + b"\x94" * 200_000,
        b"ccollections\nOrderedDict\nq\1](" + b"](K\1Ne" * 10_000 + b"e\x85q\0" + b"h\1h\0R" * 10_000,
    ],
    ids=["recalls", "lists", "marks", "tuples", "memo", "copies"],
)  # fmt: skip
def test_bombs_end_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: bytes) -> None:
    """With a fifth of the usual budget, to save time; the bodies are twice as long as that, or copy twice as much."""
    assert MAX_OPCODES < 1_000_000
    monkeypatch.setattr(unpickle, "MAX_OPCODES", 100_000)
    assert "takes more than 100000 steps" in refused(torch_zip(tmp_path / "x.pth", P2 + body + b"."))


def test_dictionaries_that_hold_themselves(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    refused(torch_zip(path, P2 + b"}q\0" + text("again") + b"h\0s."))
    refused(torch_zip(path, P2 + b"}q\0" + text("again") + b"h\0s" + text("w") + tensor() + b"s.", {"0": SIX}))
    assert "names in its dictionaries" in refused(torch_zip(path, P2 + shared(6) + b".", {"0": SIX}))
    # A long name over many entries would be copied each time.
    long = b"}" + text("n" * 100_000) + b"}(" + b"".join(text(str(n)) + b"N" for n in range(5000)) + b"us."
    refused(torch_zip(path, P2 + long))


def shared(depth: int) -> bytes:
    """Dictionaries in dictionaries, each with the one below it 30 times: 7 * 10^8 names out of 180 entries."""
    if depth == 0:
        return b"}q\0" + text("w") + tensor() + b"s"
    again = b"".join(text(str(n)) + b"h" + bytes([depth - 1]) + b"s" for n in range(1, 30))
    return b"}q" + bytes([depth]) + text("0") + shared(depth - 1) + b"s" + again


def test_random_orders_of_known_opcodes(tmp_path: Path) -> None:
    """Pieces of real pickles shuffled: the machine must answer each with an error or a dictionary of sound tensors."""
    pieces = [b"}", b"]", b")", b"(", b"t", b"\x85", b"\x86", b"\x87", b"R", b"Q", b"b", b"s", b"u", b"a", b"e", b"N",
              b"K\1", b"q\0", b"h\0", b"\x94", b"\x93", b"\x88", text("w"), text("storage"), tensor(), storage(),
              b"ccollections\nOrderedDict\n", b"ctorch._utils\n_rebuild_tensor_v2\n", METADATA]  # fmt: skip
    generator = random.Random(2)
    path = tmp_path / "x.pth"
    opened = 0
    for _ in range(500):
        start = b"}" + text("a") + tensor() + b"s" if generator.random() < 0.5 else b""
        torch_zip(
            path, P2 + start + b"".join(generator.choices(pieces, k=generator.randrange(1, 9))) + b".", {"0": SIX}
        )
        try:
            opened += len(read_torch_zip(path))
        except CheckpointError:
            continue
    assert opened > 0
