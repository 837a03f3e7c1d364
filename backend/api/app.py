"""The API as one FastAPI application. The owner of the process mounts the page into it and puts the guard before it."""

from __future__ import annotations

import logging

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from backend.api import paths
from backend.api.failures import HTTPFailure, as_user_error, error_response
from backend.api.replies import CLIENT_CLOSED
from backend.api.routes import Door, add_routes
from backend.errors import UserError
from backend.settings import VERSION, Settings

log = logging.getLogger(__name__)


def create_api(service: Door, settings: Settings, version: str = VERSION) -> FastAPI:
    """All routes of the API; every error it answers has the OpenAI shape. No page, no guard, nothing started.

    `settings` is not needed yet: addresses, keys and limits are the guard's. It is taken so that a route may need it
    without a change for the caller.
    """
    app = FastAPI(
        title="Suri",
        version=version,
        docs_url=None,  # both documentation pages would load scripts from a CDN
        redoc_url=None,
        openapi_url=paths.OPENAPI,
        redirect_slashes=False,  # a redirect would be the one answer without an error body
    )
    app.add_exception_handler(UserError, _user_error)
    app.add_exception_handler(HTTPException, _http_exception)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(ClientDisconnect, _client_gone)
    app.add_exception_handler(Exception, _unexpected)
    add_routes(app, service, version)
    return app


async def _user_error(request: Request, error: Exception) -> Response:
    return error_response(as_user_error(error))


async def _http_exception(request: Request, error: Exception) -> Response:
    """Starlette's own: unknown paths where no page is mounted."""
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        return error_response(HTTPFailure(404, f"there is no {request.url.path[:200]} here"))
    return error_response(HTTPFailure(error.status_code, str(error.detail), headers=dict(error.headers or {})))


async def _validation_error(request: Request, error: Exception) -> Response:
    """Our routes read their bodies themselves, so this is for routes that somebody adds the FastAPI way."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"][1:])
    return error_response(HTTPFailure(400, f"{name}: {first['msg']}", code="invalid_value"))


async def _client_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED)


async def _unexpected(request: Request, error: Exception) -> Response:
    """A defect of ours. The server that runs us logs the trace; the client gets a sentence and the request's id."""
    return error_response(as_user_error(error))
