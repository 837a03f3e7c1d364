"""Request bodies of the OpenAI dialect -> messages, prompts and GenerationParams, or an error that names the field.

Sampling fields are not listed here: they are the knobs of `backend.params`, so a new knob is accepted by itself.
Fields that nobody knows are ignored; fields that we know and cannot honour are refused (`neutral`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError

from backend.api import dialects, neutral
from backend.api.conversation import read_messages, read_prompts
from backend.api.failures import UnsupportedError
from backend.errors import ParameterError
from backend.knobs import NUMBERS, Knob
from backend.params import KNOBS, GenerationParams
from backend.text.messages import Message

COMPLETION_TOKENS = 16  # what OpenAI's completions do when max_tokens is absent
UNTIL_FULL = 0
MOST_CHOICES = 64  # all prompts and n together
MOST_LOGPROBS = 20
LARGEST_SEED = 2**63 - 1
_LENGTH = next(knob for knob in KNOBS if knob.name == "max_tokens")

Name = Annotated[str | None, Field(max_length=500)]
# the knob's 0 means "until the context is full"; a client that asks for 0 tokens does not mean that
Length = Annotated[int | None, Field(ge=1, le=int(_LENGTH.high))]
Likeliest = Annotated[int | None, Field(ge=0, le=MOST_LOGPROBS)]


class GenerationFields(BaseModel):
    """What both endpoints share, sampling apart. Strict: true is not 1 and "5" is not 5."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    model: Name = None
    preset: Name = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    max_tokens: Length = None
    n: Annotated[int | None, Field(ge=1, le=MOST_CHOICES)] = None
    prompt_logprobs: Likeliest = None  # vLLM's


class ChatFields(GenerationFields):
    messages: Annotated[tuple[Message, ...], PlainValidator(read_messages, json_schema_input_type=list[dict[str, Any]])]
    max_completion_tokens: Length = None
    logprobs: bool | None = None
    top_logprobs: Likeliest = None
    # OpenAI's, of its newer endpoint: what to do with a chat that has outgrown the context; by default it is refused
    truncation: Literal["auto", "disabled"] | None = None


class CompletionFields(GenerationFields):
    prompt: Annotated[
        tuple[str | tuple[int, ...], ...],
        PlainValidator(read_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
    ]
    # not 0 means none: 0 asks for the log probability of the chosen tokens only
    logprobs: Likeliest | Literal[False] = None
    echo: bool | None = None
    max_tokens: Annotated[int | None, Field(ge=0, le=int(_LENGTH.high))] = None
    best_of: Annotated[int | None, Field(ge=1, le=MOST_CHOICES)] = None


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
    n: int = 1
    top_logprobs: int | None = None  # likelier tokens wanted beside each one; None: no log probabilities at all
    prompt_logprobs: int | None = None  # the same for the prompt, in a list of its own
    echo: bool = False
    only_prompt: bool = False
    best_of: int | None = None  # of so many replies, the n likeliest ones
    truncate: bool = False

    def params(self, defaults: GenerationParams) -> list[GenerationParams]:
        """The client's values on top of what the loaded preset recommends, for each reply to a prompt.

        Each has a random stream of its own: with a seed, that of the seed plus its number.
        """
        first = GenerationParams.from_mapping(self.sampling, defaults)
        if first.seed is None:
            return [first] * self.tries
        return [replace(first, seed=(first.seed + number) % (LARGEST_SEED + 1)) for number in range(self.tries)]

    @property
    def tries(self) -> int:
        """Replies to each prompt, of which n are choices."""
        return self.best_of or self.n

    @property
    def options(self) -> dict[str, Any]:
        """What the service is to be asked for besides."""
        wanted = [count for count in (self.top_logprobs, self.prompt_logprobs) if count is not None]
        if self.best_of:
            wanted.append(0)
        scores = self.prompt_logprobs is not None or (self.echo and self.top_logprobs is not None)
        options: dict[str, Any] = {"top_logprobs": max(wanted)} if wanted else {}
        flags = {"score_prompt": scores, "only_prompt": self.only_prompt, "trim": self.truncate}
        return options | {name: True for name, wanted_too in flags.items() if wanted_too}


def read_chat(body: Mapping[str, Any]) -> Asked:
    """A chat request. Without a length the reply may go on until the context is full."""
    neutral.refuse_unsupported(body, neutral.CHAT)
    fields = _validated(ChatFields, body)
    limit = fields.max_tokens if fields.max_completion_tokens is None else fields.max_completion_tokens
    if fields.top_logprobs and not fields.logprobs:
        raise ParameterError("top_logprobs: only allowed together with logprobs: true", param="top_logprobs")
    top = (fields.top_logprobs or 0) if fields.logprobs else None
    truncate = fields.truncation == "auto"
    limit = UNTIL_FULL if limit is None else limit
    return _asked(fields, body, limit, messages=fields.messages, top_logprobs=top, truncate=truncate)


def read_completion(body: Mapping[str, Any]) -> Asked:
    """A completion request; each prompt becomes a choice with its index."""
    neutral.refuse_unsupported(body, neutral.COMPLETION)
    fields = _validated(CompletionFields, body)
    limit = COMPLETION_TOKENS if fields.max_tokens is None else fields.max_tokens
    top = None if fields.logprobs is False else fields.logprobs
    only_prompt = limit == 0
    if only_prompt and not fields.echo and fields.prompt_logprobs is None:
        raise ParameterError("max_tokens: found 0, which needs echo or prompt_logprobs", param="max_tokens")
    n, best_of = fields.n or 1, None if only_prompt else fields.best_of
    if best_of is not None and fields.stream:
        raise UnsupportedError("best_of: not together with stream", param="best_of")
    if best_of is not None and best_of < n:
        raise ParameterError(f"best_of: found {best_of}, expected at least n, which is {n}", param="best_of")
    if len(fields.prompt) * (best_of or n) > MOST_CHOICES:
        raise ParameterError(f"n: prompts times n (or best_of) is above {MOST_CHOICES}", param="n")
    return _asked(
        fields, body, limit or 1, prompts=fields.prompt, top_logprobs=top, echo=bool(fields.echo),
        only_prompt=only_prompt, best_of=best_of if best_of != n else None,
    )  # fmt: skip


def read_load(body: Mapping[str, Any]) -> str:
    """The preset named by a load request."""
    return _validated(LoadFields, body).preset


def _asked(fields: GenerationFields, body: Mapping[str, Any], limit: int, **content: Any) -> Asked:
    own = {knob.name: body[knob.name] for knob in KNOBS if body.get(knob.name) is not None} | dialects.translated(body)
    sampling = {knob.name: _knob_value(knob, own[knob.name]) for knob in KNOBS if knob.name in own}
    sampling["max_tokens"] = limit
    if fields.stream and fields.prompt_logprobs is not None:
        raise UnsupportedError("prompt_logprobs: not together with stream", param="prompt_logprobs")
    GenerationParams.from_mapping(sampling)  # a bad value is the client's error, whatever the preset's defaults are
    return Asked(
        names=tuple(name for name in (fields.model, fields.preset) if name is not None),
        stream=bool(fields.stream),
        include_usage=_include_usage(fields),
        sampling=sampling,
        n=fields.n or 1,
        prompt_logprobs=fields.prompt_logprobs,
        **content,
    )


def _knob_value(knob: Knob, value: Any) -> Any:
    """Stricter than the knob itself, for which an empty text is a seed that was left out of a form."""
    if knob.kind in NUMBERS and isinstance(value, str):
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
    if knob.kind in ("strings", "names"):
        one: dict[str, Any] = {"type": "string", **({"enum": list(knob.choices)} if knob.choices else {})}
        return {"anyOf": [one, {"type": "array", "items": one, "maxItems": int(knob.high)}], "description": knob.help}
    if knob.kind == "bool":
        return {"type": "boolean", "description": knob.help}
    if knob.kind == "text":
        return {"type": "string", "maxLength": int(knob.high), "description": knob.help}
    if knob.kind == "ids":
        ids = {"type": "integer", "minimum": 0}
        return {"type": "array", "items": ids, "maxItems": int(knob.high), "description": knob.help}
    if knob.kind == "biases":
        bias = {"type": "number", "minimum": knob.low, "maximum": knob.high}
        return {"type": "object", "additionalProperties": bias, "description": knob.help}
    kind = "number" if knob.kind == "float" else "integer"
    return {"type": kind, "minimum": knob.low, "maximum": knob.high, "description": knob.help}
