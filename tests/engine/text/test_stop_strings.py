from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mainsail_engine.text.stop_strings import StopStrings


def run(pieces: list[str], stops: list[str], include: bool = False) -> tuple[str, str | None]:
    stream = StopStrings(stops, include=include)
    shown = ""
    for piece in pieces:
        shown += stream.feed(piece)
        if stream.matched is not None:
            return shown, stream.matched
    return shown + stream.flush(), None


@pytest.mark.parametrize(
    ("text", "stops", "shown", "matched"),
    [
        ("hello world", ["wor"], "hello ", "wor"),
        ("hello world", ["x"], "hello world", None),
        ("aab", ["ab"], "a", "ab"),
        ("abc", ["bc", "b"], "a", "b"),
        ("xyz", ["yz", "z"], "x", "yz"),
        ("ending in a beginning: ST", ["STOP"], "ending in a beginning: ST", None),
        ("日本語", ["本"], "日", "本"),
        ("", ["a"], "", None),
        ("no stops", [], "no stops", None),
    ],
)
def test_what_is_shown(text: str, stops: list[str], shown: str, matched: str | None) -> None:
    assert run([text], stops) == (shown, matched)
    assert run(list(text), stops) == (shown, matched)


def test_the_stop_may_be_included() -> None:
    assert run(["a ST", "OP b"], ["STOP"], include=True) == ("a STOP", "STOP")


def test_text_is_not_held_back_longer_than_needed() -> None:
    stream = StopStrings(["STOP"])
    assert stream.feed("abcS") == "abc"
    assert stream.feed("x") == "Sx"


@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3), st.data())
def test_however_it_is_cut(text: str, stops: list[str], data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)))) | {0, len(text)})
    pieces = [text[a:b] for a, b in itertools.pairwise(cuts)]
    whole, characters, cut = run([text], stops), run(list(text), stops), run(pieces, stops)
    assert whole == characters == cut
    assert all(stop not in whole[0] for stop in stops)
    assert text.startswith(whole[0])
