"""The side form of streams: taken apart however it arrives, and refused when it is none."""

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mainsail_gateway.journal import Journal
from mainsail_gateway.upstream import UpstreamError

PIECES = [
    (b" 0=504@96,9106", b'data: {"a": 1}\n\n'),
    (b" 0=30 1=7@0", b"data: two\n\ndata: events\n\n"),
    (b"", b":ids 4 inside an event\n\n"),
    (b" 1=. 0=31,32.", b"data: last\n\n"),
    (b"", b"data: usage\n\ndata: [DONE]\n\n"),
]
WIRE = b"".join(b":ids %d%b\n%b" % (len(piece), notes, piece) for notes, piece in PIECES)
CONFIRMED = [(b"content-type", b"text/event-stream"), (b"x-mainsail-stream", b"ids id=chatcmpl-1 created=17")]


def journal() -> Journal:
    found = Journal.of(CONFIRMED)
    assert found is not None
    return found


@given(st.lists(st.integers(0, len(WIRE)), max_size=12))
def test_the_same_however_it_is_cut(cuts):
    places = [0, *sorted(cuts), len(WIRE)]
    seen = journal()
    passed = b"".join(seen.feed(WIRE[a:b]) for a, b in pairwise(places))
    assert passed == b"".join(piece for _, piece in PIECES)
    seen.end()
    assert seen.choices() == {
        0: {"token_ids": [504, 9106, 30, 31, 32], "num_cached_tokens": 96, "finished": True},
        1: {"token_ids": [7], "num_cached_tokens": 0, "finished": True},
    }


@given(st.integers(0, len(WIRE) - 1))
def test_what_was_passed_is_what_was_noted(cut):
    """At any moment: whole pieces, and their tokens; the rest of a piece is forgotten when the engine breaks."""
    seen = journal()
    passed = seen.feed(WIRE[:cut])
    whole = [piece for _, piece in PIECES]
    count = next(n for n in range(len(whole) + 1) if b"".join(whole[:n]) == passed)
    seen.broken()
    again = journal()
    again.feed(WIRE[: sum(len(b":ids %d%b\n%b" % (len(p), n, p)) for n, p in PIECES[:count])])
    assert seen.choices() == again.choices()
    if not seen.complete:
        with pytest.raises(UpstreamError, match="truncated"):
            seen.end()


def test_resume_says_who_and_what():
    seen = journal()
    seen.feed(WIRE[:110])
    said = json.loads(seen.resume(1.23456))
    assert (said["id"], said["created"], said["elapsed_s"]) == ("chatcmpl-1", 17, 1.235)
    assert said["choices"]["0"]["token_ids"] == [504, 9106, 30]


def test_handover_comes_after_what_was_before_it():
    seen = journal()
    first = b":ids 4 0=1@0\nabcd"
    assert seen.feed(first + b":handover shutting_down\n\n") == b"abcd"
    with pytest.raises(UpstreamError, match="handover: shutting_down"):
        seen.end()


@pytest.mark.parametrize(
    "data", [b"data: x\n\n", b":ids x\n", b":ids -1\n", b":ids 999999999 0=1\n", b"\n", b": ping\n"]
)
def test_garbage_is_no_piece(data):
    with pytest.raises(UpstreamError, match="garbage"):
        journal().feed(data)


@pytest.mark.parametrize(
    "value", [b"", b"ids", b"ids id=a b created=1", b"ids id=a created=x", b"ids id=\xff created=1"]
)
def test_an_engine_that_does_not_confirm_is_not_followed(value):
    assert Journal.of([(b"x-mainsail-stream", value)]) is None


def test_notes_do_not_pile_up():
    seen = journal()
    for token in range(2000):
        seen.feed(b":ids 1 0=%d\nx" % token)
    assert len(seen._notes) <= 300
    assert seen.choices()[0]["token_ids"] == list(range(2000))


def test_a_stream_without_done_says_its_end() -> None:
    journal = Journal("resp_1", 5)
    assert journal.feed(b":ids 11 0=7\ndata: one\n\n:en") == b"data: one\n\n"
    assert not journal.complete
    assert journal.feed(b"d\n") == b""
    journal.end()
    assert journal.complete
