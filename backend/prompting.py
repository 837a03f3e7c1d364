"""A loaded model's way with text: what messages and raw text become as token ids, and what ends a reply.

No torch, no weights: a tokenizer and a prompt format.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

from backend.errors import ParameterError, PresetError
from backend.text.detect import detect_format
from backend.text.formats import FORMATS, PromptFormat, stops_for
from backend.text.messages import Message
from backend.text.templates import cut
from backend.tokenizer.base import Tokenizer
from backend.tokenizer.segments import ControlGuard, Segment


class Prompting:
    """`end_ids`: tokens that end any reply. `stops`, `trims_reply`: what holds for chats in this format besides."""

    def __init__(self, tokenizer: Tokenizer, form: PromptFormat | None, model_name: str) -> None:
        self.tokenizer, self.form, self._model_name = tokenizer, form, model_name
        control = tokenizer.control_tokens()
        self._control = control
        self._template = None
        self.end_ids, self.trims_reply = tokenizer.end_ids, False
        self.stops: tuple[str, ...] = ()
        if form is not None:
            self._template = form.chat_template(
                _special_tokens(tokenizer), control_tokens=control, adds_space=tokenizer.adds_space_prefix
            )
            ends, self.stops = stops_for(form, control)
            self.end_ids = tokenizer.end_ids | ends
            # The first token of a reply brings the space with it that such a vocabulary puts before every text.
            self.trims_reply = form.trims_reply or tokenizer.adds_space_prefix

    def encode_chat(self, messages: Sequence[Message], *, generation_prompt: bool = True) -> list[int]:
        """The prompt of a chat in the model's own format. Control tokens typed in a message stay text."""
        if self._template is None or self.form is None:
            raise ParameterError(
                f"{self._model_name} has no chat template; use completion, or set prompt_format in the preset"
            )
        if (refusal := self.form.refusal(messages)) is not None:
            raise ParameterError(refusal)
        guard = ControlGuard(self._control, [message.content for message in messages])
        text = self._template.render(messages, generation_prompt=generation_prompt, prepare=guard.guard)
        segments: list[Segment] = []
        for segment in guard.split(text):
            segments += [segment] if segment.control else [Segment(part) for part in cut(segment.text)]
        return self.tokenizer.with_start(self.tokenizer.encode_segments(segments))

    def message_size(self, message: Message) -> int:
        """About how many tokens a message adds to a chat, rather too many. Always the same for the same message."""
        return self._around_a_message + sum(len(self.tokenizer.encode(part)) for part in cut(message.content))

    @cached_property
    def _around_a_message(self) -> int:
        """Tokens that the format puts around one message, rounded up, and one more for the seams."""
        turn = [Message("user", "a"), Message("assistant", "a")]
        once, twice = (len(self.encode_chat(turn * times, generation_prompt=False)) for times in (1, 2))
        return -(-(twice - once) // 2)

    def encode_text(self, text: str) -> list[int]:
        """A raw prompt: nothing added but the begin token, where the vocabulary wants one."""
        ids = self.tokenizer.with_start(self.tokenizer.encode(text))
        # An empty prompt is a fair question; the end-of-text token is what models saw before unrelated texts.
        return ids or [min(self.tokenizer.end_ids, default=0)]


def choose_format(asked: str, tokenizer: Tokenizer, model_name: str, preset_name: str) -> PromptFormat | None:
    """The preset's `prompt_format`: a format's name, a template file, or auto: what the model's own data says."""
    if asked in FORMATS:
        return FORMATS[asked]
    if asked == "auto":
        return _detected(tokenizer.chat_template, tokenizer, model_name)
    try:
        source = Path(asked).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PresetError(f"preset {preset_name}: prompt_format: {error}") from None
    return _detected(source, tokenizer, model_name)


def _detected(template: str | None, tokenizer: Tokenizer, model_name: str) -> PromptFormat | None:
    return detect_format(template, tokenizer.control_tokens(), model_name, adds_space=tokenizer.adds_space_prefix)


def _special_tokens(tokenizer: Tokenizer) -> Mapping[str, str]:
    ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
    return {name: "" if token is None else tokenizer.token_text(token) for name, token in ids.items()}
