"""Guesses from a request's own text."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mainsail_engine.request import Request, SamplingParams
from mainsail_engine.speculative.ngram import NgramIndex, NgramSource

TEXTS = st.lists(st.integers(0, 3), max_size=60)


def slow_guess(tokens: list[int], min_n: int, max_n: int) -> int | None:
    """What followed the longest run of last tokens where it stood last before."""
    for n in range(max_n, min_n - 1, -1):
        for end in range(len(tokens) - 1, n - 1, -1):
            if tokens[end - n : end] == tokens[-n:]:
                return tokens[end]
    return None


def test_what_followed_before_is_guessed() -> None:
    index = NgramIndex([9, 1, 2, 3, 4, 5, 6, 7, 1, 2], 2, 4)
    assert index.guesses(3) == [3, 4, 5]
    assert index.extend(3) is True
    assert index.extend(9) is False
    assert not index.has_guess
    assert index.extend(1) is None


def test_a_loop_goes_on_beyond_the_end_of_the_text() -> None:
    assert NgramIndex([7, 1, 2, 1, 2, 1, 2], 2, 2).guesses(5) == [1, 2, 1, 2, 1]
    assert NgramIndex([5] * 4, 3, 3).guesses(4) == [5] * 4


@given(tokens=TEXTS, min_n=st.integers(1, 3), more=st.integers(0, 3))
def test_a_fresh_guess_is_that_of_the_longest_match(tokens: list[int], min_n: int, more: int) -> None:
    index = NgramIndex([], min_n, min_n + more)
    for length, token in enumerate(tokens):
        before = index.guesses(1)
        hit = index.extend(token)
        assert hit is (None if not before else before == [token])
        if not hit:  # no run of right guesses is being followed
            guess = slow_guess(tokens[: length + 1], min_n, min_n + more)
            assert index.guesses(1) == ([] if guess is None else [guess])


@given(tokens=TEXTS, count=st.integers(1, 20))
def test_guesses_are_what_the_index_would_guess_if_they_came_true(tokens: list[int], count: int) -> None:
    index = NgramIndex(tokens, 2, 3)
    for guess in index.guesses(count):
        assert index.guesses(1) == [guess]
        assert index.extend(guess) is True


@given(tokens=TEXTS, min_n=st.integers(1, 3), more=st.integers(0, 3))
def test_a_text_indexed_at_once_is_as_token_by_token(tokens: list[int], min_n: int, more: int) -> None:
    slow = NgramIndex([], min_n, min_n + more)
    for token in tokens:
        slow.extend(token)
    slow.catch_up()
    fast = NgramIndex(tokens, min_n, min_n + more)
    assert fast._ends == slow._ends
    assert (fast._window, fast._tokens) == (slow._window, slow._tokens)


@given(tokens=TEXTS, min_n=st.integers(1, 3), more=st.integers(0, 3), every=st.integers(1, 7))
def test_when_the_table_is_brought_up_changes_no_guess(tokens: list[int], min_n: int, more: int, every: int) -> None:
    at_once, late = NgramIndex([], min_n, min_n + more), NgramIndex([], min_n, min_n + more)
    for count, token in enumerate(tokens):
        assert late.extend(token) is at_once.extend(token)
        at_once.catch_up()
        if count % every == 0:
            late.catch_up()
        assert (late.guesses(4), late.run) == (at_once.guesses(4), at_once.run)


def test_a_source_learns_whether_guesses_are_right_without_making_any() -> None:
    source = NgramSource(2, 4)
    request = Request("r", [1, 2, 3, 4, 5, 6] * 3, SamplingParams(max_tokens=200), 0.0, max_num_tokens=300)
    chances: list[float] = []
    for token in [1, 2, 3, 4, 5, 6] * 10:
        request.output_token_ids.append(token)
        source.saw(request, [token])
        source.settle()
        chances.append(source.chances(request, 16)[3])
    assert chances[-1] > 0.95 > 0.2 > chances[0]
    assert len(source.chances(request, 16)) == 16
    assert source.guess([(request, 4)]) == [[1, 2, 3, 4]]
    source.forget(request)
    assert source.chances(request, 16) == []
