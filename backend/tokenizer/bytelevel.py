"""GPT-2's byte alphabet: how byte-level vocabularies spell bytes as printable characters."""

from __future__ import annotations


def spelt_bytes(text: str) -> bytes:
    """The bytes of a byte-level token."""
    try:
        return text.translate(_BYTE_OF).encode("latin-1")
    except UnicodeEncodeError:  # not in the byte alphabet: a few files store such tokens as plain text
        return text.encode("utf-8", "replace")


def byte_spellings() -> list[str]:
    """The character that stands for each of the 256 bytes."""
    spelt = {byte: chr(code) for code, byte in _BYTE_OF.items() if byte < 256}
    return [spelt[byte] for byte in range(256)]


def _byte_alphabet() -> dict[int, int]:
    """GPT-2's printable stand-in for each byte -> the byte: itself where printable, else from code point 256 on.

    Characters below 256 that stand for nothing go to a code point that is no byte.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return (
        dict.fromkeys(others, 0xFFFF) | {byte: byte for byte in printable} | {256 + n: b for n, b in enumerate(others)}
    )


_BYTE_OF = _byte_alphabet()
