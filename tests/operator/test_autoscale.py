"""Scaling decisions: by table, over random histories, and closed loops on simulated engines under noisy load."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise

import pytest
from benchmarks.autoscale_sim import SPEC, Cluster, Engine, Mainsail, Scenario, simulate
from hypothesis import given, settings
from hypothesis import strategies as st

from mainsail_operator.autoscale import (
    CALM,
    LEAP,
    MOST_PATIENCE,
    REGRET_S,
    TOLERANCE,
    Capacity,
    Fleet,
    Memory,
    autoscale,
    filled,
    pressure_of,
    victims,
)
from mainsail_operator.signals import PodLoad, Queue
from mainsail_operator.types import ScalingSpec

NOW = 1_800_000_000.0
STABLE_S = 300


def spec(**fields) -> ScalingSpec:
    return ScalingSpec.model_validate({"max": 8} | fields)


def load(uid: str = "a", **fields) -> PodLoad:
    base = {"waiting": 0.0, "running": 1.0, "kv_usage": 0.1, "preemptions_per_minute": 0.0}
    return PodLoad(uid=uid, **(base | fields))


BUSY, FULL, CALM_POD = load(kv_usage=0.72), load(waiting=12.0), load(kv_usage=0.2)


@pytest.mark.parametrize(
    ("one", "reason"),
    [
        (load(waiting=6.0), "QueueDepth"),
        (load(kv_usage=0.95), "KvUsage"),
        (load(kv_usage=0.5, kv_wanted=1.5), "KvUsage"),
        (load(preemptions_per_minute=3.0), "Preemptions"),
        (load(first_token_p95_s=2.5), "TimeToFirstToken"),
    ],
)
def test_each_signal_alone_makes_it_grow_and_is_named(one: PodLoad, reason: str) -> None:
    found = autoscale(spec(targets={"timeToFirstTokenP95": "2s"}), Fleet([one]), Memory(1), NOW)
    assert (found.desired, found.reason) == (2, reason)
    assert found.memory.desired == 2
    assert found.message


@pytest.mark.parametrize(
    ("loads", "desired", "expected"),
    [
        ([load(waiting=4.3)], 1, 1),  # within the tolerance
        ([load(waiting=400.0)], 1, 2),  # at most twice
        ([FULL, FULL], 2, 4),
        ([FULL, load("b")], 2, 4),  # (3 + 0.125) of pressure
        ([load(waiting=6.0), load("b")], 2, 2),  # 1.5 + 0.1 fit on two
        ([FULL] * 6, 6, 8),  # max
        ([FULL], 2, 2),  # the second one is starting
        ([FULL, FULL], 4, 4),
    ],
)
def test_growing(loads: list[PodLoad], desired: int, expected: int) -> None:
    fleet = Fleet(loads, starting=desired - len(loads))
    assert autoscale(spec(), fleet, Memory(desired), NOW).desired == expected


def test_a_growing_queue_asks_for_nothing_new_while_replicas_start() -> None:
    memory = Memory(1)
    for second in range(0, 90, 5):
        fleet = Fleet([load(waiting=10.0 + second)], starting=memory.desired - 1)
        memory = autoscale(spec(), fleet, memory, NOW + second).memory
    assert memory.desired == 2


def test_a_queue_that_drains_by_itself_asks_for_nothing() -> None:
    scaling = spec(targets={"timeToFirstTokenP95": "2s"})
    for trend, expected in ((-1.0, 1), (-0.3, 2), (0.0, 2), (1.0, 2)):
        draining = Fleet([load(waiting=40.0, waiting_trend=trend, first_token_p95_s=20.0 if trend < 0 else None)])
        assert autoscale(scaling, draining, Memory(1), NOW).desired == expected, trend


def test_held_sessions_alone_make_it_grow_by_the_kv_that_all_want() -> None:
    calm = [load(kv_tokens=10_000.0), load("b", kv_tokens=10_000.0)]
    held = Queue(sessions=5.0, kv_tokens=32_000.0)
    found = autoscale(spec(), Fleet(calm, queue=held), Memory(2), NOW)
    assert (found.desired, found.reason) == (4, "HeldSessions")
    assert "5 agent sessions are held or parked, and all want 160% of the KV cache" in found.message
    assert autoscale(spec(), Fleet(calm, queue=Queue(kv_tokens=32_000.0)), Memory(2), NOW).desired == 2, "none is held"
    silent = autoscale(spec(), Fleet([load(), load("b")], queue=held), Memory(2), NOW)
    assert silent.desired == 2, "an engine that does not say what its pool holds"
    half_told = Fleet([calm[0], None], queue=held)
    assert autoscale(spec(), half_told, Memory(2), NOW).desired == 4, "who is silent has as much as the others"


def test_a_service_with_held_sessions_is_not_idle() -> None:
    zero = ScalingSpec.model_validate({"min": 0, "max": 2})
    fleet = Fleet([load(running=0.0, kv_usage=0.0)], queue=Queue(sessions=1.0, kv_tokens=1.0))
    assert autoscale(zero, fleet, Memory(1), NOW).memory.idle_since is None


def test_what_waits_at_the_gateway_is_every_replicas_queue() -> None:
    found = autoscale(spec(), Fleet([load(), load("b")], queue=Queue(20.0)), Memory(2), NOW)
    assert (found.desired, found.reason) == (4, "QueueDepth")
    assert "10.0 requests for each replica wait" in found.message
    assert autoscale(spec(), Fleet([load(), load("b")], queue=Queue(20.0, -1.0)), Memory(2), NOW).desired == 2


def test_no_more_than_the_free_gpus() -> None:
    found = autoscale(spec(), Fleet([FULL, FULL], room=1), Memory(2), NOW)
    assert (found.desired, found.limited_by) == (3, "GPUs")
    found = autoscale(spec(), Fleet([FULL, FULL], room=0), Memory(2), NOW)
    assert (found.desired, found.limited_by, found.reason) == (2, "GPUs", "QueueDepth")
    found = autoscale(spec(withoutGpu="Create"), Fleet([FULL, FULL], room=0), Memory(2), NOW)
    assert (found.desired, found.limited_by) == (4, "")
    found = autoscale(spec(max=2), Fleet([FULL, FULL], room=9), Memory(2), NOW)
    assert (found.desired, found.limited_by) == (2, "max")


def over(seconds: int, fleet: Fleet, memory: Memory, scaling: ScalingSpec | None = None, start: float = NOW) -> Memory:
    for second in range(0, seconds + 1, 5):
        memory = autoscale(scaling or spec(), fleet, memory, start + second).memory
    return memory


def test_shrinking_takes_the_whole_window_and_goes_one_by_one() -> None:
    fleet = Fleet([replace(CALM_POD, uid=str(n)) for n in range(4)])
    assert over(STABLE_S - 5, fleet, Memory(4)).desired == 4
    assert over(STABLE_S, fleet, Memory(4)).desired == 3
    three = Fleet([replace(CALM_POD, uid=str(n), kv_usage=0.25) for n in range(3)])
    memory = over(STABLE_S, fleet, Memory(4))
    assert over(STABLE_S - 5, three, memory, start=NOW + STABLE_S + 5).desired == 3
    assert over(STABLE_S, three, memory, start=NOW + STABLE_S + 5).desired == 2


def test_a_burst_is_answered_in_one_step_where_it_is_known_what_a_replica_carries() -> None:
    """Seven requests a second each are what two replicas carry; forty come."""
    flooded = [load(uid, waiting=100.0, waiting_trend=13.0, requests_per_s=7.0, tokens_per_s=1400.0) for uid in "ab"]
    fleet, known = Fleet(flooded), Memory(2, capacity=Capacity(7.0, 1400.0))
    assert autoscale(spec(max=16), fleet, known, NOW).desired == 7
    assert filled(fleet, flooded, Capacity(0.1, 20.0)) == LEAP * 2, "whatever was learned"
    assert filled(fleet, flooded, None) == 0


def regretted(memory: Memory, at: float) -> Memory:
    """After a step back that load took back a minute later."""
    calm = Fleet([replace(CALM_POD, uid=str(n)) for n in range(memory.desired)])
    begins = at
    while memory.desired == len(calm.loads):
        memory = autoscale(spec(), calm, memory, at).memory
        at += 5
        assert at - begins < 20 * STABLE_S
    full = Fleet([load(str(n), waiting=12.0) for n in range(memory.desired)])
    return autoscale(spec(), full, memory, at + 60).memory


def test_a_step_back_that_was_regretted_makes_it_patient() -> None:
    memory = regretted(Memory(2), NOW)
    assert (memory.desired, memory.patience, memory.shrank_at) == (2, 2, None)
    calm = Fleet([CALM_POD, replace(CALM_POD, uid="b")])
    busy = Fleet([BUSY, replace(BUSY, uid="b")])
    memory = autoscale(spec(), busy, memory, NOW + 1000).memory
    assert over(2 * STABLE_S - 10, calm, memory, start=NOW + 1005).desired == 2, "a window would have done before"
    assert over(2 * STABLE_S, calm, memory, start=NOW + 1005).desired == 1


def test_patience_is_bounded_and_forgotten_when_nothing_is_regretted() -> None:
    memory, at = Memory(2), NOW
    for _ in range(6):
        memory = regretted(memory, at)
        at += 2 * REGRET_S
    assert memory.patience == MOST_PATIENCE
    memory = replace(memory, desired=1, shrank_at=at)
    alone = Fleet([CALM_POD])
    assert autoscale(spec(), alone, memory, at + REGRET_S - 5).memory.patience == MOST_PATIENCE
    assert autoscale(spec(), alone, memory, at + REGRET_S).memory.patience == MOST_PATIENCE // 2
    late = Fleet([load(waiting=12.0)])
    assert autoscale(spec(), late, replace(memory, patience=4), at + REGRET_S).memory.patience < 8, "no regret so late"


def test_a_moment_of_load_begins_the_window_anew() -> None:
    calm = Fleet([CALM_POD, replace(CALM_POD, uid="b")])
    memory = over(STABLE_S - 5, calm, Memory(2))
    memory = autoscale(spec(), Fleet([BUSY, BUSY]), memory, NOW + STABLE_S).memory
    assert over(STABLE_S - 5, calm, memory, start=NOW + STABLE_S + 5).desired == 2


def test_one_replica_fewer_is_simulated() -> None:
    half = [load(str(n), kv_usage=0.4) for n in range(2)]  # pressure 0.5 each: one alone would have 1.0
    assert over(STABLE_S * 3, Fleet(half), Memory(2)).desired == 2
    many = [load(str(n), kv_usage=0.4) for n in range(4)]  # 0.5 · 4/3 = 0.67
    assert over(STABLE_S, Fleet(many), Memory(4)).desired == 3


def test_sequences_and_throughput_keep_what_a_queue_does_not_show() -> None:
    quiet = [load(str(n), kv_usage=0.05, running=20.0, tokens_per_s=900.0) for n in range(2)]
    assert over(STABLE_S, Fleet(quiet, slots=256), Memory(2)).desired == 1
    assert over(STABLE_S * 2, Fleet(quiet, slots=32), Memory(2)).desired == 2
    known = Memory(2, capacity=Capacity(10.0, 1600.0))
    assert over(STABLE_S * 2, Fleet(quiet, slots=256), known).desired == 2


def test_capacity_is_learned_from_full_replicas_and_corrected_upwards() -> None:
    full = Fleet([load(waiting=9.0, requests_per_s=4.0, tokens_per_s=800.0)], starting=1)
    memory = over(100, full, Memory(2))
    assert memory.capacity == Capacity(4.0, 800.0)
    better = Fleet([load(running=128.0, requests_per_s=5.0, tokens_per_s=900.0), load("b")])
    assert over(0, better, memory).capacity == Capacity(7.5, 1350.0), "half of its sequences were still free"


@pytest.mark.parametrize("missing", [[None, CALM_POD], [None, None], [CALM_POD, CALM_POD, None]])
def test_a_silent_replica_never_lets_it_shrink(missing: list[PodLoad | None]) -> None:
    memory = over(STABLE_S * 4, Fleet(missing), Memory(len(missing)))
    assert memory.desired == len(missing)
    found = autoscale(spec(), Fleet(missing), Memory(len(missing)), NOW)
    assert found.reason == "MetricsMissing"


def test_the_others_go_on_growing_it() -> None:
    assert autoscale(spec(), Fleet([None, FULL]), Memory(2), NOW).desired == 4


def test_replicas_without_a_place_are_given_up_when_they_are_not_needed() -> None:
    stuck = Fleet([BUSY], unplaced=2)
    assert autoscale(spec(), stuck, Memory(3), NOW).desired == 1
    assert autoscale(spec(), Fleet([FULL], unplaced=2), Memory(3), NOW).desired == 3


def test_moved_bounds_take_effect_at_once() -> None:
    assert autoscale(spec(min=3), Fleet([CALM_POD]), Memory(1), NOW).desired == 3
    assert autoscale(spec(max=2), Fleet([FULL] * 4), Memory(4), NOW).desired == 2
    assert autoscale(spec(min=1), Fleet([]), Memory(0), NOW).desired == 1


ZERO = spec(min=0, toZero={"after": "10m"})
IDLE = load(running=0.0, kv_usage=0.0)


def test_to_zero_after_nothing_was_asked() -> None:
    assert over(595, Fleet([IDLE]), Memory(1), ZERO).desired == 1
    memory = over(600, Fleet([IDLE]), Memory(1), ZERO)
    assert memory.desired == 0
    assert over(600, Fleet([IDLE]), Memory(1), spec(min=1)).desired == 1
    assert over(3600, Fleet([]), memory, ZERO).desired == 0


@pytest.mark.parametrize(
    "fleet",
    [
        Fleet([load(running=0.1)]),
        Fleet([replace(IDLE, requests_per_s=0.02)]),
        Fleet([replace(IDLE, sessions=1.0)]),
        Fleet([IDLE], queue=Queue(1.0)),
        Fleet([None]),
        Fleet([], starting=1),
    ],
)
def test_whatever_is_asked_or_unknown_keeps_the_last_replica(fleet: Fleet) -> None:
    assert over(3600, fleet, Memory(1), ZERO).desired >= 1


def test_from_zero() -> None:
    assert autoscale(ZERO, Fleet([]), Memory(0), NOW).desired == 0
    found = autoscale(ZERO, Fleet([], queue=Queue(1.0)), Memory(0), NOW)
    assert (found.desired, found.reason) == (1, "HeldRequests")
    assert autoscale(ZERO, Fleet([], woken=True), Memory(0), NOW).reason == "Woken"
    assert autoscale(ZERO, Fleet([], queue=Queue(100.0), slots=32), Memory(0), NOW).desired == 4
    assert autoscale(ZERO, Fleet([], queue=Queue(100.0), slots=32, room=2), Memory(0), NOW).desired == 2
    assert autoscale(ZERO, Fleet([], queue=Queue(1.0), room=0), Memory(0), NOW).desired == 1


def test_the_victim_is_the_least_loaded_then_the_coldest() -> None:
    loads = [load("busy", running=5.0), load("warm", warmth=900.0), load("session", sessions=2.0), load("cold")]
    assert [one.uid for one in victims(loads)] == ["cold", "warm", "session", "busy"]


loads = st.builds(
    PodLoad,
    uid=st.uuids().map(str),
    waiting=st.floats(0, 100),
    running=st.floats(0, 64),
    kv_usage=st.floats(0, 1),
    preemptions_per_minute=st.floats(0, 50),
    first_token_p95_s=st.none() | st.floats(0, 30),
    kv_wanted=st.floats(0, 2),
    requests_per_s=st.floats(0, 10),
    tokens_per_s=st.floats(0, 5000),
    kv_tokens=st.just(0.0) | st.floats(1000, 20_000),
)
fleets = st.builds(
    Fleet,
    loads=st.lists(st.none() | loads, max_size=6),
    starting=st.integers(0, 4),
    unplaced=st.integers(0, 3),
    queue=st.builds(Queue, st.floats(0, 50), st.floats(-3, 3), st.floats(0, 20), st.floats(0, 50_000)),
    woken=st.booleans(),
    room=st.none() | st.integers(0, 5),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(fleets, max_size=30), st.integers(0, 3), st.integers(3, 12), st.integers(0, 12))
def test_whatever_comes_steps_are_bounded_and_doubt_never_shrinks(
    history: list[Fleet], least: int, most: int, start: int
) -> None:
    scaling = spec(min=least, max=most, scaleDown={"stabilization": "20s"}, toZero={"after": "20s"})
    memory = Memory(start)
    for number, fleet in enumerate(history):
        before = min(max(memory.desired, least), most)
        found = autoscale(scaling, fleet, memory, NOW + 5 * number)
        assert least <= found.desired <= most
        step = 2 if found.memory.capacity is None else LEAP
        assert found.desired <= max(before, step * fleet.serving) or before == 0
        fewer = before - found.desired
        if None in fleet.loads and before == memory.desired and found.reason != "NoRoom":
            assert fewer <= 0
        if fewer > 1:
            assert found.reason == "NoRoom"
            assert found.desired >= min(fleet.serving, before)
        if found.reason == "LowLoad":
            told = [one for one in fleet.loads if one is not None]
            mean = sum(pressure_of(one, scaling).value for one in told) / len(told)
            assert mean <= 1 + TOLERANCE
            assert mean * fleet.serving / (before - 1) < CALM
        if found.desired > before > 0 and fleet.room is not None:
            assert found.desired <= fleet.serving + fleet.starting + max(fleet.room, min(fleet.unplaced, 1))
        memory = found.memory


def steady(rate: float) -> Scenario:
    return Scenario("steady", 1.0, lambda s: rate, start_s=60.0)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("rate", [5.0, 17.0])
def test_a_steady_noisy_load_settles(rate: float, seed: int) -> None:
    """Poisson arrivals of requests of very different lengths: no flapping, whatever share of a replica is left over."""
    policy = Mainsail(SPEC)
    sizes: list[int] = []

    def watched(now: float, cluster: Cluster) -> int:
        sizes.append(policy(now, cluster))
        return sizes[-1]

    outcome = simulate(steady(rate), watched, seed)
    later = sizes[1500:]
    changes = sum(one != other for one, other in pairwise(later))
    assert changes <= 3, f"{rate}/s: {changes} changes after the first 25 minutes, {min(later)} to {max(later)}"
    assert outcome.turns <= 1
    need = rate * 200 / Engine().tokens_per_s
    assert min(later) >= need
    assert max(later) <= 2 * need + 2


@pytest.mark.parametrize("times", [3, 8])
def test_reaction_to_a_step_is_bounded(times: int) -> None:
    """From one replica to what the load needs: a start for each doubling, and a few scrapes."""
    rate = 7.0 * times
    policy, reached = Mainsail(SPEC), []

    def watched(now: float, cluster: Cluster) -> int:
        if len(cluster.serving) * Engine().tokens_per_s >= rate * 200 and not reached:
            reached.append(now)
        return policy(now, cluster)

    simulate(Scenario("step", 0.5, lambda s: 2.0 if s < 300 else rate, start_s=90.0), watched)
    doublings = times.bit_length()
    assert reached
    assert reached[0] - 300 <= doublings * (90 + 30) + 60


def test_random_walks_never_shrink_below_what_serves_the_load() -> None:
    """After each step down, what is left could carry what came in the minute before."""
    draw, rate = random.Random(5), 20.0
    rates: list[float] = []
    for _ in range(2 * 3600 // 60):
        rate = min(60.0, max(2.0, rate * draw.choice((0.8, 0.9, 1.0, 1.1, 1.25))))
        rates.append(rate)
    policy, sizes = Mainsail(SPEC), [1]

    def watched(now: float, cluster: Cluster) -> int:
        sizes.append(policy(now, cluster))
        if sizes[-1] < sizes[-2]:
            came = rates[max(0, int(now) // 60 - 1)]
            assert sizes[-1] * Engine().tokens_per_s >= 0.9 * came * 200, f"{now} s: {came:.1f}/s"
        return sizes[-1]

    simulate(Scenario("walk", 2, lambda s: rates[int(s) // 60], start_s=60.0), watched)
