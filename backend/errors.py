"""Errors that a person can act on: shown as one sentence in the page, as JSON by the API, as one line on a terminal.

Anything that is not a `UserError` is a defect of ours and may show a stack trace in the log (never in the page).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

MAX_MESSAGE = 2000  # letters


class UserError(Exception):
    """One clear sentence: what was found, where, and what was expected.

    `status` is the HTTP status, `kind` the OpenAI error type, `code` the machine-readable reason, `param` the field.
    The sentence may quote what a file or a request says, so it is made one printable line of bounded length: control
    characters could do things to a terminal.
    """

    status = 400
    kind = "invalid_request_error"
    code: str | None = None

    def __init__(self, message: str, *, param: str | None = None, **extra: object) -> None:
        message = _one_line(message)
        super().__init__(message)
        self.message = message
        self.param = param
        self.extra = extra  # numbers that programs want beside the sentence, e.g. n_prompt_tokens


class ParameterError(UserError):
    """A generation parameter or request field of the wrong name, type or range."""

    code = "invalid_value"


class ContextLengthError(UserError):
    """A prompt that cannot fit into the context. Carries n_prompt_tokens and n_ctx."""

    code = "context_length_exceeded"


class PresetError(UserError):
    """A preset file with a key, type or range that does not fit, or an unknown preset name."""

    code = "invalid_preset"


class CheckpointError(UserError):
    """A model file that cannot be opened as what it claims to be. The message names the file and the part."""

    code = "invalid_checkpoint"


class SavedCacheError(UserError):
    """A saved KV cache that cannot be written or used. Nothing is lost but the time to read its text again."""

    code = "invalid_cache"


class DownloadError(UserError):
    """A model that could not be fetched, or arrived damaged."""

    status = 503
    kind = "overloaded_error"
    code = "download_failed"


class NotReadyError(UserError):
    """No model can answer yet (or any more)."""

    status = 503
    kind = "overloaded_error"
    code = "not_ready"


class UnloadingError(NotReadyError):
    """The model that was asked is on its way out; whoever asks again reaches the next one."""


class LoadCancelled(UserError):
    """A person has cancelled a load. Raised by a progress callback: whoever loads drops everything and lets it pass."""

    status = 409
    code = "load_cancelled"


class OutOfMemoryError(UserError):
    """Memory does not suffice. Carries needed_bytes and free_bytes where they are known."""

    status = 503
    kind = "overloaded_error"
    code = "out_of_memory"


class BusyError(UserError):
    """Too many requests are waiting."""

    status = 503
    kind = "overloaded_error"
    code = "queue_full"


class NumericalError(UserError):
    """The model's output was not a number; the request ends, others go on."""

    status = 500
    kind = "server_error"
    code = "numerical_error"


class SamplingError(UserError):
    """The rules of a request (grammar, banned texts, biases) leave no token, or a grammar took too much work."""

    code = "sampling_failed"


class EngineError(UserError):
    """The engine met a defect of ours while serving this request."""

    status = 500
    kind = "server_error"
    code = "engine_error"


class StartError(UserError):
    """The server cannot start as asked (port taken, unsafe address): one line and exit code 2."""


def _one_line(message: str) -> str:
    message = " ".join(message.splitlines())
    if not message.isprintable():
        message = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in message)
    if len(message) > MAX_MESSAGE:
        message = f"{message[: MAX_MESSAGE // 2]} … {message[-MAX_MESSAGE // 4 :]}"
    return message


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a `; did you mean 'x'?` ending for error sentences, or an empty string when nothing is near."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{matches[0]}'?" if matches else ""
