"""SentencePiece's tokenizer.model: the few fields that matter, read from and written to its protocol buffer.

Fields: https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto. A small reader of our own,
because the file comes from strangers; every length is checked against the bytes that are left.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from backend.errors import CheckpointError

MAX_PIECES = 1 << 22
# ModelProto: pieces 1, trainer_spec 2, normalizer_spec 3. SentencePiece: piece 1, score 2, type 3.
_UNIGRAM, _BPE = 1, 2


@dataclass
class SentencePieces:
    """What a tokenizer.model says. `kinds`: 1 normal, 2 unknown, 3 control, 4 user defined, 5 unused, 6 byte."""

    tokens: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    kinds: list[int] = field(default_factory=list)
    model_type: int = _UNIGRAM
    unk: int = 0
    bos: int = 1
    eos: int = 2
    pad: int = -1
    add_space_prefix: bool = True


def parse_spm(path: Path, data: bytes) -> SentencePieces:
    """Read the file's bytes. Raises CheckpointError for anything but a BPE model."""
    found = SentencePieces()
    try:
        for number, value in _fields(data):
            if number == 1 and isinstance(value, bytes):
                if len(found.tokens) >= MAX_PIECES:
                    raise CheckpointError(f"{path}: more than {MAX_PIECES} pieces")
                _piece(found, value)
            elif number == 2 and isinstance(value, bytes):
                _trainer(found, value)
            elif number == 3 and isinstance(value, bytes):
                for inner, item in _fields(value):
                    if inner == 3 and isinstance(item, int):
                        found.add_space_prefix = bool(item)
    except (ValueError, struct.error, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: is not a SentencePiece model ({error})") from None
    if not found.tokens:
        raise CheckpointError(f"{path}: is not a SentencePiece model (it has no pieces)")
    if found.model_type != _BPE:
        raise CheckpointError(f"{path}: SentencePiece model type {found.model_type}, expected {_BPE} (BPE)")
    return found


def write_spm(pieces: SentencePieces) -> bytes:
    """The file's bytes, with the settings of LLaMA's own: identity normaliser, byte fallback, split digits."""
    out = [_message(1, _bytes(1, token.encode()) + _float(2, score) + _number(3, kind))
           for token, score, kind in zip(pieces.tokens, pieces.scores, pieces.kinds, strict=True)]  # fmt: skip
    byte_fallback = 6 in pieces.kinds
    trainer = _number(3, _BPE) + _number(4, len(pieces.tokens)) + _number(25, 1) + _number(35, int(byte_fallback))
    for number, token_id in ((40, pieces.unk), (41, pieces.bos), (42, pieces.eos), (43, pieces.pad)):
        trainer += _number(number, token_id)
    for number, token_id in ((45, pieces.unk), (46, pieces.bos), (47, pieces.eos)):
        if 0 <= token_id < len(pieces.tokens):
            trainer += _bytes(number, pieces.tokens[token_id].encode())
    prefix, rest = int(pieces.add_space_prefix), _number(4, 0) + _number(5, 1)
    normalizer = _bytes(1, b"identity") + _bytes(2, b"") + _number(3, prefix) + rest
    return b"".join(out) + _message(2, trainer) + _message(3, normalizer)


def _piece(found: SentencePieces, data: bytes) -> None:
    token, score, kind = "", 0.0, 1
    for number, value in _fields(data):
        if number == 1 and isinstance(value, bytes):
            token = value.decode("utf-8")
        elif number == 2 and isinstance(value, float):
            score = value
        elif number == 3 and isinstance(value, int):
            kind = value
    if not 1 <= kind <= 6:
        raise ValueError(f"piece {len(found.tokens)} is of type {kind}")
    if not math.isfinite(score):
        raise ValueError(f"piece {len(found.tokens)} has a score that is not a number")
    found.tokens.append(token)
    found.scores.append(score)
    found.kinds.append(kind)


def _trainer(found: SentencePieces, data: bytes) -> None:
    for number, value in _fields(data):
        if not isinstance(value, int):
            continue
        if number == 3:
            found.model_type = value
        elif number == 40:
            found.unk = value
        elif number == 41:
            found.bos = value
        elif number == 42:
            found.eos = value
        elif number == 43:
            found.pad = value


# the wire format: key = field number << 3 | type; types: 0 varint, 1 eight bytes, 2 length and bytes, 5 four bytes


def _fields(data: bytes) -> Iterator[tuple[int, int | float | bytes]]:
    """(field number, value) of a message: whole numbers as signed 64-bit, four bytes as float."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, kind = key >> 3, key & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield number, value - (1 << 64) if value >> 63 else value
        elif kind == 2:
            length, at = _varint(data, at)
            if length > len(data) - at:
                raise ValueError(f"a field of {length} bytes where {len(data) - at} are left")
            yield number, data[at : at + length]
            at += length
        elif kind == 5:
            yield number, float(struct.unpack_from("<f", data, at)[0])
            at += 4
        elif kind == 1:
            if len(data) - at < 8:
                raise ValueError("it ends in the middle of a field")
            at += 8
        else:
            raise ValueError(f"wire type {kind}")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise ValueError("it ends in the middle of a number")
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value & ((1 << 64) - 1), at
    raise ValueError("a number of more than 64 bits")


def _encoded(value: int) -> bytes:
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _number(number: int, value: int) -> bytes:
    return _encoded(number << 3) + _encoded(value)


def _float(number: int, value: float) -> bytes:
    return _encoded(number << 3 | 5) + struct.pack("<f", value)


def _bytes(number: int, value: bytes) -> bytes:
    return _encoded(number << 3 | 2) + _encoded(len(value)) + value


def _message(number: int, value: bytes) -> bytes:
    return _bytes(number, value)
