"""Which turns of a chat are read when it has outgrown the context: by the rules, and on a real tokenizer and engine."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from backend.context import Fitted, fit_chat, reply_room
from backend.errors import ContextLengthError
from backend.params import GenerationParams
from backend.text.messages import Message
from tests.real import read, tiny_runtime


def encode(messages: Sequence[Message]) -> list[int]:
    """A format in which a message is its words, two tokens around them, and three that open a reply."""
    ids: list[int] = []
    for message in messages:
        ids += [1, *(len(word) for word in message.content.split()), 2]
    return [*ids, 3, 3, 3]


def size(message: Message) -> int:
    return len(message.content.split()) + 3


def turns(*lengths: int, system: int = 0) -> list[Message]:
    """A chat of messages with so many words, a person's first."""
    head = [Message("system", "s " * system)] if system else []
    return head + [Message("assistant" if n % 2 else "user", f"m{n} " * words) for n, words in enumerate(lengths)]


def fit(messages: Sequence[Message], context: int = 100, max_tokens: int = 10) -> Fitted:
    return fit_chat(messages, encode, size, context, max_tokens)


def test_what_fits_is_read_whole() -> None:
    chat = turns(20, 20, 20, system=5)
    assert fit(chat) == Fitted(encode(chat), 0)


def test_room_for_the_reply() -> None:
    assert reply_room(2048, 100) == 100
    assert reply_room(2048, 1024) == 512, "a long reply is asked for by default; it does not halve the chat"
    assert reply_room(2048, 0) == 512
    assert reply_room(2, 0) == 1
    chat = turns(20, 20, 20, 15)[:3]
    assert fit(chat, context=79).left_out == 0  # 69 tokens, and ten for the reply
    assert fit(chat, context=78).left_out == 2


def test_the_oldest_turns_go_and_the_system_prompt_stays() -> None:
    chat = turns(30, 30, 10, 10, 10, system=8)
    fitted = fit(chat)
    assert fitted.left_out == 2
    assert fitted.ids == encode([chat[0], *chat[3:]])


def test_what_is_read_begins_with_a_person() -> None:
    chat = [Message("system", "s"), Message("assistant", "hello"), *turns(30, 30, 30, 30, 5)]
    fitted = fit(chat)
    assert chat[1 + fitted.left_out].role == "user"
    assert fitted.ids == encode([chat[0], *chat[1 + fitted.left_out :]])


def test_a_chat_that_cannot_fit_is_refused_with_both_counts() -> None:
    chat = turns(30, 30, 120, system=8)
    with pytest.raises(ContextLengthError) as caught:
        fit(chat)
    tokens = len(encode([chat[0], chat[-1]]))
    assert caught.value.extra == {"n_prompt_tokens": tokens, "n_ctx": 100}
    assert str(tokens) in caught.value.message
    assert "100" in caught.value.message
    with pytest.raises(ContextLengthError):
        fit([Message("system", "s " * 200)])


def test_the_last_message_may_take_the_room_of_the_reply() -> None:
    chat = turns(30, 30, 93)
    assert len(encode(chat[2:])) == 98
    assert fit(chat) == Fitted(encode(chat[2:]), 2)


def test_turns_are_left_out_in_steps() -> None:
    """While a chat grows, its beginning stays the same for many turns, so it is found in the cache."""
    chance = random.Random(3)
    chat = [Message("system", "be brief")]
    places: list[int] = []
    for turn in range(200):
        chat.append(Message("user", f"u{turn} " * chance.randint(1, 12)))
        fitted = fit(chat, context=400, max_tokens=50)
        assert len(fitted.ids) <= 350
        places.append(fitted.left_out)
        chat.append(Message("assistant", f"a{turn} " * chance.randint(1, 30)))
    assert places == sorted(places), "what was left out stays out"
    assert places[-1] > 300
    moves = sum(a != b for a, b in zip(places, places[1:]))
    assert moves <= 45, f"{moves} of 199 turns began anew"


def test_an_edit_gets_the_place_of_its_own_turns() -> None:
    long = turns(*[20] * 9)
    assert fit(long).left_out > 0
    assert fit([*long[:2], Message("user", "instead")]).left_out == 0


def test_sizes_that_are_wrong_never_let_too_much_in() -> None:
    for wrong in (0.1, 0.5, 3.0):
        fitted = fit_chat(turns(*[9] * 31), encode, lambda m: int(wrong * size(m)), 100, 10)
        assert len(fitted.ids) <= 90
        assert fitted.left_out % 2 == 0


def test_a_reply_that_is_to_be_continued_stays_with_its_question() -> None:
    chat = turns(40, 40, 20, 20)
    fitted = fit(chat)
    assert fitted.ids == encode(chat[2:])


# on a real tokenizer ----------------------------------------------------------------------------------------------


def test_on_a_model(tiny_path) -> None:
    runtime = tiny_runtime(tiny_path(), context=256, weights="f32")
    try:
        params = GenerationParams(max_tokens=2, temperature=0.0)
        chat = [Message("system", "Be brief.")]
        evaluated = []
        for turn in range(24):
            chat.append(Message("user", f"hello {turn}"))
            generation = runtime.start_chat(chat, params, trim=True)
            text, _, last = read(generation)
            assert last.error is None
            kept = [chat[0], *chat[1 + generation.left_out :]]
            assert list(generation.prompt_ids) == runtime.prompting.encode_chat(kept)
            assert kept[1].role == "user"
            assert last.stats.prompt_tokens + 2 <= 256
            evaluated.append(last.stats.evaluated_tokens)
            chat.append(Message("assistant", text))
        assert generation.left_out > 4
        assert sum(count > 60 for count in evaluated) <= 8, f"read anew too often: {evaluated}"
        with pytest.raises(ContextLengthError, match="the context holds 256"):
            runtime.start_chat(chat, params)
        with pytest.raises(ContextLengthError, match="system prompt and the last message"):
            runtime.start_chat([*chat, Message("user", "x" * 300)], params, trim=True)
    finally:
        runtime.close(drain=False)


def test_the_size_of_a_message_is_rather_too_much(tiny_path) -> None:
    runtime = tiny_runtime(tiny_path(), context=256)
    try:
        prompting = runtime.prompting
        size_of, chat = prompting.message_size, []
        more = 0
        for number, role in enumerate(["user", "assistant"] * 4):
            before = len(prompting.encode_chat(chat, generation_prompt=False)) if chat else 0
            chat.append(Message(role, f"hello world {number} \u00e4\U0001f600"))  # type: ignore[arg-type]
            added = len(prompting.encode_chat(chat, generation_prompt=False)) - before
            assert abs(size_of(chat[-1]) - added) <= 4, "the two roles' names differ by five letters"
            more += size_of(chat[-1]) - added
        assert 0 <= more <= 16
    finally:
        runtime.close(drain=False)
