"""What the rest of the program needs of a tokenizer: text to ids, one id to bytes."""

from __future__ import annotations

from typing import Protocol

from backend.tokenizer.segments import Segment


class Tokenizer(Protocol):
    vocab_size: int  # ids are below this
    bos_id: int | None
    eos_id: int | None
    unk_id: int | None
    end_ids: frozenset[int]  # tokens that end a reply
    adds_space_prefix: bool  # a decoded text begins with a space that is not part of the text
    chat_template: str | None  # the model's own Jinja text; None where it has none
    description: str  # one line for people, e.g. "SentencePiece BPE, 32,000 pieces"

    def encode(self, text: str) -> list[int]:
        """Plain text: control tokens spelt in it stay text. Adds nothing but the vocabulary's own space prefix."""
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
