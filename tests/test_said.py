"""Replies that were drawn as other tokens than their text is cut into: a chat that goes on reads only what is new."""

from __future__ import annotations

import pytest

from backend.params import GenerationParams
from backend.runtime import Runtime
from backend.said import MOST, Said
from backend.text.messages import Message
from tests.real import read, starter

QUESTIONS = ("Tell me a joke.", "Write a poem.", "Name five rivers.", "Explain gravity with numbers.")


@pytest.fixture
def runtime() -> Runtime:
    runtime = starter("original")
    runtime.blocks.clear()
    return runtime


def wild(seed: int) -> GenerationParams:
    return GenerationParams(temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, seed=seed, max_tokens=60)


def test_the_next_turn_of_a_sampled_reply_evaluates_only_what_is_new(runtime: Runtime) -> None:
    otherwise = 0
    for seed in range(12):
        chat = [Message("user", QUESTIONS[seed % len(QUESTIONS)])]
        text, reply, first = read(runtime.start_chat(chat, wild(seed)))
        known = first.stats.prompt_tokens + len(reply) - 1  # of the last token nothing was computed
        chat += [Message("assistant", text), Message("user", "Go on.")]
        as_text = runtime.prompting.encode_chat(chat)
        ids = runtime.encode_chat(chat)
        otherwise += ids != as_text
        _, _, second = read(runtime.start_chat(chat, GenerationParams(max_tokens=1)))
        assert second.stats.prompt_tokens == len(ids)
        ended_within_a_character = "\N{REPLACEMENT CHARACTER}" in text
        if not ended_within_a_character:
            assert second.stats.cached_tokens >= known - (reply[-1] in runtime.prompting.end_ids)
            assert b"".join(map(runtime.tokenizer.token_bytes, ids)) == b"".join(
                map(runtime.tokenizer.token_bytes, as_text)
            ), "it is the same text"
    assert otherwise >= 2, "some of these are drawn as other tokens, or this shows nothing"


def drawn_otherwise(runtime: Runtime, said: Said, salt: bytes = b"") -> tuple[list[Message], list[int], list[int]]:
    """A chat whose reply is told to have been drawn as single bytes; its prompt as text, and as it was said."""
    tokenizer, chat = runtime.tokenizer, [Message("user", "Hello there")]
    prompt = runtime.prompting.encode_chat(chat)
    pieces = [token for letter in "example" for token in tokenizer.encode(letter)]
    assert pieces != tokenizer.encode("example")
    said.add(prompt, pieces, salt)
    chat += [Message("assistant", "example"), Message("user", "Why?")]
    whole = tokenizer.encode("example")
    text = runtime.prompting.encode_chat(chat)
    place = next(at for at in range(len(text)) if text[at : at + len(whole)] == whole)
    return chat, text, [*text[:place], *pieces, *text[place + len(whole) :]]


def test_it_is_found_in_the_same_place_of_any_later_chat(runtime: Runtime) -> None:
    said = Said(runtime.tokenizer)
    chat, text, drawn = drawn_otherwise(runtime, said)
    assert said.as_said(text, b"") == drawn
    longer = [*chat, Message("assistant", "Because."), Message("user", "example")]
    rest = runtime.prompting.encode_chat(longer)[len(text) :]
    assert said.as_said(runtime.prompting.encode_chat(longer), b"") == [*drawn, *rest], "nobody else said it that way"


def test_nobody_else_finds_it(runtime: Runtime) -> None:
    said = Said(runtime.tokenizer)
    _, text, drawn = drawn_otherwise(runtime, said, b"key:a")
    assert said.as_said(text, b"") == said.as_said(text, b"key:b") == text
    assert said.as_said(text, b"key:a") == drawn


def test_what_is_not_a_reply_is_left_alone(runtime: Runtime) -> None:
    said = Said(runtime.tokenizer)
    prompt = runtime.prompting.encode_chat([Message("user", "Hello there")])
    broken = runtime.tokenizer.encode("é")[:1]
    for reply in ([], broken, [*runtime.tokenizer.encode("a"), min(runtime.prompting.end_ids)]):
        said.add(prompt, reply, b"")
    said.add(runtime.tokenizer.encode("no control token"), runtime.tokenizer.encode("x"), b"")
    said.add([], runtime.tokenizer.encode("x"), b"")
    assert said.as_said(prompt, b"") == prompt
    assert said.as_said([], b"") == []
    assert not said._known


def test_the_oldest_are_forgotten(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("backend.said.MOST", 33)
    said = Said(runtime.tokenizer)
    assert MOST > 33
    prompt = runtime.prompting.encode_chat([Message("user", "Hello there")])
    for word in ("example", "another", "different"):
        said.add(prompt, [token for letter in word for token in runtime.tokenizer.encode(letter)], b"")
        said.as_said(prompt, b"")
    assert 1 <= len(said._known) < 3
    kept = sum(len(before) + len(read) + len(drawn) for (_, before, read), drawn in said._known.items())
    assert kept == said._size <= 33
