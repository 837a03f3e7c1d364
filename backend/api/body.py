"""Bytes of a request -> a JSON object that is safe to walk: strict JSON, bounded depth, no half characters.

The size was already limited by the guard. Nothing here knows what the fields mean.
"""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

from backend.api.failures import BadJSONError

DEEPEST = 64
_ESCAPED_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def read_object(raw: bytes) -> dict[str, Any]:
    """Parse one JSON object. Raises BadJSONError with the reason."""
    try:
        value = json.loads(raw.decode("utf-8"), parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise BadJSONError(f"the body is not UTF-8 (byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise BadJSONError(f"the body is not JSON: {error.msg} at character {error.pos}") from None
    except RecursionError:
        raise BadJSONError(f"the body is nested deeper than {DEEPEST} levels") from None
    except ValueError as error:  # NaN and Infinity, or an integer of thousands of digits
        raise BadJSONError(f"the body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise BadJSONError("the body must be a JSON object, e.g. {...}")
    if _too_deep(value):
        raise BadJSONError(f"the body is nested deeper than {DEEPEST} levels")
    if _ESCAPED_SURROGATE.search(raw):
        value = _whole_characters(value)
    return dict(value)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number in JSON")


def _too_deep(value: Any) -> bool:
    waiting = [(value, 1)]
    while waiting:
        container, depth = waiting.pop()
        if depth > DEEPEST:
            return True
        children = container.values() if isinstance(container, dict) else container
        waiting.extend((child, depth + 1) for child in children if isinstance(child, dict | list))
    return False


def _whole_characters(value: Any) -> Any:
    """Half of a surrogate pair becomes U+FFFD, as bad bytes do elsewhere: no tokenizer can encode it.

    Clients that cut text by UTF-16 units send such halves inside of emoji; refusing the chat for it helps nobody.
    """
    if isinstance(value, str):
        return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    if isinstance(value, list):
        return [_whole_characters(item) for item in value]
    if isinstance(value, dict):
        return {_whole_characters(key): _whole_characters(item) for key, item in value.items()}
    return value
