"""Error sentences quote files and requests, so what they quote must not reach a terminal or a page as it is."""

from __future__ import annotations

import pytest

from backend.errors import MAX_MESSAGE, CheckpointError, UserError


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("a plain sentence, Grüße, 日本", "a plain sentence, Grüße, 日本"),
        ("two\nlines\r\nand\u2028more", "two lines and more"),
        ("tensor '\x1b[2J\x07' is odd", r"tensor '\x1b[2J\x07' is odd"),
        ("name '\u202egnp.exe'", r"name '\u202egnp.exe'"),
        ("half a \ud83d", r"half a \ud83d"),
        ("tab\there and \0", r"tab\there and \x00"),
    ],
)
def test_a_message_is_one_printable_line(said: str, shown: str) -> None:
    error = CheckpointError(said, param="x", count=1)
    assert error.message == str(error) == shown
    assert (error.param, error.extra) == ("x", {"count": 1})
    shown.encode()


def test_a_long_message_keeps_its_beginning_and_its_end() -> None:
    message = UserError("begin " + "x" * 100_000 + " end").message
    assert len(message) <= MAX_MESSAGE
    assert message.startswith("begin xx")
    assert message.endswith("xx end")
    assert UserError("x" * MAX_MESSAGE).message == "x" * MAX_MESSAGE
