"""SentencePiece's `tokenizer.model`: a protobuf message, read strictly and written clean.

The library that does the encoding is native code, and has had memory errors on hostile files. So it never sees a file's
bytes: what they say is read here into plain values, and a message made from those values is what the library gets.
Facts: sentencepiece_model.proto (field numbers, defaults) and developers.google.com/protocol-buffers (wire format).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from backend.errors import CheckpointError
from backend.tokenizer.vocabulary import BYTE, CONTROL, MAX_TOKENS, NORMAL, UNKNOWN, UNUSED, USER_DEFINED

UNIGRAM, BPE = 1, 2
SPACE = "\u2581"
_MAX_PIECE = 4096  # bytes; the longest in use are runs of spaces
_KINDS = (NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE)


@dataclass(frozen=True)
class Piece:
    """A token. `text` spells spaces as U+2581."""

    text: bytes
    score: float = 0.0
    kind: int = NORMAL


@dataclass(frozen=True)
class SentenceModel:
    """What of a ModelProto matters for encoding. An id of -1 means that there is no such token."""

    pieces: Sequence[Piece]
    algorithm: int = BPE
    unk_id: int = 0
    bos_id: int = 1
    eos_id: int = 2
    pad_id: int = -1
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = False

    def texts(self) -> list[str]:
        """The pieces as texts. Raises ValueError for one that is no UTF-8."""
        return [piece.text.decode("utf-8") for piece in self.pieces]


def parse_model(path: Path, data: bytes) -> SentenceModel:
    """Read a ModelProto. Raises CheckpointError for a damaged one, and for one that changes texts (a normaliser)."""
    try:
        return _model(path, data)
    except _Damaged as error:
        raise CheckpointError(f"{path}: not a whole SentencePiece model: {error}; download it again") from None


def looks_like_model(data: bytes) -> bool:
    """Whether the file begins with a piece, as every ModelProto does."""
    return data[:1] == b"\x0a"


class _Damaged(Exception):
    pass


def _model(path: Path, data: bytes) -> SentenceModel:
    pieces: list[Piece] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    for field, value in _fields(data):
        if field == 1:
            if len(pieces) >= MAX_TOKENS:
                raise CheckpointError(f"{path}: more than {MAX_TOKENS} pieces; no vocabulary has so many")
            pieces.append(_piece(len(pieces), _message(value, "a piece")))
        elif field == 2:
            trainer.update(_fields(_message(value, "the trainer settings")))
        elif field == 3:
            normalizer.update(_fields(_message(value, "the normaliser settings")))
    if not pieces:
        raise _Damaged("it has no pieces")
    algorithm = _number(trainer, 3, UNIGRAM)
    if algorithm not in (UNIGRAM, BPE):
        raise CheckpointError(f"{path}: SentencePiece model type {algorithm}; BPE (2) and unigram (1) can be opened")
    if normalizer.get(2):
        name = normalizer.get(1)
        said = name.decode("utf-8", "replace") if isinstance(name, bytes) else "unnamed"
        raise CheckpointError(
            f"{path}: its normaliser {said!r:.60} replaces characters; only the identity, as LLaMA's, can be opened"
        )
    if not _number(normalizer, 5, 1) or _number(trainer, 24, 0):
        raise CheckpointError(f"{path}: spaces are not marked at the beginning of words, as LLaMA's vocabulary does")
    bos, eos = (_number(trainer, field, default) for field, default in ((41, 1), (42, 2)))
    return SentenceModel(
        pieces,
        algorithm,
        unk_id=_number(trainer, 40, 0),
        bos_id=bos if is_control(pieces, bos) else -1,
        eos_id=eos if is_control(pieces, eos) else -1,
        pad_id=_number(trainer, 43, -1),
        add_dummy_prefix=bool(_number(normalizer, 3, 1)),
        remove_extra_whitespaces=bool(_number(normalizer, 4, 1)),
    )


def is_control(pieces: Sequence[Piece], token: int) -> bool:
    return 0 <= token < len(pieces) and pieces[token].kind == CONTROL


def _piece(index: int, data: bytes) -> Piece:
    text, score, kind = b"", 0.0, NORMAL
    for field, value in _fields(data):
        if field == 1:
            text = _message(value, f"piece {index}")
        elif field == 2:
            if not isinstance(value, bytes) or len(value) != 4:
                raise _Damaged(f"the score of piece {index} is no float")
            score = struct.unpack("<f", value)[0]
        elif field == 3:
            kind = value if isinstance(value, int) else -1
    if kind not in _KINDS:
        raise _Damaged(f"piece {index} has the unknown type {kind}")
    if not math.isfinite(score):
        raise _Damaged(f"the score of piece {index} is {score}")
    if len(text) > _MAX_PIECE:
        raise _Damaged(f"piece {index} has {len(text)} bytes, at most {_MAX_PIECE} can be right")
    return Piece(text, score, kind)


# wire format, in --------------------------------------------------------------------------------------------------


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Field number and value of each field: an int for varints, else bytes (4 and 8 for fixed numbers)."""
    at, size = 0, len(data)
    while at < size:
        key, at = _varint(data, at)
        field, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield field, value
            continue
        if wire == 2:
            length, at = _varint(data, at)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise _Damaged(f"byte {at} has the unknown wire type {wire}")
        if length > size - at:
            raise _Damaged(f"a field of {length} bytes at {at}, but only {size - at} are left")
        yield field, data[at : at + length]
        at += length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise _Damaged("it ends in the middle of a number")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise _Damaged(f"a number at byte {at} is too long")


def _message(value: int | bytes, what: str) -> bytes:
    if not isinstance(value, bytes):
        raise _Damaged(f"{what} is a number")
    return value


def _number(fields: dict[int, int | bytes], field: int, default: int) -> int:
    """An int32: negative ones are stored as 64-bit two's complement."""
    value = fields.get(field, default)
    if not isinstance(value, int):
        raise _Damaged(f"setting {field} is no number")
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


# wire format, out -------------------------------------------------------------------------------------------------


def serialized(model: SentenceModel) -> bytes:
    """A ModelProto with these values, LLaMA's settings (identity normaliser, split digits) and nothing else."""
    byte_fallback = any(piece.kind == BYTE for piece in model.pieces)
    parts = [
        _bytes_field(
            1, _bytes_field(1, piece.text) + b"\x15" + struct.pack("<f", piece.score) + _int_field(3, piece.kind)
        )
        for piece in model.pieces
    ]
    trainer = {3: model.algorithm, 4: len(model.pieces), 25: 1, 35: int(byte_fallback)}
    trainer |= {40: model.unk_id, 41: model.bos_id, 42: model.eos_id, 43: model.pad_id}
    # By these spellings the library finds the special ids.
    names = {45: model.unk_id, 46: model.bos_id, 47: model.eos_id}
    spelt = {field: model.pieces[token].text for field, token in names.items() if 0 <= token < len(model.pieces)}
    normalizer = {3: int(model.add_dummy_prefix), 4: int(model.remove_extra_whitespaces), 5: 1}
    settings = [_int_field(field, value) for field, value in trainer.items()]
    settings += [_bytes_field(field, text) for field, text in spelt.items()]
    parts.append(_bytes_field(2, b"".join(settings)))
    name = _bytes_field(1, b"identity")
    parts.append(_bytes_field(3, name + b"".join(_int_field(field, value) for field, value in normalizer.items())))
    return b"".join(parts)


def _bytes_field(field: int, value: bytes) -> bytes:
    return _varint_bytes(field << 3 | 2) + _varint_bytes(len(value)) + value


def _int_field(field: int, value: int) -> bytes:
    return _varint_bytes(field << 3) + _varint_bytes(value & (1 << 64) - 1)


def _varint_bytes(value: int) -> bytes:
    if value < 0x80:
        return bytes((value,))
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
