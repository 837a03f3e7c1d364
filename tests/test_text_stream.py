"""Text that is safe to show: any cutting of the bytes gives the whole-text answer; nothing waits without a reason."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backend.text.stream import TextStream

TEXTS = st.one_of(st.text(alphabet="ab#\n", max_size=30), st.text(alphabet="aé漢🙂\u0301 b", max_size=20), st.text())
STOPS = st.lists(st.one_of(st.text(alphabet="ab#\n", max_size=4), st.text(alphabet="é漢🙂b", max_size=3)), max_size=4)


def whole_text_answer(text: str, stops: list[str]) -> str:
    """The definition: everything before the place where a stop string first begins."""
    found = [text.index(stop) for stop in stops if stop and stop in text]
    return text[: min(found)] if found else text


def cut(data: bytes, sizes: list[int]) -> list[bytes]:
    pieces, at = [], 0
    for size in sizes:
        pieces.append(data[at : at + size])
        at += size
    return [*pieces, data[at:]]


@settings(max_examples=400, deadline=None)
@given(text=TEXTS, stops=STOPS, sizes=st.lists(st.integers(0, 5), max_size=40))
def test_any_cutting_gives_the_whole_text_answer(text: str, stops: list[str], sizes: list[int]) -> None:
    stream, shown = TextStream(stops), ""
    expected = whole_text_answer(text, stops)
    for piece in cut(text.encode("utf-8", "replace"), sizes):
        shown += stream.push(piece)
        assert expected.startswith(shown), "something was shown that has to be taken back"
    shown += stream.flush()
    assert shown == whole_text_answer(text.encode("utf-8", "replace").decode(), stops)
    assert stream.stopped == any(stop and stop in text for stop in stops)
    assert stream.push(b"more") == "" or not stream.stopped


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=40), sizes=st.lists(st.integers(0, 3), max_size=40))
def test_invalid_bytes_become_what_replace_makes_of_them(data: bytes, sizes: list[int]) -> None:
    stream = TextStream()
    assert "".join(map(stream.push, cut(data, sizes))) + stream.flush() == data.decode("utf-8", "replace")


@settings(max_examples=300, deadline=None)
@given(text=TEXTS, stops=STOPS)
def test_only_what_may_be_part_of_a_stop_string_is_held(text: str, stops: list[str]) -> None:
    stream, shown, stops = TextStream(stops), "", [stop for stop in stops if stop]
    data = text.encode("utf-8", "replace")
    text = data.decode()
    for at, letter in enumerate(text, 1):
        shown += stream.push(letter.encode())
        if stream.stopped:
            return
        waiting = text[len(shown) : at]
        # Held text begins with something that may yet grow into a stop string, or with one that is already complete
        # while a longer one that began earlier is not decided: in both cases it begins with a stop's beginning.
        assert not waiting or any(stop.startswith(waiting) for stop in stops)
    assert shown + stream.flush() == whole_text_answer(text, stops)


def test_a_character_in_parts_waits_and_comes_whole() -> None:
    stream = TextStream()
    assert [stream.push(bytes([byte])) for byte in "🙂é".encode()] == ["", "", "", "🙂", "", "é"]


def test_no_more_than_three_bytes_of_a_character_wait() -> None:
    stream = TextStream()
    assert stream.push(b"\xf0\x9f\x99") == ""
    assert stream.push(b"a") == "\ufffda"
    stream.push(b"\xf0\x9f\x99")
    assert stream.flush() == "\ufffd"


@pytest.mark.parametrize("pieces", [["a", "b", "c"], ["ab", "c"], ["abc"]])
def test_a_longer_stop_that_began_earlier_counts(pieces: list[str]) -> None:
    stream = TextStream(("abc", "b"))
    assert "".join(stream.push(piece.encode()) for piece in pieces) + stream.flush() == ""
    assert stream.stopped


def test_the_shorter_stop_counts_when_the_longer_one_does_not_come() -> None:
    stream = TextStream(("abc", "b"))
    assert stream.push(b"ab") == ""
    assert stream.push(b"x") == "a"
    assert stream.stopped
    stream = TextStream(("abc", "b"))
    stream.push(b"ab")
    assert stream.flush() == "a"
    assert stream.stopped


def test_nothing_comes_out_after_a_stop() -> None:
    stream = TextStream(("###",))
    assert stream.push(b"ok ## ") == "ok ## "
    assert stream.push(b"##") == ""
    assert stream.push(b"#") == ""
    assert stream.stopped
    assert stream.push(b"later") == ""
    assert stream.flush() == ""
