"""The tokenizer that all formats end in: a table of tokens, and a function that encodes plain text.

What differs between formats is how the table is read and which library does the merging; that is in one file each.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from backend.tokenizer.segments import Segment

# (text, whether it is the beginning of the prompt) -> ids. Gives no control token but the one for unknown characters.
EncodePlain = Callable[[str, bool], list[int]]

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # token types of SentencePiece and of GGUF
MAX_TOKENS = 1 << 20  # the largest vocabularies have a quarter of this

# Tokens that end a turn, in files that name only one end token (or none).
END_SPELLINGS = (
    "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>", "<EOT>",
    "<｜end▁of▁sentence｜>",
)  # fmt: skip
_LOOKS_LIKE_CONTROL = re.compile(r"<[|｜][^<>]+[|｜]>")


@dataclass(frozen=True)
class Vocabulary:
    """Everything about the tokens. `texts` and `spelt` are by id."""

    texts: Sequence[str]  # how the vocabulary spells the token
    spelt: Sequence[bytes]  # what the token adds to the text
    control: Mapping[str, int]
    bos_id: int | None
    eos_id: int | None
    unk_id: int | None
    end_ids: frozenset[int]
    add_bos: bool
    adds_space_prefix: bool
    chat_template: str | None
    description: str


class VocabularyTokenizer:
    """A `Tokenizer` over a vocabulary and an encoder of plain text."""

    def __init__(self, vocabulary: Vocabulary, encode: EncodePlain) -> None:
        self._vocabulary, self._encode = vocabulary, encode
        self.vocab_size = len(vocabulary.texts)
        self.bos_id, self.eos_id, self.unk_id = vocabulary.bos_id, vocabulary.eos_id, vocabulary.unk_id
        self.end_ids = vocabulary.end_ids
        self.adds_space_prefix = vocabulary.adds_space_prefix
        self.chat_template = vocabulary.chat_template
        self.description = vocabulary.description

    def encode(self, text: str) -> list[int]:
        return self._encode(text, True) if text else []

    def encode_segments(self, segments: list[Segment]) -> list[int]:
        ids: list[int] = []
        # Plain neighbours are one text: only what follows a control token, or nothing, begins anew.
        for control, group in groupby(segments, key=lambda segment: segment.control):
            if control:
                ids += [self._vocabulary.control[segment.text] for segment in group]
            elif text := "".join(segment.text for segment in group):
                ids += self._encode(text, not ids)
        return ids

    def with_start(self, ids: list[int]) -> list[int]:
        if not self._vocabulary.add_bos or self.bos_id is None or ids[:1] == [self.bos_id]:
            return ids
        return [self.bos_id, *ids]

    def control_tokens(self) -> dict[str, int]:
        return dict(self._vocabulary.control)

    def token_bytes(self, token_id: int) -> bytes:
        return self._vocabulary.spelt[token_id]

    def token_text(self, token_id: int) -> str:
        return self._vocabulary.texts[token_id]


def settled_kinds(texts: Sequence[str], kinds: Sequence[int], named: Iterable[int | None]) -> list[int]:
    """Token types as they must count: nobody may be able to type a token that ends or opens a turn.

    Converters mark such tokens as normal or user-defined where the tokenizer's author forgot the flag "special".
    `named`: ids that the file itself calls begin, end ...
    """
    settled = list(kinds)
    ends, wanted = set(END_SPELLINGS), set(named)
    for token, text in enumerate(texts):
        if settled[token] not in (NORMAL, USER_DEFINED):
            continue
        added = settled[token] == USER_DEFINED and _LOOKS_LIKE_CONTROL.fullmatch(text)
        # An ordinary word stays one, also where a file wrongly calls it the end.
        if added or text in ends or (token in wanted and text[:1] in ("<", "[") and len(text) > 2):
            settled[token] = CONTROL
    return settled


def control_table(texts: Sequence[str], kinds: Sequence[int]) -> dict[str, int]:
    """Spelling -> id of the control tokens; of doubles, the first counts."""
    table: dict[str, int] = {}
    for token, kind in enumerate(kinds):
        if kind in (CONTROL, UNKNOWN) and texts[token]:
            table.setdefault(texts[token], token)
    return table


def end_ids(control: Mapping[str, int], named: Iterable[int | None]) -> frozenset[int]:
    """What the file names, and the control tokens that are known to end a turn by their spelling."""
    spelt = [control.get(text) for text in END_SPELLINGS]
    return frozenset(token for token in [*named, *spelt] if token is not None)
