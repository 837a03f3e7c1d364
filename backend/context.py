"""What of a chat is read when it has outgrown the context: the system prompt, and as many of the newest turns as fit.

Whole turns are left out, so what is read begins with a person's message. Leaving out goes in steps: when the limit is
reached, turns go until three quarters of it are taken, and that place stays for the turns that follow, so that their
beginning is in the cache of keys and values. The place is found by going through the chat as it grew; nothing is
remembered between two requests, and an edit or a branch gets the place that its own turns lead to.

Pure: no tokenizer, no model. How many messages were left out is part of the result, because somebody must say so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from backend.errors import ContextLengthError
from backend.text.messages import Message

KEPT = 3, 4  # share of the limit that is left after leaving turns out
ROOM = 4  # at most one part in so many of the context is kept free for the reply


@dataclass(frozen=True)
class Fitted:
    """What is read of a chat: the prompt's token ids, and how many messages were left out after the system prompt."""

    ids: list[int]
    left_out: int = 0
    messages: tuple[Message, ...] = field(default=(), compare=False)  # those that are read


def reply_room(context: int, max_tokens: int) -> int:
    """Tokens that a prompt leaves free for the reply. `max_tokens` 0: a reply of any length."""
    return max(1, min(max_tokens or context, context // ROOM))


def fit_chat(
    messages: Sequence[Message],
    encode: Callable[[Sequence[Message]], list[int]],
    size: Callable[[Message], int],
    context: int,
    max_tokens: int,
) -> Fitted:
    """The prompt of a chat that leaves room for the reply, with the oldest turns left out where it must be.

    `encode` gives the exact ids of messages, `size` about how many tokens one message adds, rather too many. Raises
    ContextLengthError with both counts when the system prompt and the last message alone do not fit.
    """
    limit = context - reply_room(context, max_tokens)
    ids = encode(messages)
    if len(ids) <= limit:
        return Fitted(ids, 0, tuple(messages))
    head = _system_messages(messages)
    starts = [place for place in range(head, len(messages)) if messages[place].role == "user"]
    if starts:
        for start in _from(starts, _place(messages, head, starts, size, limit)):
            kept = (*messages[:head], *messages[start:])
            ids = encode(kept)
            if len(ids) <= limit or (start == starts[-1] and len(ids) < context):
                return Fitted(ids, start - head, kept)
    elif len(ids) < context:
        return Fitted(ids, 0, tuple(messages))
    raise ContextLengthError(
        f"the system prompt and the last message have {len(ids)} tokens and the context holds {context}, so there is "
        "no room for a reply; shorten one of them",
        n_prompt_tokens=len(ids),
        n_ctx=context,
    )


def with_system(messages: Sequence[Message], text: str) -> list[Message]:
    """The same chat with another system prompt."""
    return [Message("system", text), *messages[_system_messages(messages) :]]


def _system_messages(messages: Sequence[Message]) -> int:
    """How many messages at the beginning are the system prompt."""
    return next((place for place, message in enumerate(messages) if message.role != "system"), len(messages))


def _from(starts: Sequence[int], place: int) -> list[int]:
    return [start for start in starts if start >= place]


def _place(
    messages: Sequence[Message], head: int, starts: Sequence[int], size: Callable[[Message], int], limit: int
) -> int:
    """Where reading begins, by the sizes: the chat is gone through as it grew, one person's message after the other."""
    total = [0]  # tokens before each message
    for message in messages:
        total.append(total[-1] + size(message))

    def tokens(start: int, last: int) -> int:
        return total[head] + total[last + 1] - total[start]

    place = head
    for last in (*starts, len(messages) - 1):
        if tokens(place, last) > limit:
            later = [start for start in starts if place < start <= last]
            low = limit * KEPT[0] // KEPT[1]
            place = next((start for start in later if tokens(start, last) <= low), later[-1] if later else place)
    return place
