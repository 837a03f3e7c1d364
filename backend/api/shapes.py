"""Response bodies of the OpenAI dialect. Values in, JSON-ready dicts out; nothing here waits or decides.

The two endpoints answer the same events in different words: a `Shape` has one method per event.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from backend.api.scores import Scored, chat_logprobs, text_logprobs
from backend.events import FinishReason, PresetInfo, Stats, Status

Body = dict[str, Any]
OWNER = "suri"


@dataclass(frozen=True)
class Reply:
    """One finished choice."""

    text: str
    finish_reason: FinishReason
    stats: Stats
    scored: tuple[Scored, ...] = ()
    prompt_logprobs: list[Body | None] | None = None
    likelihood: float = 0.0  # mean log probability of its tokens, where best_of chooses by it


class Shape(Protocol):
    """How one endpoint words its answer. `index` is the choice's number."""

    @property
    def envelope(self) -> Envelope:
        """What all answers of the request have in common."""

    @property
    def echoed(self) -> Sequence[str | tuple[int, ...]]:
        """The prompt of each choice, where it is to be said again."""

    def answered_by(self, model: str, left_out: int = 0, echoed: Sequence[str] = ()) -> Shape:
        """The same with what is known late of a request that waited: the name of the model that answers, how many
        messages are not read, the prompts that are said again as texts."""

    def opening(self, index: int) -> Body | None:
        """What a stream says before any text, if anything."""

    def piece(self, index: int, text: str, scored: Sequence[Scored] = ()) -> Body:
        """Text as it comes, and the tokens it comes from, which may be ahead of it or behind."""

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
    scored: bool = False  # whether log probabilities were asked for
    n: int = 1  # choices for each prompt
    top_logprobs: int = 0
    prompt_logprobs: int | None = None
    best_of: int | None = None

    @property
    def tries(self) -> int:
        """Replies to each prompt."""
        return self.best_of or self.n

    def tokens(self, scored: Sequence[Scored]) -> Sequence[Scored] | None:
        return scored if self.scored else None

    def body(self, kind: str, choices: list[Body]) -> Body:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}

    def chunk(self, kind: str, *choices: Body) -> Body:
        """With include_usage every chunk has the key, and only the last one a value."""
        return self.body(kind, list(choices)) | ({"usage": None} if self.include_usage else {})

    def closing(self, kind: str, stats: Sequence[Stats]) -> Body | None:
        return self.body(kind, []) | {"usage": usage(stats, self.tries)} if self.include_usage else None


@dataclass(frozen=True)
class ChatShape:
    envelope: Envelope
    left_out: int | None = None  # messages that are not read; None: whoever asked knows of no such thing
    echoed = ()
    kind = "chat.completion.chunk"

    def answered_by(self, model: str, left_out: int = 0, echoed: Sequence[str] = ()) -> ChatShape:
        shape = self if self.left_out is None else replace(self, left_out=left_out)
        return replace(shape, envelope=replace(self.envelope, model=model)) if model else shape

    def opening(self, index: int) -> Body | None:
        return self._chunk(index, {"role": "assistant", "content": ""}) | self._told()

    def _told(self) -> Body:
        return {} if self.left_out is None else {"messages_left_out": self.left_out}

    def piece(self, index: int, text: str, scored: Sequence[Scored] = ()) -> Body:
        return self._chunk(index, {"content": text}, scored=scored)

    def ending(self, index: int, reason: FinishReason) -> Body:
        return self._chunk(index, {}, reason)

    def closing(self, stats: Sequence[Stats]) -> Body | None:
        return self.envelope.closing(self.kind, stats)

    def whole(self, replies: Sequence[Reply]) -> Body:
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": reply.text, "refusal": None},
                "logprobs": chat_logprobs(self.envelope.tokens(reply.scored)),
                "finish_reason": finish_reason(reply.finish_reason),
            }
            for index, reply in enumerate(replies)
        ]
        counts = usage([reply.stats for reply in replies], self.envelope.n)
        whole = self.envelope.body("chat.completion", choices) | {"usage": counts} | self._told()
        return (
            whole if self.envelope.prompt_logprobs is None else whole | {"prompt_logprobs": replies[0].prompt_logprobs}
        )

    def _chunk(
        self, index: int, delta: Body, reason: FinishReason | None = None, scored: Sequence[Scored] = ()
    ) -> Body:
        logprobs = chat_logprobs(self.envelope.tokens(scored)) if scored else None
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason(reason)}
        return self.envelope.chunk(self.kind, choice)


@dataclass(frozen=True)
class TextShape:
    envelope: Envelope
    echoed: tuple[str | tuple[int, ...], ...] = ()  # the prompt of each choice, where it is to be said again
    kind = "text_completion"

    def answered_by(self, model: str, left_out: int = 0, echoed: Sequence[str] = ()) -> TextShape:
        shape = replace(self, echoed=tuple(echoed)) if self.echoed else self
        return replace(shape, envelope=replace(self.envelope, model=model)) if model else shape

    def opening(self, index: int) -> Body | None:
        """The prompt; with log probabilities it has to be read first, and comes as a piece."""
        return self.piece(index, self._echo(index)) if self.echoed and not self.envelope.scored else None

    def _echo(self, index: int) -> str:
        return str(self.echoed[index]) if self.echoed else ""

    def piece(self, index: int, text: str, scored: Sequence[Scored] = ()) -> Body:
        logprobs = text_logprobs(self.envelope.tokens(scored)) if scored else None
        return self.envelope.chunk(self.kind, _text_choice(index, text, None, logprobs))

    def ending(self, index: int, reason: FinishReason) -> Body:
        return self.envelope.chunk(self.kind, _text_choice(index, "", reason, None))

    def closing(self, stats: Sequence[Stats]) -> Body | None:
        return self.envelope.closing(self.kind, stats)

    def whole(self, replies: Sequence[Reply]) -> Body:
        counts = usage([reply.stats for reply in replies], self.envelope.tries)
        choices = []
        for index, (place, reply) in enumerate(_best(replies, self.envelope)):
            scored = text_logprobs(self.envelope.tokens(reply.scored))
            choice = _text_choice(index, self._echo(place) + reply.text, reply.finish_reason, scored)
            if self.envelope.prompt_logprobs is not None:
                choice["prompt_logprobs"] = reply.prompt_logprobs
            choices.append(choice)
        return self.envelope.body(self.kind, choices) | {"usage": counts}


def _best(replies: Sequence[Reply], envelope: Envelope) -> list[tuple[int, Reply]]:
    """The n choices of each prompt, with their places among all replies: with best_of the likeliest, best first."""
    chosen: list[tuple[int, Reply]] = []
    for start in range(0, len(replies), envelope.tries):
        group = list(enumerate(replies))[start : start + envelope.tries]
        if envelope.best_of:
            group.sort(key=lambda each: -each[1].likelihood)
        chosen += group[: envelope.n]
    return chosen


def _text_choice(index: int, text: str, reason: FinishReason | None, logprobs: Body | None) -> Body:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason(reason)}


def new_id(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex}"


def finish_reason(reason: FinishReason | None) -> str | None:
    """Only OpenAI's words go out: a reply that somebody stopped has stopped."""
    return "stop" if reason == "cancelled" else reason


def usage(stats: Sequence[Stats], n: int = 1) -> Body:
    """Token counts over all choices; a prompt counts once for its n choices."""
    prompt = sum(each.prompt_tokens for each in stats[::n])
    completion = sum(each.completion_tokens for each in stats)
    shifted = sum(each.shifted_tokens for each in stats)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(each.cached_tokens for each in stats[::n])},
        **({"shifted_tokens": shifted} if shifted else {}),  # of the middle, forgotten when the context was full
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
        "note": info.note or None,
        "fits": info.fits,
        "ram_bytes": info.ram_bytes,
        "vram_bytes": info.vram_bytes,
        "predicted_tokens_per_second": info.tokens_per_second,
        "bound_by": info.bound_by or None,
        "measured": asdict(info.measured) if info.measured else None,
    }
