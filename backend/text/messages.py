"""A chat message as values: who said it and what. Level 0: imports only the standard library."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Role = Literal["system", "user", "assistant"]
ROLES: tuple[str, ...] = ("system", "user", "assistant")


@dataclass(frozen=True)
class Message:
    """One turn. `content` is exactly what was typed or generated: no trimming, no markup added."""

    role: Role
    content: str
