"""Calls into the `tokenizers` library, whose panics are no `Exception` and would otherwise stop the program."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from tokenizers import Tokenizer

from backend.errors import CheckpointError
from backend.tokenizer.vocabulary import EncodePlain


def set_up(path: Path, what: str, build: Callable[[], Tokenizer]) -> Tokenizer:
    """`build()`; whatever goes wrong in it is the file's fault and said as `what`."""
    try:
        return build()
    except BaseException as error:
        raise _sentence(path, what, error) from None


def check_merges(path: Path, vocab: Mapping[str, int], pairs: Iterable[tuple[str, str]]) -> None:
    """Every merge must join two tokens into a third: the library panics, and writes that out, for some that do not."""
    for left, right in pairs:
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise CheckpointError(
                f"{path}: the vocabulary does not fit its merges: one joins {left!r:.60} and {right!r:.60}, but one of "
                "these or what they make is no token"
            )


def plain_encoder(path: Path, engine: Tokenizer, later: Tokenizer | None = None) -> EncodePlain:
    """Encode with `engine`; pieces that do not begin the prompt with `later`, where they differ."""

    def encode(text: str, begins: bool) -> list[int]:
        chosen = engine if begins or later is None else later
        try:
            return list(chosen.encode(text, add_special_tokens=False).ids)
        except BaseException as error:  # e.g. the regular expression library's limit on backtracking
            raise _sentence(path, "the tokenizer cannot encode this text", error) from None

    return encode


def _sentence(path: Path, what: str, error: BaseException) -> BaseException:
    if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError | CheckpointError):
        return error
    said = " ".join(str(error).split())[:200]
    return CheckpointError(f"{path}: {what} ({said})")
