"""python -m backend generate: one completion to stdout."""

from __future__ import annotations

import argparse
import json
import sys

from backend.commands.choice import add_choice, loaded_service
from backend.generation import Generation
from backend.params import KNOBS, GenerationParams, Knob
from backend.text.messages import Message

HELP = "continue a prompt and print the reply"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_choice(parser)
    parser.add_argument("--prompt", required=True, help="the text to continue; - reads it from stdin")
    parser.add_argument("--chat", action="store_true", help="ask it as a chat message, in the model's own format")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    for knob in KNOBS:
        parser.add_argument(f"--{knob.name.replace('_', '-')}", help=knob.help, **_argument(knob))


def run(arguments: argparse.Namespace) -> int:
    given = {knob.name: getattr(arguments, knob.name) for knob in KNOBS if getattr(arguments, knob.name) is not None}
    GenerationParams.from_mapping(given)  # a bad value should not cost a load
    service = loaded_service(arguments)
    try:
        params = GenerationParams.from_mapping(given, service.default_params())
        prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
        runtime = service.runtime()
        if arguments.chat:
            generation = runtime.start_chat([Message("user", prompt)], params, want_logprobs=arguments.json)
        else:
            generation = runtime.start(runtime.prompting.encode_text(prompt), params, want_logprobs=arguments.json)
        return _print_json(generation) if arguments.json else _print_text(generation)
    finally:
        service.close()


def _print_text(generation: Generation) -> int:
    for chunk in generation:
        print(chunk.text, end="", flush=True)
        if chunk.error is not None:
            raise chunk.error
    print()
    return 0


def _print_json(generation: Generation) -> int:
    text = ""
    ids: list[int] = []
    logprobs: list[float] = []
    for chunk in generation:
        if chunk.error is not None:
            raise chunk.error
        text += chunk.text
        ids += chunk.ids
        logprobs += chunk.logprobs
    stats = chunk.stats
    document = {
        "text": text,
        "prompt_tokens": stats.prompt_tokens,
        "completion_tokens": stats.completion_tokens,
        "finish_reason": chunk.finish_reason,
        "ids": ids,
        "logprobs": logprobs,
    }
    print(json.dumps(document, ensure_ascii=False))
    return 0


def _argument(knob: Knob) -> dict:  # type: ignore[type-arg]
    if knob.kind in ("strings", "names"):
        return {"action": "append", "metavar": "TEXT"}
    if knob.kind == "bool":
        return {"action": argparse.BooleanOptionalAction}
    if knob.kind == "text":
        return {"metavar": "TEXT"}
    if knob.kind == "ids":
        return {"action": "append", "type": int, "metavar": "TOKEN"}
    if knob.kind == "biases":
        return {"action": "append", "type": _bias, "metavar": "TOKEN:BIAS"}
    return {"type": float if knob.kind == "float" else int, "metavar": "N"}


def _bias(text: str) -> tuple[int, float]:
    token, _, bias = text.partition(":")
    return int(token), float(bias)
