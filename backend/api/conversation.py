"""The parts of a request that are text: a chat's messages and a completion's prompts.

Read by hand and not by a pydantic union, because a union answers a wrong list with one error per item and branch, and
because an error should say `messages[2].content`, not which branch of a union was tried.
"""

from __future__ import annotations

from typing import Any

from backend.api.failures import UnsupportedError
from backend.errors import ParameterError
from backend.text.messages import Message, Role

MOST_MESSAGES = 10_000
MOST_PARTS = 1_000
MOST_PROMPTS = 64
LARGEST_TOKEN_ID = 2**31 - 1  # whether the vocabulary has it is for the tokenizer to say
_ROLES: tuple[tuple[str, Role], ...] = (
    ("system", "system"),
    ("developer", "system"),  # OpenAI's newer name for the same thing
    ("user", "user"),
    ("assistant", "assistant"),
)

Prompt = str | tuple[int, ...]


def read_messages(value: Any) -> tuple[Message, ...]:
    """The `messages` of a chat request."""
    if not isinstance(value, list) or not value:
        raise ParameterError("messages: expected a list with at least one message", param="messages")
    if len(value) > MOST_MESSAGES:
        raise ParameterError(f"messages: found {len(value)}, at most {MOST_MESSAGES} are allowed", param="messages")
    return tuple(_message(item, f"messages[{index}]") for index, item in enumerate(value))


def _message(value: Any, where: str) -> Message:
    if not isinstance(value, dict):
        raise ParameterError(f"{where}: expected an object with role and content", param=where)
    for field in ("tool_calls", "function_call", "audio"):
        if value.get(field):
            raise UnsupportedError(f"{where}.{field}: this server does not support it yet", param=f"{where}.{field}")
    return Message(_role(value.get("role"), f"{where}.role"), _content(value.get("content"), f"{where}.content"))


def _role(value: Any, where: str) -> Role:
    for name, role in _ROLES:
        if value == name:
            return role
    if value in ("tool", "function"):
        raise UnsupportedError(f"{where}: this server does not support tools yet", param=where)
    names = ", ".join(name for name, _ in _ROLES)
    raise ParameterError(f"{where}: found {_short(value)}, expected one of {names}", param=where)


def _content(value: Any, where: str) -> str:
    """A string as it is; text parts joined by line ends, as vLLM and llama.cpp do."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise ParameterError(f"{where}: found {_short(value)}, expected a text or a list of text parts", param=where)
    if len(value) > MOST_PARTS:
        raise ParameterError(f"{where}: found {len(value)} parts, at most {MOST_PARTS} are allowed", param=where)
    return "\n".join(_part(part, f"{where}[{index}]") for index, part in enumerate(value))


def _part(value: Any, where: str) -> str:
    if not isinstance(value, dict):
        raise ParameterError(f"{where}: expected an object with type and text", param=where)
    kind = value.get("type")
    if kind != "text":
        # never fetched either: an image_url may point anywhere
        raise UnsupportedError(f"{where}: found type {_short(kind)}, only text is supported", param=f"{where}.type")
    if not isinstance(value.get("text"), str):
        raise ParameterError(f"{where}.text: expected a text", param=f"{where}.text")
    return str(value["text"])


def read_prompts(value: Any) -> tuple[Prompt, ...]:
    """The `prompt` of a completion request: one text, one list of token ids, or a list of either."""
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list) or not value:
        raise ParameterError("prompt: expected a text, a list of token ids, or a list of either", param="prompt")
    if _is_number(value[0]):
        return (_token_ids(value, "prompt"),)
    if len(value) > MOST_PROMPTS:
        raise ParameterError(f"prompt: found {len(value)} prompts, at most {MOST_PROMPTS} are allowed", param="prompt")
    return tuple(_prompt(item, f"prompt[{index}]") for index, item in enumerate(value))


def _prompt(value: Any, where: str) -> Prompt:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value:
        return _token_ids(value, where)
    raise ParameterError(f"{where}: found {_short(value)}, expected a text or token ids", param=where)


def _token_ids(values: list[Any], where: str) -> tuple[int, ...]:
    for index, value in enumerate(values):
        if not _is_number(value) or not 0 <= value <= LARGEST_TOKEN_ID:
            raise ParameterError(f"{where}[{index}]: found {_short(value)}, expected a token id", param=where)
    return tuple(values)


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _short(value: Any) -> str:
    """What was found, in few words: containers by their kind, since they may hold megabytes."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    if value is None:
        return "nothing"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
