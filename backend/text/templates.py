"""Chat templates: messages to prompt text, by the model's own Jinja template in a sandbox.

Templates come with model files, so from strangers: they run in a sandbox with nothing in reach but the messages, and
with limits on what they may take and produce (sandbox.py).

Templates are written for transformers' `apply_chat_template`, so they find what it gives them: `messages`,
`add_generation_prompt`, `tools` and `documents` (none), the special tokens' spellings, `raise_exception`,
`strftime_now`, loop controls, `{% generation %}`.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import jinja2

from backend.errors import CheckpointError, UserError
from backend.text.filters import MAX_FORM, LimitError
from backend.text.messages import Message
from backend.text.sandbox import MAX_ITEMS, Sandbox

MAX_TEMPLATE = 1 << 18  # characters; the longest known template has 25,000
MAX_GROWTH = 1 << 20  # characters a template may add to what the messages hold
# Where two texts meet that the model learned as two: they are tokenised apart, with nothing between them. Only the
# built-in formats write it. A code point that Unicode promises never to assign, and none of those that mark typed
# control tokens.
CUT = "\U0001fffe"

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

Turn = dict[str, str]


class TemplateError(UserError):
    """The template refuses these messages, or does not work."""

    code = "chat_template_failed"


def cut(text: str) -> list[str]:
    """The parts of a rendered text that are tokenised apart; joined they are the prompt. No part is empty."""
    return [part for part in text.split(CUT) if part]


class ChatTemplate:
    """A compiled template.

    Many templates know no system turn, or only one at the start; some say so with an error, some leave the text out.
    A system text must not get lost, so the messages are then given again with each such text put before the next
    user's, a blank line between them (first without touching a system turn at the start). With `fold_system` off the
    template's refusal stands.
    """

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str],
        *,
        fold_system: bool = True,
        now: Callable[[], datetime.datetime] = datetime.datetime.now,
    ) -> None:
        if len(source) > MAX_TEMPLATE:
            raise CheckpointError(f"the chat template has {len(source)} characters, at most {MAX_TEMPLATE} are allowed")
        self.source = source
        self._special = dict(special_tokens)  # bos_token, eos_token
        self._fold_system = fold_system
        names = {"raise_exception": _raise_exception, "strftime_now": lambda form: _strftime(now(), form)}
        self._sandbox = Sandbox(names)
        try:
            self._template = self._sandbox.from_string(source)
        except Exception as error:  # also Python's own: nesting that is too deep for its compiler
            raise CheckpointError(f"the chat template cannot be read: {error}") from None

    def render(
        self, messages: Sequence[Message], *, generation_prompt: bool, prepare: Callable[[str], str] = lambda text: text
    ) -> str:
        """The prompt text. `prepare` is applied to every content first (to keep typed control tokens text)."""
        plain = [{"role": message.role, "content": prepare(message.content.replace(CUT, ""))} for message in messages]
        limit = MAX_GROWTH + 4 * sum(len(message["content"]) for message in plain)
        # One clock for all attempts.
        self._sandbox.begin(limit, MAX_ITEMS + 16 * len(plain))
        system = [turn["content"].strip() for turn in plain if turn["role"] == "system"]
        written: str | None = None
        refusal: Exception | None = None
        for turns, names in self._attempts(plain):
            try:
                text = self._write(limit, messages=turns, add_generation_prompt=generation_prompt, **names)
            except (TemplateError, LimitError) as error:
                refusal = error
                break
            except Exception as error:  # sandboxed code may raise anything; all of it means: not with this template
                refusal = refusal or error
                continue
            if not self._fold_system or all(words in text for words in system):
                return text
            written = text if written is None else written
        if written is not None:
            return written
        if isinstance(refusal, TemplateError):
            raise refusal
        raise TemplateError(f"the model's chat template refused these messages: {refusal}") from None

    def _attempts(self, plain: list[Turn]) -> Iterator[tuple[list[Turn], dict[str, Any]]]:
        """Messages and names, from what transformers gives to what is given when a template cannot take that."""
        shapes = [plain]
        if self._fold_system:
            for folded in (plain[:1] + _folded(plain[1:]), _folded(plain)):
                if folded not in shapes:
                    shapes.append(folded)
        for turns in shapes:
            yield turns, {"tools": None, "documents": None, **self._special}
            # A template that was written for tools takes none for a list; undefined it can walk through.
            yield turns, self._special

    def _write(self, limit: int, **names: Any) -> str:
        pieces: list[str] = []
        length = 0
        for piece in self._template.generate(**names):
            pieces.append(piece)
            length += len(piece)
            if length > limit:
                raise TemplateError(f"the chat template wrote more than {limit} characters for these messages")
        return "".join(pieces)


def _folded(plain: list[Turn]) -> list[Turn]:
    """The messages with every system text put before the next user's; one without a next user becomes a user's."""
    turns: list[Turn] = []
    waiting: list[str] = []
    for turn in plain:
        if turn["role"] == "system":
            waiting.append(turn["content"])
        elif turn["role"] == "user":
            turns.append({"role": "user", "content": "\n\n".join([*waiting, turn["content"]])})
            waiting = []
        else:
            turns.append(turn)
    return [*turns, {"role": "user", "content": "\n\n".join(waiting)}] if waiting else turns


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime(moment: datetime.datetime, form: str) -> str:
    if len(form) > MAX_FORM:
        raise LimitError(f"strftime_now: a format of {len(form)} characters, at most {MAX_FORM} are allowed")
    return moment.strftime(form)
