"""The tree of turns: what is shown, what is kept, what is asked."""

import pytest

from backend.text.messages import Message
from ui.conversation import Conversation, Turn


def texts(conversation: Conversation) -> list[str]:
    return [turn.text for turn in conversation.path()]


def talk(*lines: str) -> Conversation:
    """A conversation whose turns alternate between the person and the model."""
    conversation = Conversation()
    for place, line in enumerate(lines):
        if place % 2 == 0:
            conversation.add_user(line)
        else:
            conversation.open_reply().text = line
    return conversation


def test_an_empty_conversation() -> None:
    conversation = Conversation()
    assert conversation.path() == []
    assert conversation.last() is None
    assert conversation.messages() == []


def test_messages_carry_the_system_prompt_first_and_exact_texts() -> None:
    conversation = talk("  hi\n", "hello ")
    conversation.system = "Be brief."
    assert conversation.messages() == [
        Message("system", "Be brief."),
        Message("user", "  hi\n"),
        Message("assistant", "hello "),
    ]
    conversation.system = "  \n"
    assert conversation.messages()[0].role == "user"


def test_a_new_reply_keeps_the_earlier_version() -> None:
    conversation = talk("q", "first")
    second = conversation.open_reply()
    second.text = "second"
    assert texts(conversation) == ["q", "second"]
    assert conversation.versions(second) == (2, 2)
    shown = conversation.step(second, -1)
    assert shown.text == "first"
    assert texts(conversation) == ["q", "first"]
    assert conversation.step(shown, -1) is shown
    assert conversation.step(shown, 5).text == "second"


def test_an_edit_truncates_what_is_shown_and_keeps_the_rest() -> None:
    conversation = talk("q1", "a1", "q2", "a2")
    edited = conversation.edit_user(0, "q1 better")
    assert texts(conversation) == ["q1 better"]
    conversation.open_reply().text = "a1 better"
    assert texts(conversation) == ["q1 better", "a1 better"]
    conversation.step(edited, -1)
    assert texts(conversation) == ["q1", "a1", "q2", "a2"]


def test_discarding_shows_the_version_before() -> None:
    conversation = talk("q", "a")
    failed = conversation.open_reply()
    conversation.discard(failed)
    assert texts(conversation) == ["q", "a"]
    added = conversation.add_user("more")
    conversation.discard(added)
    assert texts(conversation) == ["q", "a"]
    only = talk("x")
    turn = only.last()
    assert turn is not None
    only.discard(turn)
    assert only.path() == []


def test_discarding_goes_back_to_the_version_that_was_shown() -> None:
    conversation = talk("q", "a")
    for text in ("b", "c"):
        conversation.open_reply().text = text
    last = conversation.last()
    assert last is not None
    conversation.step(last, -2)
    assert texts(conversation) == ["q", "a"]
    conversation.discard(conversation.open_reply())
    assert texts(conversation) == ["q", "a"]


def test_what_makes_no_sense_is_refused() -> None:
    conversation = talk("q", "a")
    with pytest.raises(ValueError, match="only a person's own"):
        conversation.edit_user(1, "x")
    with pytest.raises(ValueError, match="no turn 2"):
        conversation.edit_user(2, "x")
    with pytest.raises(ValueError, match="no message to answer"):
        Conversation().open_reply()
    with pytest.raises(ValueError, match="not part"):
        conversation.discard(Turn("user", "stray"))


def test_a_long_chat_does_not_recurse() -> None:
    conversation = talk(*(str(i) for i in range(4000)))
    assert len(conversation.path()) == 4000
    assert len(conversation.messages()) == 4000


def test_what_the_newest_reply_was_made_without() -> None:
    conversation = Conversation()
    conversation.system = "be brief"
    for number in range(3):
        conversation.add_user(f"question {number}")
        conversation.open_reply().text = f"answer {number}"
    assert conversation.left_out() == 0
    assert conversation.messages_read() == conversation.messages()
    last = conversation.last()
    assert last is not None
    last.left_out = 2
    assert conversation.left_out() == 2
    read = conversation.messages_read()
    assert read[0].content == "be brief"
    assert read[1].content == "question 1"
    assert len(read) == 5
    conversation.add_user("one more")
    assert conversation.left_out() == 2, "until its reply says otherwise"
    conversation.edit_user(2, "another question")
    assert conversation.left_out() == 0, "a branch has its own"
