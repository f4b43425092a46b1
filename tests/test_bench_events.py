"""Server-sent events: any cutting of the bytes gives the same events."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpdist.bench.events import EventParser

ENDS = ("\n", "\r\n", "\r")
LINES = st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), max_size=20)


def parse(*chunks: bytes) -> list[str]:
    parser = EventParser()
    return [data for chunk in chunks for data in parser.feed(chunk)]


@st.composite
def cut(draw: st.DrawFn, stream: bytes) -> list[bytes]:
    places = sorted(draw(st.lists(st.integers(0, len(stream)), max_size=12)))
    edges = [0, *places, len(stream)]
    return [stream[start:stop] for start, stop in pairwise(edges)]


@given(data=st.data(), events=st.lists(st.lists(LINES, min_size=1, max_size=3)), end=st.sampled_from(ENDS))
def test_any_cutting_gives_back_the_events(data: st.DataObject, events: list[list[str]], end: str) -> None:
    text = "".join("".join(f"data: {line}{end}" for line in event) + end for event in events)
    chunks = data.draw(cut(text.encode()))
    assert parse(*chunks) == ["\n".join(event) for event in events]


@given(data=st.data(), stream=st.binary(max_size=200) | st.text("dat:a \r\nx\ufeff").map(str.encode))
def test_any_cutting_of_any_bytes_gives_the_same(data: st.DataObject, stream: bytes) -> None:
    whole = parse(stream)
    assert parse(*data.draw(cut(stream))) == whole
    assert parse(*(bytes([byte]) for byte in stream)) == whole


@pytest.mark.parametrize(
    ("stream", "expected"),
    [
        ("data: a\n\ndata: b\n\n", ["a", "b"]),
        ("data:a\n\n", ["a"]),
        ("data:  a\n\n", [" a"]),
        ("data: a\ndata: b\n\n", ["a\nb"]),
        ("data\n\n", [""]),
        ("data: a: b\n\n", ["a: b"]),
        (": keep-alive\n\ndata: a\n\n", ["a"]),
        ("event: x\nid: 1\nretry: 5\ndata: a\n\n", ["a"]),
        ("event: x\n\n", []),
        ("database: a\n\n", []),
        ("\ufeffdata: a\n\n", ["a"]),
        ("\n\n\ndata: a\n\n\n\n", ["a"]),
        ("data: a\r\rdata: b\r\n\r\n", ["a", "b"]),
        ("data: never ended\n", []),
        ("data: [DONE]\n\n", ["[DONE]"]),
    ],
)
def test_each_rule_of_the_format_holds(stream: str, expected: list[str]) -> None:
    assert parse(stream.encode()) == expected


def test_an_event_is_there_as_soon_as_its_last_byte() -> None:
    parser = EventParser()
    assert parser.feed(b"data: a\r\n") == []
    assert parser.feed(b"\r") == ["a"]
    assert parser.feed(b"\ndata: b\n") == []
    assert parser.feed(b"\n") == ["b"]


def test_bytes_that_are_no_text_do_not_end_the_stream() -> None:
    assert parse(b"data: \xff\n\ndata: b\n\n") == ["\ufffd", "b"]
