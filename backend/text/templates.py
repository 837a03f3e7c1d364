"""Chat templates: messages to prompt text, by the model's own Jinja template in a sandbox.

Templates come with model files, so from strangers: they run in Jinja's immutable sandbox with nothing in reach but the
messages, and with a limit on what they may produce.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.sandbox

from backend.errors import CheckpointError, UserError
from backend.text.messages import Message

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
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
        )
        environment.globals.clear()
        environment.globals.update(
            raise_exception=_raise_exception,
            strftime_now=lambda form: datetime.datetime.now().strftime(form),
            range=environment.globals.get("range", jinja2.sandbox.safe_range),
            namespace=jinja2.utils.Namespace,
        )
        environment.filters["tojson"] = _to_json
        try:
            self._template = environment.from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise CheckpointError(f"the chat template cannot be read: {error}") from None

    def render(
        self, messages: Sequence[Message], *, generation_prompt: bool, prepare: Callable[[str], str] = lambda text: text
    ) -> str:
        """The prompt text. `prepare` is applied to every content first (to keep typed control tokens text)."""
        plain = [{"role": message.role, "content": prepare(message.content)} for message in messages]
        limit = MAX_GROWTH + 4 * sum(len(message["content"]) for message in plain)
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


def _to_json(value: Any, indent: int | None = None) -> str:
    # Templates print for a model, not for a browser: Jinja's own filter would escape < and > here.
    return json.dumps(value, ensure_ascii=False, indent=indent)
