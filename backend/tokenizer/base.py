"""What the rest of the program needs of a tokenizer: text to ids, one id to bytes."""

from __future__ import annotations

from typing import Protocol

from backend.tokenizer.segments import Segment


class Tokenizer(Protocol):
    vocab_size: int
    end_ids: frozenset[int]  # tokens that end a reply

    def encode(self, text: str) -> list[int]:
        """Plain text: control tokens spelt in it stay text. Adds nothing."""
        ...

    def encode_segments(self, segments: list[Segment]) -> list[int]:
        """A prompt of control tokens and plain pieces, as a rendered chat template gives it."""
        ...

    def with_start(self, ids: list[int]) -> list[int]:
        """Put the begin-of-text token in front if this vocabulary wants one and it is not there."""
        ...

    def control_tokens(self) -> dict[str, int]:
        """Spelling of every control token -> id."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds to the text; nothing for control tokens."""
        ...

    def token_text(self, token_id: int) -> str:
        """A token's spelling, for people who look at tokens."""
        ...
