"""The API's endpoints: read the request, ask the service, word the answer. All waiting on the service is in threads."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, Protocol, TypeVar

import anyio.to_thread
from fastapi import FastAPI
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from backend.api import exposition, paths, replies, shapes
from backend.api.body import read_object
from backend.api.failures import HTTPFailure, ModelNotFoundError
from backend.api.schema import (
    Asked,
    ChatFields,
    CompletionFields,
    LoadFields,
    body_schema,
    read_chat,
    read_completion,
    read_load,
)
from backend.api.sse import EventStream
from backend.errors import NotReadyError
from backend.events import LoadProgress, PresetInfo, Status
from backend.generation import Generation
from backend.metrics import Distribution, Family
from backend.params import GenerationParams
from backend.text.messages import Message

Result = TypeVar("Result")
Endpoint = Callable[..., Awaitable[Response]]


class Door(Protocol):
    """What the API asks of the service. Every method may block for a moment; chat and complete may raise UserError."""

    def presets(self) -> list[PresetInfo]: ...

    def load(self, name: str, progress: Callable[[LoadProgress], None] | None = None, *, wait: bool = True) -> None: ...

    def cancel_load(self, name: str | None = None) -> bool: ...

    def status(self) -> Status: ...

    def metrics(self) -> list[Family | Distribution]: ...

    def default_params(self) -> GenerationParams: ...

    def chat(
        self,
        messages: Sequence[Message],
        params: GenerationParams,
        *,
        top_logprobs: int | None = None,
        trim: bool = False,
        score_prompt: bool = False,
        person: str = "",
    ) -> Generation: ...

    def complete(
        self,
        prompt: str | Sequence[int],
        params: GenerationParams,
        *,
        top_logprobs: int | None = None,
        score_prompt: bool = False,
        only_prompt: bool = False,
        person: str = "",
    ) -> Generation: ...


class Endpoints:
    """One method per endpoint. `started` is what `created` says of every model."""

    def __init__(self, service: Door, version: str) -> None:
        self.service = service
        self.version = version
        self.started = int(time.time())

    # reading ---------------------------------------------------------------------------------------------------------

    async def health(self, request: Request) -> Response:
        status = await _in_thread(self.service.status)
        if status.state != "ready":
            raise NotReadyError(f"no model can answer: {status.error or status.state}")
        return JSONResponse({"status": "ok"})

    async def metrics(self, request: Request) -> Response:
        families = await _in_thread(self.service.metrics)
        return Response(exposition.text(families), media_type=exposition.MEDIA_TYPE)

    async def about(self, request: Request) -> Response:
        return JSONResponse({"version": self.version})

    async def models(self, request: Request) -> Response:
        names = shapes.model_names(await _in_thread(self.service.status))
        return JSONResponse(shapes.listing([shapes.model_card(name, self.started) for name in names[:1]]))

    async def model(self, request: Request) -> Response:
        name = str(request.path_params["name"])
        if name not in shapes.model_names(await _in_thread(self.service.status)):
            raise ModelNotFoundError(f"the model '{name}' is not loaded", param="model")
        return JSONResponse(shapes.model_card(name, self.started))

    async def presets(self, request: Request) -> Response:
        rows = await _in_thread(self.service.presets)
        return JSONResponse(shapes.listing([shapes.preset_row(info) for info in rows]))

    # doing -----------------------------------------------------------------------------------------------------------

    async def load(self, request: Request) -> Response:
        """Load a preset and answer when it is loaded. A client that leaves does not undo the load.

        While another preset is being loaded the answer is 503: a program can come back, and need not hold a thread.
        """
        name = read_load(read_object(await request.body()))
        await _in_thread(lambda: self.service.load(name, wait=False))
        status = await _in_thread(self.service.status)
        return JSONResponse({"status": status.state, "preset": status.preset, "model": status.model})

    async def cancel_load(self, request: Request) -> Response:
        """Cancel the load that is being carried out, whoever asked for it."""
        await request.body()
        return JSONResponse({"cancelled": await _in_thread(self.service.cancel_load)})

    async def chat(self, request: Request) -> Response:
        raw = await request.body()
        asked, model, generations = await _in_thread(lambda: self._start_chat(raw, person_of(request)))
        envelope = self._envelope("chatcmpl", model, asked)
        shape = shapes.ChatShape(envelope, 0 if asked.truncate else None)
        return await _respond(asked, shape, generations, request)

    async def complete(self, request: Request) -> Response:
        raw = await request.body()
        asked, model, generations = await _in_thread(lambda: self._start_completion(raw, person_of(request)))
        envelope = self._envelope("cmpl", model, asked)
        echoed = tuple(prompt for prompt in asked.prompts for _ in range(asked.tries)) if asked.echo else ()
        return await _respond(asked, shapes.TextShape(envelope, echoed), generations, request)

    def _start_chat(self, raw: bytes, person: str) -> tuple[Asked, str, list[Generation]]:
        asked = read_chat(read_object(raw))
        model = self._model(asked)
        choices = asked.params(self.service.default_params())
        starts = [
            partial(self.service.chat, asked.messages, params, person=person, **asked.options) for params in choices
        ]
        return asked, model, _all_or_none(starts)

    def _start_completion(self, raw: bytes, person: str) -> tuple[Asked, str, list[Generation]]:
        """Start every choice of every prompt before any is read, so that they run together."""
        asked = read_completion(read_object(raw))
        model = self._model(asked)
        choices = asked.params(self.service.default_params())
        starts = [
            partial(self.service.complete, prompt, params, person=person, **asked.options)
            for prompt in asked.prompts
            for params in choices
        ]
        return asked, model, _all_or_none(starts)

    def _model(self, asked: Asked) -> str:
        """The name to answer under. While nothing is loaded the service itself says why it cannot answer."""
        names = shapes.model_names(self.service.status())
        for name in asked.names:
            if names and name not in names:
                raise ModelNotFoundError(f"the model '{name}' is not loaded; loaded is '{names[0]}'", param="model")
        return names[0] if names else ""

    def _envelope(self, prefix: str, model: str, asked: Asked) -> shapes.Envelope:
        return shapes.Envelope(
            shapes.new_id(prefix), int(time.time()), model, asked.include_usage, asked.top_logprobs is not None,
            asked.n, asked.top_logprobs or 0, asked.prompt_logprobs, asked.best_of,
        )  # fmt: skip


async def _respond(asked: Asked, shape: shapes.Shape, generations: Sequence[Generation], request: Request) -> Response:
    if asked.stream:
        return EventStream(replies.events(shape, generations), on_close=lambda: replies.stop_all(generations))
    return await replies.answer(shape, generations, request)


def _all_or_none(starts: Sequence[Callable[[], Generation]]) -> list[Generation]:
    """Start them all; when one cannot be, none goes on."""
    started: list[Generation] = []
    try:
        for start in starts:
            started.append(start())
    except BaseException:
        replies.stop_all(started)
        raise
    return started


def person_of(request: Request) -> str:
    """Who asks: what the guard has found out, of `persons`."""
    return str(getattr(request.state, "person", ""))


async def _in_thread(function: Callable[[], Result]) -> Result:
    return await anyio.to_thread.run_sync(function)


# the table -----------------------------------------------------------------------------------------------------------


def add_routes(app: FastAPI, service: Door, version: str) -> None:
    """Every endpoint, then what answers the API's paths when no endpoint does.

    The page is mounted at "/" later and would take a wrong method or an unknown /v1 path for one of its own: a full
    match beats the router's half match. So each path gets a second route for all other methods, and /v1 a last one.
    """
    at = Endpoints(service, version)
    get: list[tuple[str, Endpoint]] = [
        (paths.HEALTH, at.health),
        (paths.VERSION, at.about),
        (paths.METRICS, at.metrics),
        (paths.ROOT + paths.MODELS, at.models),
        (paths.MODELS, at.models),
        (paths.ROOT + paths.MODELS + "/{name:path}", at.model),
        (paths.MODELS + "/{name:path}", at.model),
        (paths.PRESETS, at.presets),
    ]
    post: list[tuple[str, Endpoint, type[BaseModel]]] = [
        (paths.ROOT + paths.CHAT, at.chat, ChatFields),
        (paths.CHAT, at.chat, ChatFields),
        (paths.ROOT + paths.COMPLETIONS, at.complete, CompletionFields),
        (paths.COMPLETIONS, at.complete, CompletionFields),
        (paths.LOAD, at.load, LoadFields),
    ]
    for path, endpoint in get:
        app.add_api_route(path, endpoint, methods=["GET"], response_model=None)
        app.add_api_route(path, endpoint, methods=["HEAD"], response_model=None, include_in_schema=False)
    app.add_api_route(paths.CANCEL, at.cancel_load, methods=["POST"], response_model=None)
    for path, endpoint, fields in post:
        content = {"application/json": {"schema": body_schema(fields)}}
        extra: dict[str, Any] = {"requestBody": {"required": True, "content": content}}
        app.add_api_route(path, endpoint, methods=["POST"], response_model=None, openapi_extra=extra)
    refusals = [(path, WrongMethod("GET, HEAD")) for path, _ in get]
    refusals += [(paths.OPENAPI, WrongMethod("GET, HEAD"))]
    refusals += [(path, WrongMethod("POST")) for path in (*(path for path, _, _ in post), paths.CANCEL)]
    for path, refusal in refusals:
        app.router.routes.append(Route(path, refusal, include_in_schema=False))
    for path in (paths.ROOT, paths.ROOT + "/{rest:path}"):
        app.router.routes.append(Route(path, UnknownPath(), include_in_schema=False))


class WrongMethod:
    """An ASGI endpoint (those match any method) that says which methods the path has."""

    def __init__(self, allowed: str) -> None:
        self.allowed = allowed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        message = f"{scope['method']} is not possible here; {self.allowed} is"
        raise HTTPFailure(405, message, headers={"allow": self.allowed})


class UnknownPath:
    """An ASGI endpoint for the paths under /v1 that do not exist."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        raise HTTPFailure(404, f"there is no {paths.route_path(scope)[:200]} here")
