"""Amounts of memory as people write them: "10GiB", "8 GB", "512MiB", a plain number of bytes. Level 0."""

from __future__ import annotations

import re

_UNITS = {
    "b": 1, "": 1,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40,
}  # fmt: skip
_AMOUNT = re.compile(r"\s*([0-9]{1,20}(?:\.[0-9]{1,9})?)\s*([A-Za-z]{0,3})\s*")
LEAST, MOST = 1 << 20, 1 << 50  # of a budget: less is a number whose unit was left out


def parse_bytes(amount: str | int) -> int:
    """Bytes of "10GiB" (2^30) or "8 GB" (10^9) or a whole number. ValueError says what was expected."""
    found = None if isinstance(amount, bool) else _AMOUNT.fullmatch(str(amount))
    if found is None or found[2].lower() not in _UNITS:
        raise ValueError("expected a size such as 10GiB, 8GB or 512MiB")
    size = (
        int(float(found[1]) * _UNITS[found[2].lower()]) if "." in found[1] else int(found[1]) * _UNITS[found[2].lower()]
    )
    if not LEAST <= size <= MOST:
        raise ValueError("expected a size from 1MiB to 1024TiB, such as 10GiB, 8GB or 512MiB")
    return size


def show_bytes(size: int) -> str:
    """The same for people: "9.6 GB", "112 MB"."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
