"""From what is observed to the number of replicas and the status that remembers it."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import pytest

from mainsail_operator.observe import Observed, Pod, Revision
from mainsail_operator.signals import PodLoad, Queue, Signals
from mainsail_operator.sizing import SETTLING_S, WAKE, Sizer, size
from mainsail_operator.types import InferenceServiceStatus, ScalingStatus

NOW = 1_800_000_000.0
SCALED = {"min": 0, "max": 4, "toZero": {"after": "10m"}}


def stamp(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def serving(uid: str, since: float = NOW - 1000) -> Pod:
    return Pod(uid, serving=True, ending=False, scheduled=True, uid=uid, progress=since)


def seen(*pods: Pod, replicas: int | None = None) -> Observed:
    count = len(pods) if replicas is None else replicas
    return Observed((Revision("r", "demo-r", count, created="2026-01-01T00:00:00Z", pods=pods),))


def load(waiting: float = 0.0, running: float = 1.0, **more) -> PodLoad:
    return PodLoad("u", waiting=waiting, running=running, kv_usage=0.1, preemptions_per_minute=0.0, **more)


def sized(spec, observed, one=None, *, held=0.0, room=None, annotations=None, told=None, known=None, now=NOW):
    def load_of(pod: Pod, since: float) -> PodLoad | None:
        return one

    return size(spec, observed, load_of, lambda since: Queue(held), room, annotations or {}, told, known, now)


def test_without_scaling_the_spec_is_the_number(make_spec) -> None:
    found = sized(make_spec(replicas=3), seen())
    assert (found.desired, found.status.desired, found.status.reason) == (3, 3, "Replicas")
    assert found.told(InferenceServiceStatus(), 1, [], NOW).conditions == []


def test_growth_is_told_once_with_its_numbers(make_spec) -> None:
    spec = make_spec(scaling=SCALED)
    told = ScalingStatus(desired=1)
    found = sized(spec, seen(serving("a")), load(waiting=6.1), told=told)
    assert (found.desired, found.status.reason) == (2, "QueueDepth")
    assert found.status.message.startswith("1 → 2: 6.1 requests wait, target 4")
    assert found.status.last_scale_time == stamp(NOW)
    again = sized(spec, seen(serving("a")), load(waiting=9.0), told=found.status, known=found.memory, now=NOW + 5)
    assert again.status == found.status, "figures that move are no reason for a write"


def test_nothing_is_decided_before_the_newest_replica_has_settled(make_spec) -> None:
    spec = make_spec(scaling=SCALED)
    young = serving("b", since=NOW - SETTLING_S + 1)
    found = sized(spec, seen(serving("a"), young), load(waiting=50.0), told=ScalingStatus(desired=2))
    assert (found.desired, found.decision.reason) == (2, "Starting")
    asked: list[float] = []

    def ask(pod: Pod, since: float) -> PodLoad:
        asked.append(since)
        return load()

    old = replace(young, progress=NOW - SETTLING_S - 1)
    size(spec, seen(serving("a"), old), ask, lambda since: Queue(), None, {}, ScalingStatus(desired=2), None, NOW)
    assert asked == [old.progress] * 2, "only what was measured since it serves"


def test_a_new_leader_goes_on_where_the_status_stands(make_spec) -> None:
    spec = make_spec(scaling=SCALED)
    idle = load(running=0.0)
    told = ScalingStatus(desired=1, reason="LowLoad", idle_since=stamp(NOW - 599))
    assert sized(spec, seen(serving("a")), idle, told=told).desired == 1
    assert sized(spec, seen(serving("a")), idle, told=told, now=NOW + 2).desired == 0
    assert sized(spec, seen(serving("a"), serving("b"), serving("c")), None).desired == 3, "no status: what is there"
    assert sized(make_spec(scaling={"min": 2, "max": 4}), seen(replicas=0), None).desired == 2


def test_idleness_is_told_when_it_lasts(make_spec) -> None:
    spec = make_spec(scaling=SCALED)
    first = sized(spec, seen(serving("a")), load(running=0.0), told=ScalingStatus(desired=1))
    assert first.status.idle_since is None
    later = sized(spec, seen(serving("a")), load(running=0.0), told=first.status, known=first.memory, now=NOW + 60)
    assert later.status.idle_since == stamp(NOW)


@pytest.mark.parametrize(
    ("woken", "expected"), [(NOW - 1, 0), (NOW, 1), (NOW + 0.9, 1), (NOW + 3600, 0), ("no time", 0)]
)
def test_the_annotation_wakes_a_service_at_zero_once(make_spec, woken, expected: int) -> None:
    spec = make_spec(scaling=SCALED)
    text = woken if isinstance(woken, str) else stamp(woken)
    told = ScalingStatus(desired=0, reason="Idle", last_scale_time=stamp(NOW))
    found = sized(spec, seen(), annotations={WAKE: text}, told=told, now=NOW + 0.5)
    assert found.desired == expected


def test_held_requests_wake_it_too(make_spec) -> None:
    told = ScalingStatus(desired=0, reason="Idle", last_scale_time=stamp(NOW))
    found = sized(make_spec(scaling=SCALED), seen(), held=2.0, told=told)
    assert (found.desired, found.status.reason) == (1, "HeldRequests")


def test_pods_without_a_place(make_spec) -> None:
    spec = make_spec(scaling=SCALED)
    refused = Pod("b", serving=False, ending=False, scheduled=False, uid="b", unschedulable_since=NOW - 60)
    found = sized(spec, seen(serving("a"), refused), load(waiting=9.0), room=3, told=ScalingStatus(desired=2))
    assert (found.desired, found.status.limited_by) == (2, "GPUs")
    (condition,) = found.told(InferenceServiceStatus(), 1, [], NOW).conditions
    assert (condition.status, condition.reason) == ("True", "LimitedByGpus")


def test_silence_is_a_condition(make_spec) -> None:
    found = sized(make_spec(scaling=SCALED), seen(serving("a")), None, told=ScalingStatus(desired=1))
    (condition,) = found.told(InferenceServiceStatus(), 1, [], NOW).conditions
    assert (condition.type, condition.status, condition.reason) == ("ScalingActive", "False", "MetricsMissing")


def test_capacity_is_told_when_it_moves_by_a_tenth(make_spec) -> None:
    spec = make_spec(scaling=SCALED)
    busy = load(waiting=9.0, requests_per_s=2.0, tokens_per_s=100.0)
    first = sized(spec, seen(serving("a")), busy, told=ScalingStatus(desired=2))
    assert first.status.capacity is not None
    assert first.status.capacity.tokens_per_second == 100.0
    near = replace(busy, tokens_per_s=104.0)
    second = sized(spec, seen(serving("a")), near, told=first.status, known=first.memory)
    assert second.status.capacity == first.status.capacity


def test_a_status_that_the_watch_has_not_brought_yet_is_not_asked(make_spec, owner) -> None:
    sizer = Sizer(Signals(), lambda spec: None)
    spec = make_spec(scaling=SCALED)
    stale = ScalingStatus(desired=0, reason="Idle", last_scale_time=stamp(NOW - 100))
    first = sizer.size(owner, spec, seen(), {WAKE: stamp(NOW)}, stale, NOW)
    again = sizer.size(owner, spec, seen(), {WAKE: stamp(NOW)}, stale, NOW + 1)
    assert (first.status.reason, again.status) == ("Woken", first.status)
    other = ScalingStatus(desired=3, reason="QueueDepth", last_scale_time=stamp(NOW + 60))
    assert sizer.size(owner, spec, seen(), {}, other, NOW + 61).desired == 3, "another leader has decided since"


def test_a_namesake_starts_anew_and_forgotten_services_leave_no_metrics(make_spec, owner) -> None:
    sizer = Sizer(Signals(), lambda spec: None)
    spec = make_spec(scaling={"min": 1, "max": 4})
    three = seen(serving("a"), serving("b"), serving("c"))
    key = (owner.namespace, owner.name)
    assert sizer.size(owner, spec, three, {}, None, NOW).desired == 3
    assert sizer.watches(key)
    assert sizer.size(replace(owner, uid="uid-2"), spec, seen(replicas=0), {}, None, NOW).desired == 1
    sizer.size(owner, make_spec(), three, {}, None, NOW)
    assert not sizer.watches(key)
