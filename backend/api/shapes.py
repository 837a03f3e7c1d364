"""Response bodies of the OpenAI dialect. Values in, JSON-ready dicts out; nothing here waits or decides.

The two endpoints answer the same events in different words: a `Shape` has one method per event.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from backend.events import FinishReason, PresetInfo, Stats, Status

Body = dict[str, Any]
OWNER = "suri"


@dataclass(frozen=True)
class Reply:
    """One finished choice."""

    text: str
    finish_reason: FinishReason
    stats: Stats


class Shape(Protocol):
    """How one endpoint words its answer. `index` is the choice's number."""

    def opening(self, index: int) -> Body | None:
        """What a stream says before any text, if anything."""

    def piece(self, index: int, text: str) -> Body:
        """Text as it comes."""

    def ending(self, index: int, reason: FinishReason) -> Body:
        """The last chunk of one choice."""

    def closing(self, stats: Sequence[Stats]) -> Body | None:
        """The usage chunk, where it was asked for."""

    def whole(self, replies: Sequence[Reply]) -> Body:
        """Everything at once."""


@dataclass(frozen=True)
class Envelope:
    """What all chunks of one answer have in common."""

    id: str
    created: int
    model: str
    include_usage: bool

    def body(self, kind: str, choices: list[Body]) -> Body:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}

    def chunk(self, kind: str, *choices: Body) -> Body:
        """With include_usage every chunk has the key, and only the last one a value."""
        return self.body(kind, list(choices)) | ({"usage": None} if self.include_usage else {})

    def closing(self, kind: str, stats: Sequence[Stats]) -> Body | None:
        return self.body(kind, []) | {"usage": usage(stats)} if self.include_usage else None


@dataclass(frozen=True)
class ChatShape:
    envelope: Envelope
    kind = "chat.completion.chunk"

    def opening(self, index: int) -> Body | None:
        return self._chunk(index, {"role": "assistant", "content": ""})

    def piece(self, index: int, text: str) -> Body:
        return self._chunk(index, {"content": text})

    def ending(self, index: int, reason: FinishReason) -> Body:
        return self._chunk(index, {}, reason)

    def closing(self, stats: Sequence[Stats]) -> Body | None:
        return self.envelope.closing(self.kind, stats)

    def whole(self, replies: Sequence[Reply]) -> Body:
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": reply.text, "refusal": None},
                "logprobs": None,
                "finish_reason": finish_reason(reply.finish_reason),
            }
            for index, reply in enumerate(replies)
        ]
        return self.envelope.body("chat.completion", choices) | {"usage": usage([reply.stats for reply in replies])}

    def _chunk(self, index: int, delta: Body, reason: FinishReason | None = None) -> Body:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason(reason)}
        return self.envelope.chunk(self.kind, choice)


@dataclass(frozen=True)
class TextShape:
    envelope: Envelope
    kind = "text_completion"

    def opening(self, index: int) -> Body | None:
        return None

    def piece(self, index: int, text: str) -> Body:
        return self.envelope.chunk(self.kind, _text_choice(index, text, None))

    def ending(self, index: int, reason: FinishReason) -> Body:
        return self.envelope.chunk(self.kind, _text_choice(index, "", reason))

    def closing(self, stats: Sequence[Stats]) -> Body | None:
        return self.envelope.closing(self.kind, stats)

    def whole(self, replies: Sequence[Reply]) -> Body:
        choices = [_text_choice(index, reply.text, reply.finish_reason) for index, reply in enumerate(replies)]
        return self.envelope.body(self.kind, choices) | {"usage": usage([reply.stats for reply in replies])}


def _text_choice(index: int, text: str, reason: FinishReason | None) -> Body:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": finish_reason(reason)}


def new_id(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex}"


def finish_reason(reason: FinishReason | None) -> str | None:
    """Only OpenAI's words go out: a reply that somebody stopped has stopped."""
    return "stop" if reason == "cancelled" else reason


def usage(stats: Sequence[Stats]) -> Body:
    """Token counts over all choices."""
    prompt = sum(each.prompt_tokens for each in stats)
    completion = sum(each.completion_tokens for each in stats)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(each.cached_tokens for each in stats)},
    }


def model_names(status: Status) -> tuple[str, ...]:
    """Every name under which the loaded model answers; the first one is shown."""
    return tuple(dict.fromkeys(name for name in (status.model, status.preset) if name))


def model_card(name: str, created: int) -> Body:
    return {"id": name, "object": "model", "created": created, "owned_by": OWNER}


def listing(items: list[Body]) -> Body:
    return {"object": "list", "data": items}


def preset_row(info: PresetInfo) -> Body:
    return {
        "name": info.name,
        "title": info.title,
        "model": info.model,
        "needs": info.needs,
        "loaded": info.loaded,
        "error": info.error,
    }
