"""Random damage to files, by kind of file: what storage faults do, and what somebody who knows the format would do.

Everything is decided by the `random.Random` that is given, so a case is made again from its seed.
"""

from __future__ import annotations

import io
import json
import pickletools
import random
import re
import struct
import zipfile
from collections.abc import Callable
from copy import deepcopy
from typing import Any

EXTREMES = (0, 1, 2, 0x7F, 0xFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
MAX_GROWTH = 1 << 16  # bytes that a mutation may add
_WORD = re.compile(rb"[A-Za-z_][\w./<>|-]{3,}")
_HEAD = 4096  # where headers are

# JSON ---------------------------------------------------------------------------------------------------------------

# A marker in the dumped text -> what stands there instead: what json.dumps would not write.
_RAW = {
    "@digits@": "1" * 5000,
    "@deep@": "[" * 3000 + "]" * 3000,
    "@deep20@": "[" * 20 + "]" * 20,
    "@objects@": '{"a":' * 2000 + "1" + "}" * 2000,
    "@float@": "1e999",
    "@small@": "1e-999",
    "@half@": '"\\ud800"',
    "@twice@": '{"a": 1, "a": 2}',
    "@broken@": "{,}",
}
_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 63, 2**15, 2**31, 2**32, 2**53 + 1, 2**63, 2**64, 10**30, -(2**63), 0.0, 0.5,
    -0.5, 1e-30, 1e30, 1e308, float("nan"), float("inf"), float("-inf"), "", "a", "0", "\0", "a\nb", "\u202e",
    "A" * 5000,
    "../../../../etc/passwd", "/etc/passwd", "model.safetensors", "BPE", "gptq_v2", "F64", "I8", "llama", "mistral",
    "linear", "llama3", "Sequence", "(a+)+$", "(?:)*", "\\p{L}*", "[", [], {}, [[]], [0], [1, 2], [2**63, 2**63],
    [""], {"": ""},
    *_RAW,
)  # fmt: skip


def mutate_json(rng: random.Random, data: bytes) -> bytes:
    """One to three values, keys or entries of a JSON document replaced. What is no JSON is damaged byte by byte."""
    try:
        document = json.loads(data)
    except ValueError:
        return mutate_bytes(rng, data)
    root = [document]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        _change(rng, root)
    text = json.dumps(root[0])
    for marker, raw in _RAW.items():
        text = text.replace(f'"{marker}"', raw)
    return text.encode()


def _change(rng: random.Random, root: list[Any]) -> None:
    """Walks down at random and changes what it ends at."""
    parent: Any = root
    key: Any = 0
    while isinstance(parent[key], list | dict) and parent[key] and rng.random() < 0.8:
        parent = parent[key]
        key = rng.choice(list(parent)) if isinstance(parent, dict) else rng.randrange(len(parent))
    action = rng.randrange(8)
    if parent is root or action < 4:
        parent[key] = deepcopy(rng.choice(_VALUES))
    elif action == 4:
        del parent[key]
    elif action == 5:  # a neighbour's value
        other = rng.choice(list(parent)) if isinstance(parent, dict) else rng.randrange(len(parent))
        parent[key] = deepcopy(parent[other])
    elif action == 6 and isinstance(parent[key], int | float) and abs(parent[key]) < 2**40:
        parent[key] = rng.choice((parent[key] + 1, parent[key] - 1, parent[key] * 2, -parent[key], float(parent[key])))
    elif isinstance(parent, dict):
        parent[rng.choice(("", "a" * 2000, "../x", "\n", f"{key}2", key[:-1]))] = parent.pop(key)
    else:
        parent[:] = deepcopy(parent) + parent if len(parent) < 300 else parent[::-1]


# bytes --------------------------------------------------------------------------------------------------------------


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    """One to four changes of the kinds below."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        data = rng.choice(_CHANGES)(rng, data)
    return data


def _place(rng: random.Random, data: bytes) -> int:
    """An offset: near the names that stand in a header, in a header, or anywhere."""
    where = rng.random()
    if where < 0.5 and (found := _WORD.search(data, rng.randrange(len(data) + 1))):
        at = found.start() if rng.random() < 0.5 else found.end()
        return min(max(0, at + rng.choice((-12, -8, -4, -1, 0, 1, 4, 8, 12, 16, 20))), len(data))
    return rng.randrange(min(len(data), _HEAD if where < 0.8 else len(data)) + 1)


def _flip(rng: random.Random, data: bytes) -> bytes:
    at = min(_place(rng, data), max(0, len(data) - 1))
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :] if data else data


def _set(rng: random.Random, data: bytes) -> bytes:
    at, length = _place(rng, data), rng.choice((1, 1, 2, 4, 16))
    return data[:at] + rng.choice((b"\0", b"\xff", b"\n", b"\x80")) * length + data[at + length :]


def _number(rng: random.Random, data: bytes) -> bytes:
    at, form = _place(rng, data), rng.choice(("<I", "<Q", "<I", "<Q", "<H", "<f", ">I"))
    if form == "<f":
        packed = struct.pack(form, rng.choice((float("nan"), float("inf"), -1.0, 0.0, 1e38, 1e-45)))
    else:
        size = struct.calcsize(form)
        packed = (rng.choice(EXTREMES) % 2 ** (8 * size)).to_bytes(size, "little" if form[0] == "<" else "big")
    return data[:at] + packed + data[at + len(packed) :]


def _nudge(rng: random.Random, data: bytes) -> bytes:
    """A number made a little larger or smaller."""
    at = _place(rng, data)
    value = int.from_bytes(data[at : at + 4], "little") + rng.choice((-32, -8, -1, 1, 8, 32))
    return data[:at] + (value % 2**32).to_bytes(4, "little") + data[at + 4 :]


def _cut(rng: random.Random, data: bytes) -> bytes:
    return data[: _place(rng, data)]


def _delete(rng: random.Random, data: bytes) -> bytes:
    at = _place(rng, data)
    return data[:at] + data[at + rng.choice((1, 2, 4, 8, 33, 1000)) :]


def _insert(rng: random.Random, data: bytes) -> bytes:
    at = _place(rng, data)
    return data[:at] + rng.randbytes(rng.choice((1, 2, 4, 8, 33))) + data[at:]


def _double(rng: random.Random, data: bytes) -> bytes:
    at, length = _place(rng, data), rng.choice((1, 4, 8, 100, 4096))
    return data[: at + length] + data[at : at + length] * rng.choice((1, 1, 3)) + data[at + length :]


def _move(rng: random.Random, data: bytes) -> bytes:
    """A range written over another one."""
    here, there, length = _place(rng, data), _place(rng, data), rng.choice((4, 8, 32, 200))
    return data[:there] + data[here : here + length] + data[there + length :]


_CHANGES: tuple[Callable[[random.Random, bytes], bytes], ...] = (
    _flip, _flip, _set, _number, _number, _number, _nudge, _nudge, _cut, _delete, _insert, _double, _move,
)  # fmt: skip


def splice(rng: random.Random, one: bytes, other: bytes) -> bytes:
    """The beginning of one file and the end of another."""
    return one[: _place(rng, one)] + other[_place(rng, other) :]


# formats that are wrapped ---------------------------------------------------------------------------------------------


def mutate_safetensors(rng: random.Random, data: bytes) -> bytes:
    """The JSON header, its length set right again; or bytes."""
    if rng.random() < 0.4:
        return mutate_bytes(rng, data)
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length]
    header = mutate_json(rng, header) if rng.random() < 0.8 else mutate_bytes(rng, header)
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def mutate_torch(rng: random.Random, data: bytes) -> bytes:
    """A torch zip: bytes of the archive, its directory, or its pickle, with or without the right checksum."""
    choice = rng.random()
    if choice < 0.25:
        return mutate_bytes(rng, data)
    if choice < 0.45:
        at = data.rfind(b"PK\1\2", 0, rng.choice((len(data), max(5, data.rfind(b"PK\1\2")))))
        at = max(0, at if rng.random() < 0.6 else data.rfind(b"PK\5\6") - rng.choice((0, 20, 76)))
        return data[:at] + mutate_bytes(rng, data[at:])
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
        name = next(name for name in members if name.endswith("/data.pkl"))
        start = archive.getinfo(name).header_offset
    pickled = mutate_pickle(rng, members[name])
    if choice < 0.7 and len(pickled) == len(members[name]):  # in place, the checksum left wrong
        at = data.index(members[name], start)
        return data[:at] + pickled + data[at + len(pickled) :]
    members[name] = pickled
    if rng.random() < 0.1:
        victim = rng.choice(list(members))
        members[rng.choice((victim + "x", "../" + victim, "archive/data/0"))] = members.pop(victim)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED if rng.random() < 0.03 else zipfile.ZIP_STORED) as archive:
        for member, content in members.items():
            archive.writestr(zipfile.ZipInfo(member), content)
    return out.getvalue()


_ATTACKS = (
    b"cos\nsystem\nX\x04\0\0\0true\x85R0", b"cbuiltins\neval\nX\x01\0\0\x001\x85R0", b"cposix\nsystem\n",
    b"c__main__\nx\n",
    b"\x8c\x02os\x8c\x06system\x93", b"ctorch\nload\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"(itorch\nx\n",
    b"\x82\x01",
    b"(lb", b"}b", b")R", b")\x81", b"0", b"2", b"(((((", b"\x94h\0", b"j\xff\xff\xff\xff", b"r\xff\xff\xff\xff",
    b"X\xff\xff\xff\xff",
    b"\x8a\xff", b"\x8b\xff\xff\xff\x7f", b"\x8a\x08\0\0\0\0\0\0\0\x80", b"\x95\xff\xff\xff\xff\xff\xff\xff\xff",
    b"Q", b"R", b"u", b"e", b".",
)  # fmt: skip


def mutate_pickle(rng: random.Random, data: bytes) -> bytes:
    """Opcodes replaced, dropped, doubled and swapped, their numbers made extreme, attacks put between them."""
    starts = [place for _, _, place in pickletools.genops(data) if place is not None]
    for _ in range(rng.choice((1, 1, 2, 4))):
        index = rng.randrange(len(starts) - 1)
        at, end = starts[index], starts[index + 1]
        action = rng.randrange(8)
        if action == 0:  # another opcode, the same argument
            data = data[:at] + bytes([rng.choice(data[1:] if rng.random() < 0.7 else range(256))]) + data[at + 1 :]
        elif action == 1:
            data = data[:at] + data[end:]
        elif action == 2:
            data = data[:end] + data[at:end] * rng.choice((1, 1, 50)) + data[end:]
        elif action == 3:
            data = data[:at] + rng.choice(_ATTACKS) + data[at:]
        elif action == 4:  # a number in place of whatever it was
            value = rng.choice(EXTREMES[:-2]) * rng.choice((1, 1, -1))
            data = data[:at] + b"\x8a\x08" + value.to_bytes(8, "little", signed=True) + data[end:]
        elif action == 5 and end - at > 1:  # the argument's bytes
            spot = rng.randrange(at + 1, end)
            data = data[:spot] + bytes([rng.choice((0, 1, 0x7F, 0xFF, data[spot] ^ 1))]) + data[spot + 1 :]
        elif action == 6:
            there = rng.choice(starts)
            data = data[:at] + data[there : there + end - at] + data[end:]
        else:
            data = data[:end] + data[rng.choice(starts) :]
        starts = [place for place in starts if place < len(data)]
    return data[: 1 << 20]


_FRAGMENTS = {
    "template": (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "{{ 'a' * 10 ** 9 }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ messages.__class__ }}",
        "{{ cycler.__init__.__globals__ }}",
        "{% set x = [1] * 10 ** 8 %}", "{{ 9 ** 9 ** 9 }}", "{% include 'x' %}", "{% import 'os' as os %}",
        "{% extends 'x' %}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{{ raise_exception('no') }}", "{{", "{%", "%}",
        "{% raw %}", "{#",
        "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
        "{{ messages | map(attribute='x.y') | list }}",
        "{{ '%1000000000d' % 1 }}", "{{ '{:>1000000000}'.format(1) }}", "{{ messages | tojson(indent=99999999) }}",
        "{{ strftime_now('%Y' * 99999) }}", "{{ (" * 200 + ") }}" * 200, "{% if x %}" * 300, "{% break %}",
        "{% set messages = 1 %}",
    ),
    "yaml": (
        "a: &a [*a, *a]\n", "lol: !!python/object/apply:os.system ['true']\n", "[" * 3000, "{" * 500, "? [a]\n: b\n",
        "<<: {a: 1}\n",
        "model: 1\n", "context: 99999999999999999999\n", "context: 1_0\n", "context: 0x100\n",
        "context: 190:20:30\n", "weights: !!binary aGk=\n",
        "title: 2026-02-31\n", "\t", "%YAML 9.9\n---\n", "---\na: 1\n", "...\n", "context: 0b" + "1" * 20000 + "\n",
        "0x" + "f" * 9000 + ": 1\n",
        "sampling:\n  1: 2\n", "sampling: {null: 1}\n", "sampling: {temperature: [1]}\n", "sampling: {stop: {a: 1}}\n",
        "sampling: {seed: 99999999999999999999}\n", "sampling: {[1]: 1}\n", "extends: ../../x\n", "extends: good\n",
        "sampling: [1]\n",
        "sampling: {temperature: .nan}\n", "sampling: {temperature: 1e999, top_k: -1}\n", "lora: [1]\n",
        "!!set {a}\n", "1" * 5000 + ": 1\n",
        "context: " + "9" * 5000 + "\n", "\ud7ff", "\x00", "\x85", "title: |\n  x\n", "title: \"\\ud800\"\n",
    ),
}  # fmt: skip


def mutate_text(rng: random.Random, data: bytes, kind: str) -> bytes:
    """Text with fragments put in, or changed as bytes."""
    if rng.random() < 0.4:
        return mutate_bytes(rng, data)
    at = rng.choice([0, len(data), *(found.end() for found in re.finditer(rb"\n|%}|}}", data))])
    return data[:at] + rng.choice(_FRAGMENTS[kind]).encode() + data[at:]


def mutate_lines(rng: random.Random, data: bytes) -> bytes:
    """A file of lines: some dropped, doubled, swapped."""
    if rng.random() < 0.5:
        return mutate_bytes(rng, data)
    lines = data.splitlines(keepends=True)
    here, there = rng.randrange(len(lines)), rng.randrange(len(lines))
    lines[here] = rng.choice((b"", lines[there], lines[here] * 2, lines[here].replace(b" ", b"  "), lines[here][:-2]))
    return b"".join(lines)


def mutate_protobuf(rng: random.Random, data: bytes) -> bytes:
    """Bytes, or a field put in anywhere, lengths not mended."""
    if rng.random() < 0.7:
        return mutate_bytes(rng, data)
    field = rng.choice((1, 2, 3, 40, 41, 42, rng.randrange(1 << 16))) << 3 | rng.randrange(8)
    tail = rng.choice(
        (b"\0", b"\x01", b"\x7f", b"\xff" * 9 + b"\x01", b"\xff" * 11, b"\x05hello", b"\xff\xff\xff\xff\x0f")
    )
    at = rng.choice((0, len(data), _place(rng, data)))
    key = bytes([field & 0x7F | 0x80, field >> 7 & 0x7F | 0x80, field >> 14]) if field > 0x7F else bytes([field])
    return data[:at] + key + tail + data[at:]


def mutate(rng: random.Random, data: bytes, kind: str) -> bytes:
    """`data` changed as its kind suggests: json, safetensors, torch, protobuf, lines, template, yaml, or bytes."""
    how: dict[str, Callable[[random.Random, bytes], bytes]] = {
        "json": lambda rng, data: mutate_json(rng, data) if rng.random() < 0.8 else mutate_bytes(rng, data),
        "safetensors": mutate_safetensors,
        "torch": mutate_torch,
        "protobuf": mutate_protobuf,
        "lines": mutate_lines,
        "template": lambda rng, data: mutate_text(rng, data, "template"),
        "yaml": lambda rng, data: mutate_text(rng, data, "yaml"),
    }
    return how.get(kind, mutate_bytes)(rng, data)[: len(data) + MAX_GROWTH]
