"""Everything that can go wrong with a request, in the one shape that OpenAI clients read.

`{"error": {"message", "type", "param", "code"}}`, four keys always, numbers for programs beside them.
"""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse

from backend.errors import ParameterError, UserError

LONGEST_MESSAGE = 600  # a message quotes what was sent; a client that sends megabytes need not get them back
RETRY_SECONDS = "2"


class BadJSONError(UserError):
    """The body is not a JSON object that we are willing to read."""

    code = "invalid_json"


class UnsupportedError(ParameterError):
    """A field that clients know and this server cannot honour: said, because ignoring it would falsify results."""

    code = "unsupported_parameter"


class ModelNotFoundError(UserError):
    """The request names a model that is not the loaded one."""

    status = 404
    kind = "not_found_error"
    code = "model_not_found"


class HTTPFailure(UserError):
    """A refusal that HTTP itself has a status for (404, 405, 413, 415, ...)."""

    def __init__(self, status: int, message: str, *, code: str | None = None, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status = status
        self.kind = _KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error")
        self.code = code or _CODES.get(status)
        self.headers = headers or {}


_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "overloaded_error",
}
_CODES = {
    401: "invalid_api_key",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    413: "request_too_large",
    415: "unsupported_media_type",
    431: "headers_too_large",
    500: "internal_error",
    503: "not_ready",
}


def as_user_error(error: Exception | None) -> UserError:
    """The error itself when it was meant for people, else a sentence that gives nothing of our insides away."""
    if isinstance(error, UserError):
        return error
    return HTTPFailure(500, "the server met an error of its own; its log has the details")


def error_body(error: UserError) -> dict[str, Any]:
    """The JSON body of one error. Extra numbers never replace one of the four keys."""
    message = error.message
    if len(message) > LONGEST_MESSAGE:
        message = f"{message[:LONGEST_MESSAGE]} ..."
    known = {"message": message, "type": error.kind, "param": error.param, "code": error.code}
    return {"error": {**error.extra, **known}}


def error_headers(error: UserError) -> dict[str, str]:
    """Headers that belong to an error; 429 and 503 tell the client when to come back."""
    headers = dict(error.headers) if isinstance(error, HTTPFailure) else {}
    if error.status in (429, 503):
        headers.setdefault("retry-after", RETRY_SECONDS)
    return headers


def error_response(error: UserError) -> JSONResponse:
    return JSONResponse(error_body(error), status_code=error.status, headers=error_headers(error))
