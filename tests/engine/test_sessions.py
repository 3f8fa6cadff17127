"""Who comes back, and when: recognition of next turns, and forecasts from past pauses."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mainsail_engine import sessions as sessions_module
from mainsail_engine.sessions import (
    EDGES_S,
    HORIZON_S,
    MAX_ALIKE,
    STRETCHES,
    ReturnTimes,
    Session,
    SessionState,
    SessionTable,
    forecast,
    value_of_keeping,
)


class Traffic:
    """A table, and turns that begin and end."""

    def __init__(self) -> None:
        self.table, self.count = SessionTable(), 0

    def turn(self, prompt, now=0.0, *, salt="", session_id="", ends=True) -> Session:
        self.count += 1
        session = self.table.arrive(prompt, salt=salt, session_id=session_id, arrival=self.count, now=now)
        if ends:
            self.table.finished(session, len(prompt) + 5, now)
        return session


def prompt(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(1000), k=length)


@pytest.mark.parametrize("length", [16, 17, 31, 32, 100])
def test_a_prompt_that_goes_on_is_the_next_turn(length):
    traffic, first = Traffic(), prompt(0, length)
    session = traffic.turn(first)
    assert traffic.turn([*first, 1, 2, 3]) is session
    assert (session.num_turns, session.growth) == (2, 3)
    assert traffic.turn([*first, 1, 2, 4, 5]) is not session  # it went on from 1, 2, 3
    assert traffic.turn([*first, 1, 2, 3, 4]) is session


def test_what_is_no_next_turn():
    traffic, first = Traffic(), prompt(0, 40)
    session = traffic.turn(first)
    others = [
        traffic.turn(first),  # the same again
        traffic.turn([*first[:39], 9999, 7]),  # another tail
        traffic.turn([9999, *first, 7]),
        traffic.turn([*first, 7], salt="other"),
        traffic.turn(prompt(0, 15)),
    ]
    assert session not in others
    assert len({id(other) for other in others}) == 5


def test_branches_of_one_prefix_are_sessions_of_their_own_and_are_told_apart():
    traffic, stem = Traffic(), prompt(0, 100)
    branches = [traffic.turn([*stem, i], ends=False) for i in range(5)]
    for i, session in enumerate(branches):
        traffic.table.finished(session, 120, 0.0)
        assert traffic.turn([*stem, i, 50, i]) is session


def test_while_its_turn_runs_a_second_one_is_a_branch():
    traffic, first = Traffic(), prompt(0, 40)
    session = traffic.turn(first)
    assert traffic.turn([*first, 1], ends=False) is session
    assert traffic.turn([*first, 2]) is not session


def test_the_longest_known_prompt_wins():
    traffic, first = Traffic(), prompt(0, 40)
    short = traffic.turn(first)
    long = traffic.turn([*first, *prompt(1, 60)], ends=False)
    assert long is short
    other = traffic.turn(first)
    traffic.table.finished(long, 110, 0.0)
    assert traffic.turn([*first, *prompt(1, 60), 5]) is long
    assert traffic.turn([*first, 9]) is other


@pytest.mark.parametrize("order", itertools.permutations((32, 35, 40)))
def test_the_longest_wins_also_of_those_that_end_in_the_same_block(order):
    traffic, whole = Traffic(), prompt(0, 60)
    table = traffic.table
    sessions = {length: traffic.turn(whole[:length], ends=False) for length in order}
    for length in order:
        table.finished(sessions[length], length + 5, 0.0)
    assert traffic.turn(whole[:38]) is sessions[35]
    assert traffic.turn(whole[:34]) is sessions[32]
    assert traffic.turn(whole) is sessions[40]


def test_an_id_survives_a_rewritten_history():
    traffic = Traffic()
    session = traffic.turn(prompt(0, 200), session_id="run 1")
    assert traffic.turn(prompt(1, 50), session_id="run 1") is session
    assert traffic.turn([*prompt(1, 50), 1], session_id="run 1", salt="other") is not session


def test_sessions_are_forgotten():
    traffic = Traffic()
    session = traffic.turn(first := prompt(0, 40), session_id="x")
    assert traffic.table.advance(HORIZON_S - 1) == []
    assert traffic.table.advance(HORIZON_S) == [session]
    assert (session.state, traffic.table.num_sessions) == (SessionState.GONE, 0)
    assert traffic.turn([*first, 1], HORIZON_S, session_id="x") is not session


def test_the_same_prompt_again_and_again_takes_no_more_memory():
    traffic = Traffic()
    for _ in range(10 * MAX_ALIKE):
        traffic.turn(prompt(0, 40))
    assert traffic.table.num_sessions == MAX_ALIKE


def test_who_has_been_away_longest_is_forgotten_when_there_are_too_many(monkeypatch):
    monkeypatch.setattr(sessions_module, "MAX_SESSIONS", 10)
    traffic = Traffic()
    made = [traffic.turn(prompt(number, 40), now=number) for number in range(25)]
    assert [session.state is SessionState.GONE for session in made] == [True] * 15 + [False] * 10
    assert traffic.table.advance(25.0) == made[:15]


def agents(traffic: Traffic, pause, *, sessions=40, turns=6) -> Session:
    """Sessions with such pauses, one after another; the last one is between its turns."""
    session, now = None, 0.0
    for number in range(sessions):
        tokens = prompt(number, 50)
        for _ in range(turns):
            session = traffic.turn(tokens, now)
            tokens = [*tokens, *prompt(len(tokens), 20)]
            now += pause()
            traffic.table.advance(now)
    assert session is not None
    return session


def test_where_nobody_returns_nothing_is_kept():
    traffic = Traffic()
    for number in range(300):
        traffic.turn(prompt(number, 40), now=number)
        traffic.table.advance(number)
    session = traffic.turn(prompt(999, 40), now=301)
    assert traffic.table.forecast(session, threshold=1e-6).keep_s == 0


def test_short_tools_are_waited_for_and_not_much_longer():
    rng = random.Random(1)
    session = agents(traffic := Traffic(), lambda: rng.uniform(0.1, 1.0))
    assert 1.0 <= traffic.table.forecast(session, threshold=0.05).keep_s <= 3.0


def test_a_large_pool_waits_longer_than_a_small_one():
    rng = random.Random(1)
    session = agents(traffic := Traffic(), lambda: rng.choice((0.3, 0.6, 5.0, 25.0)))
    lives = [traffic.table.forecast(session, threshold).keep_s for threshold in (1.0, 0.1, 0.01)]
    assert lives == sorted(lives)
    assert lives[0] <= 1.0 < 20.0 <= lives[-1]


def test_a_tool_that_takes_half_a_minute_is_fetched_for_rather_than_waited_for():
    session = agents(traffic := Traffic(), lambda: 32.0)
    forecast = traffic.table.forecast(session, threshold=0.05)
    assert forecast.keep_s == 0
    assert forecast.fetch_s is not None
    assert 10 <= forecast.fetch_s <= 32


def test_who_stays_away_longer_than_anybody_did_is_taken_for_ended():
    for slow, is_last in ((0.6, True), (45.0, False)):
        pauses = itertools.cycle([0.3, 0.6, 0.2, slow])
        session = agents(traffic := Traffic(), lambda pauses=pauses: next(pauses))
        assert traffic.table.forecast(session, threshold=0.05).is_last is is_last


def test_a_sessions_own_past_counts():
    times = ReturnTimes()
    for _ in range(100):
        times.came_back(3)
    general, own = times.hazards(), times.hazards([9] * 8)
    assert general[3] > 0.9
    assert own[3] < general[3]
    assert own[9] > 0.4 > general[9]


hazards = st.lists(st.floats(0, 1), min_size=STRETCHES, max_size=STRETCHES)


@given(hazards, st.integers(0, STRETCHES - 1))
def test_the_value_of_keeping_is_that_of_the_best_end(values, stretch):
    """At least what the first stretch alone gives, at most what the best stretch alone would."""
    rates = [h / ((EDGES_S[i + 1] - EDGES_S[i]) * (1 - h / 2)) for i, h in enumerate(values)]
    value = value_of_keeping(values, stretch)
    assert rates[stretch] - 1e-9 <= value <= max(rates[stretch:]) + 1e-9


@given(hazards, st.floats(1e-4, 10))
def test_a_higher_threshold_never_keeps_longer(values, threshold):
    low, high = forecast(values, threshold), forecast(values, threshold * 2)
    assert low.keep_s >= high.keep_s
    assert low.fetch_s is None or low.fetch_s >= low.keep_s
