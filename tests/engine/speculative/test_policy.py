"""How many guesses pay."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mainsail_engine.speculative.policy import HitRates, StepTimes, choose_lengths
from mainsail_engine.speculative.verify import right_guesses, verified_tokens

FALLING = st.lists(st.floats(0.01, 1.0), max_size=8).map(lambda row: sorted(row, reverse=True))
TOKENS = st.lists(st.integers(0, 2), max_size=8)


def measured(batch: int, plain_s: float, per_row_s: float, wait_s: float = 0.0) -> StepTimes:
    """Times of a device whose rows cost the same each."""
    times = StepTimes(1)
    times.observe(batch, batch, plain_s)
    for rows in range(batch + 1, batch + 200):
        times.observe(batch, rows, plain_s + wait_s + per_row_s * (rows - batch))
    return times


def test_free_rows_are_all_used_and_dear_ones_are_not() -> None:
    chances = [[0.9, 0.8, 0.7], [0.5, 0.2]]
    assert choose_lengths(chances, 2, measured(2, 1.0, 1e-6), max_guesses=99) == [3, 2]
    assert choose_lengths(chances, 2, measured(2, 1.0, 10.0), max_guesses=99) == [0, 0]
    assert choose_lengths(chances, 2, measured(2, 1.0, 0.25), max_guesses=99) == [3, 0]


def test_waiting_must_pay_too() -> None:
    assert choose_lengths([[0.3]], 1, measured(1, 1.0, 0.0, wait_s=0.2), max_guesses=9) == [1]
    assert choose_lengths([[0.3]], 1, measured(1, 1.0, 0.0, wait_s=0.4), max_guesses=9) == [0]


def test_nothing_is_guessed_before_a_step_without_was_measured() -> None:
    assert choose_lengths([[1.0]], 1, StepTimes(100), max_guesses=9) == [0]


def test_a_slow_draft_makes_fewer() -> None:
    times, chances = measured(1, 1.0, 0.0), [[0.9**n for n in range(1, 9)]]
    lengths = [choose_lengths(chances, 1, times, max_guesses=99, level_s=s)[0] for s in (0.0, 0.1, 0.3, 3.0)]
    assert lengths == sorted(lengths, reverse=True)
    assert (lengths[0], lengths[-1]) == (8, 0)
    assert 1 <= lengths[2] < 8


@given(st.lists(FALLING, max_size=6), st.floats(0.0, 1.0), st.integers(0, 20), st.sampled_from([0.0, 0.05]))
def test_the_choice_is_the_best_by_exhaustion(
    chances: list[list[float]], per_row_s: float, max_guesses: int, level_s: float
) -> None:
    """Against every number of best guesses up to every depth; and never more than there are."""
    batch = max(1, len(chances))
    times = measured(batch, 1.0, per_row_s)
    lengths = choose_lengths(chances, batch, times, max_guesses=max_guesses, level_s=level_s, margin=1.0)
    assert all(0 <= length <= len(row) for length, row in zip(lengths, chances, strict=True))
    assert sum(lengths) <= max_guesses

    def rate(guesses: list[float], depth: int) -> float:
        if not guesses:
            return batch / 1.0
        seconds = float(times.guessing(batch, np.array([batch + len(guesses)]))[0])
        return (batch + sum(guesses)) / (seconds + level_s * depth)

    chosen = [chance for row, length in zip(chances, lengths, strict=True) for chance in row[:length]]
    best = batch / 1.0
    for depth in range(1, 9):
        flat = sorted((chance for row in chances for chance in row[:depth]), reverse=True)[:max_guesses]
        best = max([best, *(rate(flat[:count], depth) for count in range(1, len(flat) + 1))])
    assert rate(chosen, max(lengths, default=0)) >= best - 1e-9


@given(st.lists(st.tuples(st.integers(0, 12), st.booleans()), max_size=80))
def test_chances_are_probabilities_and_fall(notes: list[tuple[int, bool]]) -> None:
    rates = HitRates((0.3, 0.6, 0.9))
    for run, hit in notes:
        rates.note(run, hit)
    chances = rates.chances(0, 16)
    assert 1 <= len(chances) <= 16
    assert all(0.0 <= chance <= 1.0 for chance in chances)
    assert chances == sorted(chances, reverse=True)


@pytest.mark.parametrize("true_chance", [0.05, 0.5, 0.97])
def test_rates_follow_what_happens(true_chance: float) -> None:
    rates, rng = HitRates((0.3, 0.6, 0.9)), random.Random(1)
    estimates: list[float] = []
    for _ in range(600):
        rates.note(0, rng.random() < true_chance)
        estimates.append(rates.chance(0))
    assert np.mean(estimates[100:]) == pytest.approx(true_chance, abs=0.05)


@given(st.integers(1, 64), st.lists(st.tuples(st.integers(1, 300), st.floats(1e-4, 1.0)), max_size=20))
def test_times_never_promise_that_guesses_cost_less_than_nothing(batch: int, steps: list[tuple[int, float]]) -> None:
    times = StepTimes(32)
    times.observe(batch, batch, 0.01)
    for more, seconds in steps:
        times.observe(batch, batch + more, seconds)
    rows = batch + np.arange(1, 500)
    seconds = times.guessing(batch, rows)
    assert (seconds >= (times.plain(batch) or 0.0)).all()
    assert (np.diff(seconds) >= -1e-12).all()


def test_one_slow_step_is_not_believed() -> None:
    times = StepTimes(32)
    for seconds in (0.01, 0.01, 5.0):
        times.observe(4, 4, seconds)
    assert (times.plain(4) or 0.0) < 0.02


@given(TOKENS, TOKENS.filter(len))
def test_tokens_stand_up_to_the_first_wrong_guess(guesses: list[int], tokens: list[int]) -> None:
    guesses = guesses[: len(tokens) - 1]
    tokens = tokens[: len(guesses) + 1]
    right = right_guesses(guesses, tokens)
    assert guesses[:right] == tokens[:right]
    assert right == len(guesses) or guesses[right] != tokens[right]
    assert verified_tokens(tokens, right) == tokens[: right + 1]


def test_a_failed_row_counts_only_where_it_is_the_next_token() -> None:
    assert verified_tokens([5, -1, 7], 1) == [5]
    assert verified_tokens([-1, 6, 7], 0) == [-1]
