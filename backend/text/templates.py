"""Chat templates: messages to prompt text, by the model's own Jinja template in a sandbox.

Templates come with model files, so from strangers: they run in a sandbox with nothing in reach but the messages, and
with limits on what they may take and produce (sandbox.py).
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import jinja2

from backend.errors import CheckpointError, UserError
from backend.text.messages import Message
from backend.text.sandbox import MAX_ITEMS, Sandbox

MAX_TEMPLATE = 1 << 18  # characters; the longest known template has 25,000
MAX_GROWTH = 1 << 20  # characters a template may add to what the messages hold

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class TemplateError(UserError):
    """The template refuses these messages, or does not work."""

    code = "chat_template_failed"


class ChatTemplate:
    """A compiled template."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        if len(source) > MAX_TEMPLATE:
            raise CheckpointError(f"the chat template has {len(source)} characters, at most {MAX_TEMPLATE} are allowed")
        self.source = source
        self._special = dict(special_tokens)  # bos_token, eos_token
        names = {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        self._sandbox = Sandbox({"tojson": _to_json}, names)
        try:
            self._template = self._sandbox.from_string(source)
        except Exception as error:  # also Python's own: nesting that is too deep for its compiler
            raise CheckpointError(f"the chat template cannot be read: {error}") from None

    def render(
        self, messages: Sequence[Message], *, generation_prompt: bool, prepare: Callable[[str], str] = lambda text: text
    ) -> str:
        """The prompt text. `prepare` is applied to every content first (to keep typed control tokens text)."""
        plain = [{"role": message.role, "content": prepare(message.content)} for message in messages]
        limit = MAX_GROWTH + 4 * sum(len(message["content"]) for message in plain)
        self._sandbox.begin(limit, MAX_ITEMS + 16 * len(plain))
        pieces: list[str] = []
        length = 0
        try:
            for piece in self._template.generate(
                messages=plain, add_generation_prompt=generation_prompt, **self._special
            ):
                pieces.append(piece)
                length += len(piece)
                if length > limit:
                    raise TemplateError(f"the chat template wrote more than {limit} characters for these messages")
        except TemplateError:
            raise
        except Exception as error:  # sandboxed code may raise anything; all of it means: not with this template
            raise TemplateError(f"the model's chat template refused these messages: {error}") from None
        return "".join(pieces)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _to_json(value: Any, indent: int | None = None) -> str:
    if indent is not None and not 0 <= indent <= 16:
        raise jinja2.TemplateError(f"tojson(indent={indent}): expected 0 to 16")
    # Templates print for a model, not for a browser: Jinja's own filter would escape < and > here.
    return json.dumps(value, ensure_ascii=False, indent=indent)
