"""Where the members of a zip archive lie in its file: names, starts and lengths, all checked, no member read.

Reads the end record, the directory and the head of each member, whatever the size of the file. Layout: PKWARE's
APPNOTE.TXT 6.3, sections 4.3.7 to 4.3.16 and 4.5.3.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NoReturn

from backend.errors import CheckpointError

LOCAL, ENTRY, END, END64, LOCATOR64 = b"PK\3\4", b"PK\1\2", b"PK\5\6", b"PK\6\6", b"PK\6\7"
MAX_MEMBERS = 1 << 17
MAX_DIRECTORY = 1 << 26  # bytes
_FULL16, _FULL32 = 0xFFFF, 0xFFFFFFFF


@dataclass(frozen=True)
class Member:
    """`nbytes` bytes of the file from `start` on, which are the member's own if `stored` and else a compressed form."""

    name: str
    start: int
    nbytes: int
    stored: bool


def read_members(path: Path, file: BinaryIO) -> dict[str, Member]:
    """All members by name. `file` is open, best without a buffer. Raises CheckpointError."""
    return _Index(path, file).members


class _Index:
    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path, self._file, self._size = path, file, file.seek(0, 2)
        start, length, count = self._directory()
        self._limit = start  # members end before the directory begins
        directory = self._read(start, length, "its directory")
        self.members: dict[str, Member] = {}
        at = 0
        for _ in range(count):
            at = self._entry(directory, at)
        if at != length:
            self._fail(f"has {length - at} bytes in its directory that belong to no member")

    def _fail(self, what: str) -> NoReturn:
        raise CheckpointError(f"{self._path}: the zip archive {what}; it is incomplete or damaged, download it again")

    def _read(self, offset: int, length: int, what: str) -> bytes:
        if offset < 0 or offset + length > self._size:
            self._fail(f"needs bytes {offset} to {offset + length} for {what}, but the file has {self._size}")
        self._file.seek(offset)
        data = b""
        while len(data) < length and (piece := self._file.read(length - len(data))):
            data += piece
        if len(data) != length:
            self._fail(f"became shorter while {what} was read")
        return data

    def _directory(self) -> tuple[int, int, int]:
        """Start, length and number of entries of the directory."""
        tail_start = max(0, self._size - 22 - _FULL16)
        tail = self._read(tail_start, self._size - tail_start, "its end record")
        at = tail.rfind(END)
        if at < 0 or len(tail) - at < 22:
            self._fail("has no end record")
        disk, first_disk, here, count, length, start, comment = struct.unpack("<4H2IH", tail[at + 4 : at + 22])
        if at + 22 + comment != len(tail):
            self._fail("has a damaged end record")
        end = tail_start + at
        if end >= 20 and (locator := self._read(end - 20, 20, "its end record"))[:4] == LOCATOR64:
            record_at = struct.unpack("<Q", locator[8:16])[0]
            record = self._read(record_at, 56, "its 64-bit end record")
            if record[:4] != END64 or record_at + 56 > end - 20:
                self._fail("has a damaged 64-bit end record")
            disk, first_disk, here, count, length, start = struct.unpack("<2I4Q", record[16:56])
            end = record_at
        if disk or first_disk or here != count:
            self._fail("says that it is spread over several files")
        if count > MAX_MEMBERS or length > MAX_DIRECTORY or count * 46 > length:
            self._fail(f"claims {count} members in a directory of {length} bytes, which cannot be right")
        if start + length > end:
            self._fail(f"says its directory is at bytes {start} to {start + length}, after its end record at {end}")
        return start, length, count

    def _entry(self, directory: bytes, at: int) -> int:
        """Add the member whose directory entry is at `at`; return where the next entry begins."""
        fixed = directory[at : at + 46]
        if len(fixed) < 46 or fixed[:4] != ENTRY:
            self._fail(f"has no directory entry at byte {at} of its directory")
        flags, method = struct.unpack("<2H", fixed[8:12])
        packed, nbytes, name_length, extra_length, comment_length, disk = struct.unpack("<2I4H", fixed[20:36])
        header = struct.unpack("<I", fixed[42:46])[0]
        end = at + 46 + name_length + extra_length + comment_length
        if end > len(directory):
            self._fail("has a directory that ends in the middle of a name")
        raw_name = directory[at + 46 : at + 46 + name_length]
        name = self._decoded(raw_name)
        extra = directory[at + 46 + name_length : at + 46 + name_length + extra_length]
        nbytes, packed, header = self._wide(name, extra, [nbytes, packed, header])
        if name in self.members:
            self._fail(f"has two members called {name!r}")
        if flags & 1 or disk:
            self._fail(f"has a member {name!r} that is encrypted or in another file")
        stored = method == 0
        if stored and packed != nbytes:
            self._fail(f"says two different lengths of {name!r}: {packed} and {nbytes}")
        start = self._data_start(name, raw_name, header, packed, method)
        self.members[name] = Member(name, start, packed, stored)
        return end

    def _decoded(self, raw_name: bytes) -> str:
        try:
            return raw_name.decode("utf-8")
        except UnicodeDecodeError:
            self._fail("has a member whose name is not UTF-8")

    def _wide(self, name: str, extra: bytes, fields: list[int]) -> list[int]:
        """Size, packed size, header offset; those that are all ones stand in this order in extra field 1."""
        at = 0
        while at + 4 <= len(extra):
            kind, length = struct.unpack("<2H", extra[at : at + 4])
            if kind == 1:
                wide = extra[at + 4 : at + 4 + length]
                for index, value in enumerate(fields):
                    if value == _FULL32:
                        if len(wide) < 8:
                            self._fail(f"has a damaged 64-bit size for {name!r}")
                        fields[index], wide = struct.unpack("<Q", wide[:8])[0], wide[8:]
                return fields
            at += 4 + length
        return fields

    def _data_start(self, name: str, raw_name: bytes, header: int, nbytes: int, method: int) -> int:
        """Where the bytes of a member begin, from its own head, which must tell the same name."""
        if header + 30 + len(raw_name) > self._limit:
            self._fail(f"says {name!r} is at byte {header}, where no member can be")
        head = self._read(header, 30 + len(raw_name), f"the head of {name!r}")
        name_length, extra_length = struct.unpack("<2H", head[26:30])
        if head[:4] != LOCAL or name_length != len(raw_name) or head[30:] != raw_name:
            self._fail(f"has no member {name!r} at byte {header}, where its directory says it is")
        if head[6] & 1 or head[8:10] != struct.pack("<H", method):
            self._fail(f"says two different things of how {name!r} is stored")
        start: int = header + 30 + name_length + extra_length
        if start + nbytes > self._limit:
            self._fail(f"needs bytes {start} to {start + nbytes} for {name!r}, but members end at {self._limit}")
        return start
