"""Replies that must follow a grammar: JSON schema, regular expression or GBNF, by way of llguidance.

llguidance counts its work and gives up at fixed limits, so a hostile grammar ends its own request: mostly within 20 ms
a token and 100 ms for a grammar on one core. An ambiguous grammar may take several times as long a token, and hold
everybody up for as long. It reads nothing but the text of the grammar.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from llguidance.gbnf_to_lark import gbnf_to_lark
from numpy.typing import NDArray

from backend.errors import ParameterError, SamplingError
from backend.params import GenerationParams

_KINDS = ("json_schema", "regex", "grammar")
# Without a bound a model may go on with line ends for ever, which JSON allows between any two things.
_JSON_OPTIONS = {"whitespace_flexible": True, "whitespace_pattern": r"[\x20\x0A]{0,20}"}


def _limits() -> LLParserLimits:
    return LLParserLimits(
        initial_lexer_fuel=5_000_000,
        step_lexer_fuel=200_000,
        step_max_items=50_000,
        max_lexer_states=50_000,
        verbose_errors=False,
    )


# The library follows references on the thread's own stack: chains of a thousand end the process.
MOST_REFERENCES, MOST_RULES = 200, 500


class Vocabulary(Protocol):
    """What is needed of a tokenizer."""

    vocab_size: int
    bos_id: int | None

    def encode(self, text: str) -> list[int]: ...

    def control_tokens(self) -> dict[str, int]: ...

    def token_bytes(self, token_id: int) -> bytes: ...


class Grammars:
    """Makes matchers for one vocabulary. Its table of tokens takes a fraction of a second, once, when first needed."""

    def __init__(self, vocabulary: Vocabulary, end_ids: frozenset[int]) -> None:
        self._vocabulary, self._ends = vocabulary, end_ids
        self._lock = threading.Lock()
        self._tokens: LLTokenizer | None = None

    def matcher(self, params: GenerationParams) -> GrammarMatcher | None:
        """The state of a new reply, or None when no grammar is asked for. ParameterError when it cannot be one."""
        asked = [name for name in _KINDS if getattr(params, name)]
        if not asked:
            return None
        if len(asked) > 1:
            raise ParameterError(f"{asked[0]} and {asked[1]}: a reply can follow one of them only", param=asked[1])
        name = asked[0]
        try:
            source = _SOURCES[name](getattr(params, name))
        except (Exception, RecursionError) as error:  # the library's reader of GBNF raises whatever it likes
            raise ParameterError(f"{name}: {error}", param=name) from None
        matcher = LLMatcher(self._table(), source, log_level=0, limits=_limits())
        if matcher.is_error():
            raise ParameterError(f"{name}: {matcher.get_error()}", param=name)
        return GrammarMatcher(matcher, self._ends)

    def _table(self) -> LLTokenizer:
        with self._lock:
            if self._tokens is None:
                # No end token at all: any id will do, since the reply is ended when the grammar is complete.
                ends = sorted(self._ends) or [0]
                wrapped = TokenizerWrapper(_Spelt(self._vocabulary, ends[0]))
                self._tokens = LLTokenizer(wrapped, n_vocab=self._vocabulary.vocab_size, eos_token=ends)
            return self._tokens


class GrammarMatcher:
    """Where one reply stands in its grammar."""

    def __init__(self, matcher: LLMatcher, end_ids: frozenset[int]) -> None:
        self._matcher, self._ends = matcher, end_ids

    def allowed(self, size: int) -> NDArray[np.bool_]:
        """Which tokens may come next, bool (size,). SamplingError when the limits are reached."""
        allowed = np.zeros(size, dtype=bool)
        if self._matcher.is_stopped() and not self._matcher.is_error():
            allowed[[token for token in self._ends if token < size]] = True
            return allowed
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        known = np.unpackbits(bits, bitorder="little")[:size].astype(bool)
        allowed[: len(known)] = known
        return allowed

    def accept(self, token: int) -> None:
        """The token was taken."""
        if not (self._matcher.is_stopped() and token in self._ends):
            self._matcher.consume_token(token)
            self._check()

    def rewind(self, tokens: int) -> None:
        """The last tokens were taken back."""
        self._matcher.rollback(tokens)
        self._check()

    @property
    def complete(self) -> bool:
        """Nothing but an end can follow."""
        return bool(self._matcher.is_stopped())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise SamplingError(f"the reply's grammar cannot go on: {self._matcher.get_error()}")


class _Spelt:
    """A vocabulary as llguidance wants it: the bytes of each token, control tokens marked by a byte 0xFF in front."""

    def __init__(self, vocabulary: Vocabulary, end_id: int) -> None:
        self._vocabulary = vocabulary
        self.eos_token_id, self.bos_token_id = end_id, vocabulary.bos_id
        control = {token: spelling for spelling, token in vocabulary.control_tokens().items()}
        self.special_token_ids = sorted(control)
        self.tokens = [
            b"\xff" + control[token].encode() if token in control else vocabulary.token_bytes(token)
            for token in range(vocabulary.vocab_size)
        ]

    def __call__(self, text: str | bytes) -> list[int]:
        return self._vocabulary.encode(text if isinstance(text, str) else text.decode("utf-8", "replace"))


def _json_schema(text: str) -> str:
    references = 0

    def counted(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        """Before equal names fall together, and however their letters are written."""
        nonlocal references
        references += sum(name in ("$ref", "$dynamicRef", "$recursiveRef") for name, _ in pairs)
        return dict(pairs)

    try:
        schema: Any = json.loads(text, object_pairs_hook=counted)
    except ValueError as error:
        raise ValueError(f"this is not JSON: {error}") from None
    if not isinstance(schema, dict):
        raise ValueError("a schema is a JSON object")
    if references > MOST_REFERENCES:
        raise ValueError(f"{references} references; a schema may have {MOST_REFERENCES}")
    return LLMatcher.grammar_from_json_schema(text, overrides=_JSON_OPTIONS)  # type: ignore[arg-type]


def _gbnf(text: str) -> str:
    rules = text.count("::=")
    if rules > MOST_RULES:
        raise ValueError(f"{rules} rules; a grammar may have {MOST_RULES}")
    return LLMatcher.grammar_from_lark(gbnf_to_lark(text))


_SOURCES: dict[str, Callable[[str], str]] = {
    "json_schema": _json_schema,
    "regex": LLMatcher.grammar_from_regex,
    "grammar": _gbnf,
}
