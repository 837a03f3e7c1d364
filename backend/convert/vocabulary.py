"""A vocabulary as GGUF files describe it, wherever it came from."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from backend.errors import CheckpointError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
# The second end token of chat models, by spelling.
_END_OF_TURN = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>")
_END_OF_MESSAGE = "<|eom_id|>"


@dataclass
class Vocabulary:
    """`model` "llama": SentencePiece with `scores`; "gpt2": byte-level BPE with `merges` and pre-tokenizer `pre`."""

    model: Literal["llama", "gpt2"]
    tokens: list[str]
    kinds: list[int]
    scores: list[float] = field(default_factory=list)
    merges: list[str] = field(default_factory=list)
    pre: str = "default"
    bos: int | None = None
    eos: int | None = None
    unk: int | None = None
    pad: int | None = None
    add_bos: bool | None = None
    add_eos: bool | None = None
    add_space_prefix: bool | None = None
    templates: dict[str, str] = field(default_factory=dict)  # name -> chat template; "" is the usual one

    def id_of(self, token: str | None) -> int | None:
        return self.tokens.index(token) if token in self.tokens else None

    def add(self, token_id: int, token: str, special: bool, limit: int, path: Path) -> None:
        """An added token: behind the table it is appended, inside it only its kind may change.

        Beyond the `limit` rows of the embedding it is left out: many fine-tunes name a padding token without a row.
        """
        if token_id >= limit:
            return
        if token_id < 0:
            raise CheckpointError(f"{path}: added token {token!r} has the id {token_id}")
        self.fill(token_id + 1)
        if self.tokens[token_id] != token:
            self.tokens[token_id], self.kinds[token_id] = token, NORMAL
        if self.kinds[token_id] in (NORMAL, UNUSED):
            self.kinds[token_id] = CONTROL if special else USER_DEFINED

    def fill(self, size: int) -> None:
        """Unused tokens up to `size`."""
        for number in range(len(self.tokens), size):
            self.tokens.append(f"[PAD{number}]")
            self.kinds.append(UNUSED)
            if self.model == "llama":
                self.scores.append(-1000.0)

    def keys(self) -> dict[str, Any]:
        """The tokenizer keys of a GGUF file."""
        keys: dict[str, Any] = {"tokenizer.ggml.model": self.model, "tokenizer.ggml.pre": self.pre}
        keys["tokenizer.ggml.tokens"] = self.tokens
        if self.model == "llama":
            keys["tokenizer.ggml.scores"] = [float(score) for score in self.scores]
        keys["tokenizer.ggml.token_type"] = self.kinds
        if self.model == "gpt2":
            keys["tokenizer.ggml.merges"] = self.merges
        eot = next((found for end in _END_OF_TURN if (found := self._control(end)) is not None), None)
        ids = {"bos": self.bos, "eos": self.eos, "unknown": self.unk, "padding": self.pad, "eot": eot,
               "eom": self._control(_END_OF_MESSAGE)}  # fmt: skip
        for name, token_id in ids.items():
            if token_id is not None and 0 <= token_id < len(self.tokens):
                keys[f"tokenizer.ggml.{name}_token_id"] = token_id
        for name, flag in (
            ("add_bos_token", self.add_bos),
            ("add_eos_token", self.add_eos),
            ("add_space_prefix", self.add_space_prefix),
        ):
            if flag is not None:
                keys[f"tokenizer.ggml.{name}"] = flag
        for name, template in self.templates.items():
            keys["tokenizer.chat_template" + (f".{name}" if name else "")] = template
        return keys

    def _control(self, token: str) -> int | None:
        found = self.id_of(token)
        return found if found is not None and self.kinds[found] in (CONTROL, USER_DEFINED) else None
