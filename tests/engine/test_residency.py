"""Sessions in a pool that is too small, on a simulated clock: kept, held, displaced, parked, fetched ahead."""

from __future__ import annotations

import random
from typing import Any

import pytest
from benchmarks.simulated import DeviceCost, SimulatedEngine

from mainsail_engine.core import EngineCore
from mainsail_engine.protocol import Control, Controlled
from mainsail_engine.request import Request, SamplingParams
from mainsail_engine.residency import MAX_HOLD_S

ANSWER = 20
SLOW_PREFILL = DeviceCost(prefill_token=4e-4)
"""These pools are small: a fast device would compute them again in no time, and nothing would be worth keeping."""


class Fleet:
    """Agent sessions, each a loop of turn and pause; and plain requests."""

    def __init__(self, **options) -> None:
        self.engine = SimulatedEngine(**{"latency_s": 0.0, "cost": SLOW_PREFILL, **options})
        self.engine.on_output = self.take
        self.engine.on_step = self.check
        self.steps = 0
        self.plays: dict[str, tuple] = {}
        self.requests: dict[str, Request] = {}
        self.finished_s: dict[str, float] = {}
        self.hits: dict[str, int] = {}

    def check(self, plan) -> None:
        self.steps += 1
        if self.steps % 20 == 0:
            self.engine.scheduler.check_integrity()

    def ask(self, name: str, tokens: list[int], *, max_tokens=ANSWER, priority=0) -> None:
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        request = Request(name, list(tokens), params, self.engine.now, priority)
        self.requests[name] = request
        self.engine.add(request)

    def plain(self, name: str, when: float, length: int, **options) -> None:
        tokens = random.Random(name).choices(range(2000, 30_000), k=length)
        self.engine.at(when, lambda: self.ask(name, tokens, **options))

    def agent(self, name: str, when: float, *, first: int, turns: int, grows=300, pause=lambda: 0.3) -> None:
        rng = random.Random(name)

        def turn(number: int, tokens: list[int]) -> None:
            self.ask(f"{name}.{number}", tokens)
            self.plays[f"{name}.{number}"] = (number, tokens)

        def next_turn(number: int, tokens: list[int], answer: list[int]) -> None:
            if number + 1 < turns:
                more = rng.choices(range(2000, 30_000), k=grows)
                self.engine.at(self.engine.now + pause(), lambda: turn(number + 1, [*tokens, *answer, *more]))

        self.plays[name] = (next_turn,)
        tokens = rng.choices(range(2000, 30_000), k=first)
        self.engine.at(when, lambda: turn(0, tokens))

    def take(self, output, now) -> None:
        self.hits[output.request_id] = output.num_cached_tokens
        if output.finish_reason is None:
            return
        self.finished_s[output.request_id] = now
        if output.request_id in self.plays:
            number, tokens = self.plays[output.request_id]
            answer = list(self.requests[output.request_id].output_token_ids)
            self.plays[output.request_id.split(".")[0]][0](number, tokens, answer)

    @property
    def stats(self):
        return self.engine.scheduler.stats()


def teach(fleet: Fleet, *, until: float, pause) -> None:
    """Small sessions from which the engine learns how long pauses are."""
    for number in range(20):
        fleet.agent(f"teacher{number}", 0.02 * number, first=40, turns=6, grows=20, pause=pause)
    fleet.engine.run(until)


def test_plain_traffic_is_served_exactly_as_without_sessions():
    ends = []
    for sessions in (False, True):
        fleet = Fleet(num_blocks=2000, max_num_seqs=32, agent_sessions=sessions)
        rng = random.Random(3)
        for i in range(300):
            fleet.plain(f"p{i}", rng.uniform(0, 10), rng.randrange(20, 4000), max_tokens=rng.randrange(1, 60))
        fleet.engine.run()
        ends.append(fleet.finished_s)
        assert fleet.stats.sessions_acting == fleet.stats.sessions_held == 0
    assert ends[0] == ends[1]


def flood(sessions: bool) -> Fleet:
    """Three agents that nearly fill the pool, and a stream of plain prompts that would fill it twice a second."""
    fleet = Fleet(num_blocks=1300, agent_sessions=sessions, max_model_len=10_000)
    teach(fleet, until=30.0, pause=lambda: 3.5)
    for i in range(3):
        fleet.agent(f"a{i}", 30.0 + 0.01 * i, first=4000, turns=8, pause=lambda: 3.5)
    for i in range(200):
        fleet.plain(f"p{i}", 30.0 + 0.2 * i, 600)
    fleet.engine.run()
    return fleet


def test_a_flood_of_plain_requests_does_not_wash_out_a_session_between_its_turns():
    hits = {}
    for sessions in (False, True):
        fleet = flood(sessions)
        turns = [name for name in fleet.hits if name.startswith("a") and not name.endswith(".0")]
        hits[sessions] = sum(fleet.hits[name] > 0.9 * 4000 for name in turns)
        assert len(fleet.finished_s) == 200 + 3 * 8 + 20 * 6
    assert hits[True] > 0.85 * len(turns)
    assert hits[False] < 0.7 * len(turns)


def test_a_new_session_waits_as_a_whole_while_older_ones_are_expected_back():
    fleet = Fleet(num_blocks=1400, max_model_len=16_000)
    teach(fleet, until=10.0, pause=lambda: 0.5)
    for i in range(3):
        fleet.agent(f"a{i}", 10.0 + i / 10, first=4500, turns=6, pause=lambda: 0.5)
    fleet.agent("young", 10.6, first=9000, turns=2)
    held = []
    fleet.engine.on_step = lambda plan: held.append(fleet.stats.sessions_held)
    fleet.engine.run()
    assert max(held) == 1
    assert min(fleet.finished_s[f"a{i}.3"] for i in range(3)) < fleet.finished_s["young.0"]
    assert all(fleet.hits[f"a{i}.{turn}"] >= 4500 for i in range(3) for turn in range(1, 6))
    assert fleet.stats.num_preemptions == 0


def test_what_ended_sessions_had_makes_room_before_what_is_expected_back(monkeypatch):
    """Agents that return within a second or not at all, in a pool for half of them and a small host tier."""
    computed_again = {}
    for demotes in (False, True):
        with monkeypatch.context() as patch:
            if not demotes:
                patch.setattr("mainsail_engine.kv.prefix_tree.PrefixTree.demote", lambda tree, node: None)
            fleet = Fleet(num_blocks=1000, num_host_blocks=200, max_model_len=10_000)
            teach(fleet, until=10.0, pause=lambda: 0.3)
            for i in range(24):
                fleet.agent(f"a{i}", 10.0 + 0.4 * i, first=1000, turns=6, pause=lambda: 0.3)
            fleet.engine.run()
            fleet.engine.scheduler.check_integrity()
        names = [f"a{i}.{turn}" for i in range(24) for turn in range(1, 6)]
        computed_again[demotes] = sum(fleet.hits[name] < 1000 for name in names)
    assert computed_again[True] < 0.5 * computed_again[False]


def test_nobody_is_held_for_ever():
    """Two sessions come back for ever, and the pool has no room beside them."""
    fleet = Fleet(num_blocks=600, max_model_len=9000)
    teach(fleet, until=10.0, pause=lambda: 0.5)
    for i in range(2):
        fleet.agent(f"a{i}", 10.0, first=4000, turns=400, grows=5, pause=lambda: 0.5)
    fleet.plain("late", 11.0, 7000)
    fleet.engine.run(10 + 2 * MAX_HOLD_S)
    assert MAX_HOLD_S <= fleet.finished_s["late"] - 11.0 < MAX_HOLD_S + 8


def test_a_small_request_beside_large_sessions_waits_for_a_moment_at_most():
    fleet = Fleet(num_blocks=2940, max_model_len=40_000)
    teach(fleet, until=10.0, pause=lambda: 0.5)
    for i in range(2):
        fleet.agent(f"a{i}", 10.0, first=23_000, turns=40, grows=5, pause=lambda: 0.9)
    for i in range(10):
        fleet.plain(f"small{i}", 40.0 + i, 100)
    fleet.engine.run(60.0)
    assert all(fleet.finished_s[f"small{i}"] - 40.0 - i < 1.5 for i in range(10))
    assert all(fleet.hits[name] > 20_000 for name in fleet.hits if name.startswith("a") and not name.endswith(".0"))


def test_a_higher_priority_displaces_what_is_kept_for_a_lower_one():
    fleet = Fleet(num_blocks=600, max_model_len=9000)
    teach(fleet, until=10.0, pause=lambda: 0.5)
    for i in range(2):
        fleet.agent(f"a{i}", 10.0, first=4000, turns=20, grows=5, pause=lambda: 0.5)
    fleet.plain("urgent", 15.0, 7000, priority=1)
    fleet.engine.run(30)
    assert fleet.finished_s["urgent"] - 15.0 < 4


def test_running_requests_take_what_is_kept_before_anybody_is_preempted():
    fleet = Fleet(num_blocks=600, max_model_len=9000)
    teach(fleet, until=10.0, pause=lambda: 2.0)
    fleet.engine.run()
    start = fleet.engine.now
    fleet.agent("a", start, first=3000, turns=2, pause=lambda: 8.0)
    fleet.plain("grows", start, 4000, max_tokens=2500)
    fleet.engine.run()
    assert fleet.stats.num_preemptions == 0
    assert "grows" in fleet.finished_s


@pytest.mark.parametrize("host", [0, 4000])
def test_with_a_host_tier_sessions_are_parked_and_nothing_is_computed_twice(host):
    fleet = Fleet(num_blocks=1000, num_host_blocks=host, max_model_len=16_000)
    rng = random.Random(2)
    for i in range(12):
        fleet.agent(f"a{i}", 0.1 * i, first=2500, turns=6, grows=500, pause=lambda: rng.uniform(0.2, 3.0))
    fleet.engine.run()
    assert len(fleet.finished_s) == 12 * 6
    again = fleet.engine.prefilled - 12 * (2500 + 5 * 501)  # each answer's last token is computed with the next turn
    assert again < 50 if host else again > 5000  # a tail to copy may be dropped where its block is one too many
    assert (fleet.stats.num_swapped_in > 0) == bool(host)


def away_for_half_a_minute() -> tuple[Fleet, float]:
    """A fleet whose large session is on the host and will be fetched from there within three seconds, and the time."""
    fleet = Fleet(num_blocks=2000, num_host_blocks=4000, max_model_len=26_000)
    teach(fleet, until=250.0, pause=lambda: 33.0)
    start = fleet.engine.now
    fleet.agent("a", start, first=20_000, turns=2, pause=lambda: 33.0)
    fleet.plain("between", start + 12, 25_000)
    fleet.engine.run(start + 38.0)
    assert fleet.stats.num_swapped_out > 800
    return fleet, start


def test_who_comes_back_after_half_a_minute_is_fetched_ahead():
    fleet, start = away_for_half_a_minute()
    before = fleet.stats.num_swapped_in
    fleet.engine.run(start + 41.0)
    assert "a.1" not in fleet.hits
    assert fleet.stats.num_swapped_in - before > 800
    fleet.engine.run()
    assert fleet.hits["a.1"] >= 20_000
    assert fleet.stats.host_cache_hits == 0


class Bed:
    """See core.Sleeper. What lies in it cannot launch anything."""

    def resting_runner(self) -> Any:
        return None

    def sleep(self) -> None: ...

    def wake_up(self) -> Any: ...


def test_who_sleeps_fetches_nothing_ahead():
    """Its memory is gone, whatever the sessions of before would want there by now."""
    fleet, start = away_for_half_a_minute()
    core = EngineCore(fleet.engine.scheduler, Bed().resting_runner(), depth=1, sleeper=Bed())
    assert core.idle_s(start + 38.0) is not None
    core.handle(Control("c", "sleep"), start + 38.0)
    assert core.take_answers() == [Controlled("c")]
    assert core.idle_s(start + 41.0) is None
    assert core.step(start + 41.0) is None
