"""Request bodies of the OpenAI dialect -> messages, prompts and GenerationParams, or an error that names the field.

Sampling fields are not listed here: they are the knobs of `backend.params`, so a new knob is accepted by itself.
Fields that nobody knows are ignored; fields that we know and cannot honour are refused (`neutral`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError

from backend.api import neutral
from backend.api.conversation import read_messages, read_prompts
from backend.errors import ParameterError
from backend.params import KNOBS, GenerationParams, Knob
from backend.text.messages import Message

COMPLETION_TOKENS = 16  # what OpenAI's completions do when max_tokens is absent
UNTIL_FULL = 0
_LENGTH = next(knob for knob in KNOBS if knob.name == "max_tokens")

Name = Annotated[str | None, Field(max_length=500)]
# the knob's 0 means "until the context is full"; a client that asks for 0 tokens does not mean that
Length = Annotated[int | None, Field(ge=1, le=int(_LENGTH.high))]


class GenerationFields(BaseModel):
    """What both endpoints share, sampling apart. Strict: true is not 1 and "5" is not 5."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    model: Name = None
    preset: Name = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    max_tokens: Length = None


class ChatFields(GenerationFields):
    messages: Annotated[tuple[Message, ...], PlainValidator(read_messages, json_schema_input_type=list[dict[str, Any]])]
    max_completion_tokens: Length = None


class CompletionFields(GenerationFields):
    prompt: Annotated[
        tuple[str | tuple[int, ...], ...],
        PlainValidator(read_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
    ]


class LoadFields(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    preset: str = Field(min_length=1, max_length=500)


@dataclass(frozen=True)
class Asked:
    """One request, checked: what to continue and how. `sampling` holds only what the client sent."""

    names: tuple[str, ...]  # every name by which the request wants its model
    stream: bool
    include_usage: bool
    sampling: Mapping[str, Any]
    messages: tuple[Message, ...] = ()
    prompts: Sequence[str | tuple[int, ...]] = ()

    def params(self, defaults: GenerationParams) -> GenerationParams:
        """The client's values on top of what the loaded preset recommends."""
        return GenerationParams.from_mapping(self.sampling, defaults)


def read_chat(body: Mapping[str, Any]) -> Asked:
    """A chat request. Without a length the reply may go on until the context is full."""
    neutral.refuse_unsupported(body, neutral.CHAT)
    fields = _validated(ChatFields, body)
    limit = fields.max_tokens if fields.max_completion_tokens is None else fields.max_completion_tokens
    return _asked(fields, body, UNTIL_FULL if limit is None else limit, messages=fields.messages)


def read_completion(body: Mapping[str, Any]) -> Asked:
    """A completion request; each prompt becomes a choice with its index."""
    neutral.refuse_unsupported(body, neutral.COMPLETION)
    fields = _validated(CompletionFields, body)
    limit = COMPLETION_TOKENS if fields.max_tokens is None else fields.max_tokens
    return _asked(fields, body, limit, prompts=fields.prompt)


def read_load(body: Mapping[str, Any]) -> str:
    """The preset named by a load request."""
    return _validated(LoadFields, body).preset


def _asked(fields: GenerationFields, body: Mapping[str, Any], limit: int, **content: Any) -> Asked:
    sampling = {knob.name: _knob_value(knob, body[knob.name]) for knob in KNOBS if body.get(knob.name) is not None}
    sampling["max_tokens"] = limit
    GenerationParams.from_mapping(sampling)  # a bad value is the client's error, whatever the preset's defaults are
    return Asked(
        names=tuple(name for name in (fields.model, fields.preset) if name is not None),
        stream=bool(fields.stream),
        include_usage=_include_usage(fields),
        sampling=sampling,
        **content,
    )


def _knob_value(knob: Knob, value: Any) -> Any:
    """Stricter than the knob itself, for which an empty text is a seed that was left out of a form."""
    if knob.kind != "strings" and isinstance(value, str):
        raise ParameterError(f"{knob.name}: found a text, expected a number", param=knob.name)
    return value


def _include_usage(fields: GenerationFields) -> bool:
    if fields.stream_options is None:
        return False
    if not fields.stream:
        raise ParameterError("stream_options: only allowed together with stream: true", param="stream_options")
    value = fields.stream_options.get("include_usage")
    if value is not None and not isinstance(value, bool):
        raise ParameterError(
            "stream_options.include_usage: expected true or false", param="stream_options.include_usage"
        )
    return bool(value)


Fields = TypeVar("Fields", bound=BaseModel)


def _validated(model: type[Fields], body: Mapping[str, Any]) -> Fields:
    known = {name: body[name] for name in model.model_fields if name in body}
    try:
        return model.model_validate(known)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        name = ".".join(str(part) for part in first["loc"])
        raise ParameterError(f"{name}: {first['msg'][:1].lower()}{first['msg'][1:]}", param=name or None) from None


def body_schema(model: type[BaseModel]) -> dict[str, Any]:
    """The JSON schema of a request body for /openapi.json, knobs included."""
    schema = model.model_json_schema()
    if issubclass(model, GenerationFields):
        for knob in KNOBS:
            schema["properties"].setdefault(knob.name, _knob_schema(knob))
    return schema


def _knob_schema(knob: Knob) -> dict[str, Any]:
    if knob.kind == "strings":
        one = {"type": "string"}
        return {"anyOf": [one, {"type": "array", "items": one, "maxItems": int(knob.high)}], "description": knob.help}
    kind = "number" if knob.kind == "float" else "integer"
    return {"type": kind, "minimum": knob.low, "maximum": knob.high, "description": knob.help}
