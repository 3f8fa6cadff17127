"""Conversations: who comes back, where there is room, who is held and who is let in."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mainsail_gateway import sessions
from mainsail_gateway.balance import Load
from mainsail_gateway.request import Chain
from mainsail_gateway.sessions import MAX_HOLD_S, NOTHING, Sessions, State

POOL = 10_000


def link(name: str, turn: int, tokens: int, system: int = 0) -> Chain:
    """The request of a conversation's turn: it begins with all before it."""
    return Chain(tuple(f"{name}{n}".encode() for n in range(turn + 1)), tokens, b"system", system)


def pool(*names: str, kv_tokens: int = POOL, busy: bool = True) -> dict[str, Load]:
    """Replicas that have enough to compute not to take a turn there is no room for."""
    return {name: Load(name, 0.0, kv_tokens=kv_tokens, prefill=5000 if busy else 0) for name in names}


def known(session: sessions.Session) -> sessions.Known:
    return NOTHING


def turn(policy: Sessions, name: str, number: int, tokens: int, now: float, at: str = "a") -> sessions.Session:
    """A whole turn of a conversation."""
    session = policy.arrive(link(name, number, tokens), now)
    policy.begin(session, at)
    policy.end(session, 0, now)
    return session


def test_the_next_turn_is_known_by_the_messages_before_it():
    policy = Sessions()
    first = turn(policy, "x", 0, 1000, 0.0)
    other = policy.arrive(link("y", 0, 1000), 1.0)
    again = policy.arrive(link("x", 3, 1500), 1.0)
    assert again is first
    assert other is not first
    assert (again.growth, again.home) == (500, "a")


def test_a_branch_of_a_running_conversation_is_one_of_its_own():
    policy = Sessions()
    first = policy.arrive(link("x", 1, 1000), 0.0)
    policy.begin(first, "a")
    assert policy.arrive(link("x", 2, 1200), 0.1) is not first


def test_a_live_conversation_goes_on_at_its_home_though_that_is_full():
    policy, loads = Sessions(), pool("a", "b")
    mine = turn(policy, "x", 0, 9000, 0.0)
    turn(policy, "y", 0, 5000, 0.0)
    assert policy.arrive(link("x", 1, 9000), 1.0) is mine
    assert policy.fits(mine, loads.values(), 1.0) == {"a"}


def test_a_new_one_goes_where_there_is_room_and_waits_where_there_is_none():
    policy, loads = Sessions(), pool("a", "b")
    turn(policy, "x", 0, 8000, 0.0, "a")
    new = policy.arrive(link("n", 0, 3000), 0.0)
    assert policy.fits(new, loads.values(), 0.0) == {"b"}
    turn(policy, "y", 0, 8000, 0.0, "b")
    assert policy.fits(new, loads.values(), 0.0) == frozenset()


def test_no_replica_idles_while_somebody_is_held():
    policy, loads = Sessions(), pool("a", busy=False)
    turn(policy, "x", 0, 9000, 0.0)
    new = policy.arrive(link("n", 0, 3000), 0.0)
    assert policy.fits(new, loads.values(), 0.0) == {"a"}


def test_what_engines_say_bounds_what_a_gateway_cannot_see():
    policy, loads = Sessions(), pool("a")
    new = policy.arrive(link("n", 0, 3000), 0.0)
    assert policy.fits(new, loads.values(), 0.0)
    loads["a"].resident, loads["a"].observed = 9000, 0.0
    assert not policy.fits(new, loads.values(), 1.0)
    assert policy.fits(new, loads.values(), 60.0), "what it said a minute ago counts no more"


def test_a_shared_system_prompt_counts_once():
    policy, loads = Sessions(), pool("a")
    for name in "uvwxyz":
        session = policy.arrive(link(name, 0, 2000, system=1800), 0.0)
        policy.begin(session, "a")
        policy.end(session, 0, 0.0)
    assert policy.live(loads["a"], 0.0) == 1800 + 6 * 200


def test_a_prompt_that_is_cached_goes_there_room_or_not():
    policy, loads = Sessions(), pool("a", "b")
    for name, at in (("x", "a"), ("y", "b")):
        turn(policy, name, 0, 9000, 0.0, at)
    new = policy.arrive(link("n", 0, 3000), 0.0)
    assert policy.fits(new, loads.values(), 0.0, {"b": 2900}) == {"b"}
    assert policy.fits(new, loads.values(), 0.0, {"b": 1000}) == frozenset()


@pytest.mark.parametrize("tokens", [sessions.LEAST_TOKENS - 1, 5000])
def test_short_prompts_and_engines_that_say_nothing_are_never_held(tokens: int):
    policy, loads = Sessions(), pool("a", kv_tokens=POOL if tokens < 1000 else 0)
    turn(policy, "x", 0, 9990, 0.0)
    assert policy.fits(policy.arrive(link("n", 0, tokens), 0.0), loads.values(), 0.0) is None


def test_paused_ones_go_before_new_ones_and_the_first_of_them_first():
    policy, loads = Sessions(), pool("a")
    old, middle = (turn(policy, name, 0, 1000, 0.0) for name in "om")
    policy.advance(loads, 200.0)
    assert (old.state, middle.state) == (State.PAUSED, State.PAUSED)
    turn(policy, "x", 0, 9500, 200.0)
    for name, number in (("n", 0), ("m", 1), ("o", 1)):
        session = policy.arrive(link(name, number, 1000), 200.0)
        assert policy.fits(session, loads.values(), 200.0) == frozenset()
        policy.hold(session, 0, 200.0)
    high = policy.arrive(link("h", 0, 1000), 200.0)
    policy.hold(high, 100, 200.0)
    assert [session.key for session in policy.held] == [b"h0", b"o1", b"m1", b"n0"]
    assert policy.next(loads.values(), 200.0, known) is None
    assert policy.kv_tokens()["held"] == sum(session.wanted for session in policy.held)


def test_the_youngest_make_room_when_turns_grow():
    policy, loads = Sessions(), pool("a")
    first, second, third = (turn(policy, name, 0, 3500, 0.0) for name in "xyz")
    policy.advance(loads, 0.1)
    assert [s.state for s in (first, second, third)] == [State.LIVE, State.LIVE, State.PAUSED]
    assert policy.num_parked == 1
    assert policy.kv_tokens()["parked"] == third.wanted
    assert policy.live(loads["a"], 0.1) == 7000
    policy.advance(loads, 1000.0)
    assert policy.num_parked == 0, "nobody waits for it for ever"


def test_who_was_held_too_long_is_let_in_where_most_room_is():
    policy, loads = Sessions(), pool("a", "b")
    for name, tokens, at in (("x", 9900, "a"), ("y", 9700, "b")):
        session = policy.arrive(link(name, 0, tokens), 0.0)
        policy.begin(session, at)
    new = policy.arrive(link("n", 0, 5000), 0.0)
    policy.hold(new, 0, 0.0)
    assert policy.next(loads.values(), MAX_HOLD_S - 0.1, known) is None
    assert policy.next(loads.values(), MAX_HOLD_S, known) == (new, {"b"})


def test_an_endpoint_that_is_gone_holds_nobody_back():
    policy, loads = Sessions(), pool("b")
    mine = turn(policy, "x", 0, 1000, 0.0, "a")
    policy.advance(loads, 0.1)
    assert mine.state is State.PAUSED
    assert policy.fits(policy.arrive(link("x", 1, 1100), 0.2), loads.values(), 0.2) == {"b"}


def test_sizes_are_corrected_by_what_engines_count():
    policy = Sessions()
    session = policy.arrive(link("x", 0, 1000), 0.0)
    policy.begin(session, "a")
    policy.measured(session, 1500, 1000)
    assert session.tokens == 1500
    for _ in range(50):
        policy.measured(session, 1500, 1000)
    assert policy.arrive(link("y", 0, 1000), 0.0).tokens == pytest.approx(1500, rel=0.02)


@given(st.lists(st.floats(0, 100), max_size=200))
def test_how_long_one_is_live_is_bounded(pauses: list[float]):
    found = sessions.Pauses()
    for pause in pauses:
        found.add(pause)
    assert sessions.LEAST_LIVE_S <= found.live_s <= sessions.MOST_LIVE_S


class Traffic(RuleBasedStateMachine):
    """Any order of turns, ends, departures and time: counts add up, and nobody is held for ever."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.policy = Sessions()
        self.loads = pool("a", "b")
        self.turns: dict[str, int] = {}
        self.running: list[sessions.Session] = []

    @rule(name=st.sampled_from("uvwxyz"), tokens=st.integers(1, 9000), system=st.integers(0, 3000))
    def arrives(self, name: str, tokens: int, system: int) -> None:
        number = self.turns[name] = self.turns.get(name, -1) + 1
        session = self.policy.arrive(link(name, number, tokens, system), self.now)
        places = self.policy.fits(session, self.loads.values(), self.now)
        if places is None or places:
            self._start(session, places)
        else:
            self.policy.hold(session, 0, self.now)

    def _start(self, session: sessions.Session, places: frozenset[str] | None) -> None:
        self.policy.begin(session, min(places or self.loads))
        self.running.append(session)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), answer=st.integers(0, 500))
    def ends(self, data: st.DataObject, answer: int) -> None:
        session = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        self.policy.end(session, answer, self.now)

    @precondition(lambda self: self.policy.held)
    @rule(data=st.data())
    def leaves(self, data: st.DataObject) -> None:
        self.policy.leave(data.draw(st.sampled_from(self.policy.held)))

    @rule(passed=st.floats(0.01, 40), tokens=st.integers(0, 6000))
    def time_passes(self, passed: float, tokens: int) -> None:
        self.now += passed
        for load in self.loads.values():
            load.prefill = tokens
        self.policy.advance(self.loads, self.now)
        while (found := self.policy.next(self.loads.values(), self.now, known)) is not None:
            self._start(*found)
        assert all(self.now - (session.held_since or 0) < MAX_HOLD_S for session in self.policy.held)

    @rule(there=st.sets(st.sampled_from("ab"), min_size=1))
    def endpoints_change(self, there: set[str]) -> None:
        self.loads = {name: load for name, load in pool("a", "b").items() if name in there}
        self.policy.advance(self.loads, self.now)

    @invariant()
    def counts_add_up(self) -> None:
        for key, home in self.policy._homes.items():
            alive = list(home.sessions)
            assert all(s.home == key and s.state in (State.TURN, State.LIVE) for s in alive)
            shared = sum(size for _, size in home.shared.values())
            assert home.tokens == shared + sum(s.counted[0] for s in alive if s.counted)
            assert sum(count for count, _ in home.shared.values()) == len(alive)
        held = [s.order for s in self.policy.held]
        assert held == sorted(held)
        assert not any(s.state is State.TURN for s in self.policy.held)


TestTraffic = Traffic.TestCase
TestTraffic.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
