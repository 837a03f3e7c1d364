"""Who asks, as far as the engine needs to know: one string for each person. Nothing that a log must not show.

Fairness is between these strings, and the cache is separate for those who have to prove who they are.
"""

from __future__ import annotations

import hashlib

PROVEN = ("key:", "login:")


def by_key(key: bytes) -> str:
    """Whoever sends this API key. The key itself cannot be had from it."""
    return f"key:{hashlib.sha256(key).hexdigest()[:32]}"


def by_address(address: str) -> str:
    """Any program at this network address, where no key is asked for."""
    return f"address:{address}"


def by_page(login: str, session: str) -> str:
    """A login of the page; without logins every open page is somebody."""
    return f"login:{login}" if login else f"page:{session}"


def salt_of(person: str) -> bytes:
    """What keeps the cached blocks of this person apart: those of keys and logins, which others could otherwise find
    out by how fast an answer comes. Empty, so shared, where nobody has to prove anything."""
    return person.encode() if person.startswith(PROVEN) else b""
