"""The gate: what passes, what fails at once, what waits for more requests."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mainsail_operator.gate import (
    Evidence,
    Watch,
    collect,
    judge,
    judge_errors,
    longest_proof,
    proven,
    together,
    wilson_lower,
)
from mainsail_operator.signals import Distribution, History, Signals
from mainsail_operator.types import RolloutGate

GATE = RolloutGate()
BOUNDS = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 10, float("inf"))


def times(values: list[float]) -> Distribution:
    return Distribution(BOUNDS, tuple(float(sum(v <= bound for v in values)) for bound in BOUNDS), sum(values))


def spread(count: int, around: float, seed: int = 0) -> Distribution:
    """Times as they are measured: a log-normal with a tail."""
    numbers = random.Random(seed)
    return times([around * numbers.lognormvariate(0, 0.4) for _ in range(count)])


def pod(name: str, requests: int, errors: int = 0, first: float = 0.1, inter: float = 0.03, seed: int = 0) -> Evidence:
    return Evidence(name, requests, errors, spread(requests, first, seed), spread(requests * 10, inter, seed))


STABLE = pod("stable", 900, seed=7)


@pytest.mark.parametrize(
    ("canary", "outcome", "reason"),
    [
        ([pod("a", 100)], "Pass", "GatePassed"),
        ([pod("a", 12)], "Inconclusive", "WaitingForRequests"),
        ([], "Inconclusive", "WaitingForRequests"),
        ([pod("a", 100, errors=30)], "Fail", "ErrorRate"),
        ([pod("a", 8, errors=6)], "Fail", "ErrorRate"),
        ([pod("a", 60, errors=1)], "Inconclusive", "ErrorRate"),
        ([pod("a", 400, errors=1)], "Pass", "GatePassed"),
        ([pod("a", 400, errors=6)], "Fail", "ErrorRate"),
        ([pod("a", 100, first=0.4)], "Fail", "Latency"),
        ([pod("a", 100, inter=0.2)], "Fail", "Latency"),
        ([pod("a", 100, first=0.05, inter=0.01)], "Pass", "GatePassed"),
        ([pod("good", 100), pod("bad", 30, first=1.5)], "Fail", "Latency"),
        ([pod("good", 400), pod("bad", 30, errors=15)], "Fail", "ErrorRate"),
    ],
)
def test_verdicts(canary: list[Evidence], outcome: str, reason: str) -> None:
    verdict = judge(GATE, canary, STABLE)
    assert (verdict.outcome, verdict.reason) == (outcome, reason), verdict.message


@pytest.mark.parametrize(
    ("canary", "stable", "outcome"),
    [
        ([pod("a", 100)], STABLE, "Pass"),
        ([pod("a", 3, errors=2)], STABLE, "Pass"),
        ([pod("a", 30, errors=3)], STABLE, "Fail"),
        ([pod("good", 400), pod("bad", 20, errors=10)], STABLE, "Fail"),
        ([pod("a", 30, errors=3)], pod("stable", 900, errors=90), "Pass"),
        ([pod("a", 100, first=3.0)], STABLE, "Pass"),
    ],
    ids=["good", "too few", "fails", "worst pod", "as the old one does", "times do not count"],
)
def test_what_stops_a_rolling_update(canary: list[Evidence], stable: Evidence, outcome: str) -> None:
    assert judge_errors(GATE, canary, stable).outcome == outcome


@pytest.mark.parametrize(
    ("watch", "after_s", "expected"),
    [
        (Watch(until=1019.0), 19, False),
        (Watch(until=1021.0), 21, True),
        (Watch(until=1019.0), 21, False),
        (Watch(until=None), 21, True),
        (Watch(since=1010.0, until=1021.0), 21, False),
        (Watch(since=1010.0, until=1031.0), 31, True),
        (Watch(until=1021.0, requests={"new": 49.0}), 21, False),
        (Watch(until=1021.0, requests={"new": 50.0}), 21, True),
        (Watch(until=1021.0, requests={"old": 3.0}), 21, False),
        (Watch(until=1021.0, requests={"old": 0.0}), 21, True),
        (Watch(until=1061.0, requests={"new": 3.0}), 61, True),
        (Watch(until=1059.0, requests={"new": 3.0}), 61, False),
        (Watch(until=900.0), 500, False),
    ],
    ids=["too soon", "no requests", "not told yet", "no gateway", "watched for less", "watched for as long",
         "too few requests", "enough", "long ones", "nobody's", "few for long", "few, not told yet", "gateways silent"],
)  # fmt: skip
def test_when_a_new_pod_may_replace_an_old_one(watch: Watch, after_s: float, expected: bool) -> None:
    assert proven("new", 1000.0, watch, GATE, 20.0, 1000.0 + after_s) is expected


@given(
    st.floats(0, 1000), st.floats(0, 1000), st.none() | st.floats(0, 4000), st.floats(0, 100), st.floats(0, 300),
    st.floats(0, 2000),
)  # fmt: skip
def test_proof_is_bounded_and_not_taken_back(
    serving: float, since: float, until: float | None, requests: float, min_ready: float, now: float
) -> None:
    watch, began = Watch(since, until, {"new": requests}), max(serving, since)
    shown = proven("new", serving, watch, GATE, min_ready, now)
    known = now if until is None else min(now, until)
    assert not shown or known - began >= min_ready
    assert shown or known - began < longest_proof(min_ready)
    later = Watch(since, None if until is None else until + 5, {"new": requests})
    assert not shown or proven("new", serving, later, GATE, min_ready, now + 5)


def test_the_worst_pod_is_named_with_its_figures() -> None:
    verdict = judge(GATE, [pod("good", 100), pod("bad", 60, first=1.5)], STABLE)
    assert "bad" in verdict.message
    assert "time to the first token" in verdict.message
    assert "1.5 times is allowed" in verdict.message


def test_how_many_requests_it_waits_for() -> None:
    assert judge(GATE, [pod("a", 12)], STABLE).message == "12 of 50 requests seen"


def test_without_times_of_the_stable_revision_errors_alone_decide() -> None:
    idle = Evidence("stable")
    assert judge(GATE, [pod("a", 100, first=3.0)], idle).outcome == "Pass"
    assert judge(GATE, [pod("a", 100, errors=50)], idle).outcome == "Fail"


def test_what_buckets_cannot_tell_apart_is_the_same() -> None:
    fast, faster = pod("a", 200, first=0.002, inter=0.001), pod("stable", 900, first=0.0005, inter=0.0002)
    assert judge(GATE, [fast], faster).outcome == "Pass"


@given(st.integers(50, 1000), st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_an_equal_revision_seldom_fails(requests: int, seed: int) -> None:
    """Two samples of the same distribution: never a failure for the ratio of 1.5, however few they are."""
    canary = pod("a", requests, seed=seed)
    assert judge(GATE, [canary], pod("stable", 900, seed=seed + 1)).outcome != "Fail"


@given(st.integers(50, 1000), st.integers(0, 10_000), st.floats(3.0, 20.0))
@settings(max_examples=60, deadline=None)
def test_a_much_slower_revision_never_passes(requests: int, seed: int, factor: float) -> None:
    canary = pod("a", requests, first=0.1 * factor, seed=seed)
    assert judge(GATE, [canary], pod("stable", 900, seed=seed + 1)).outcome != "Pass"


@given(st.integers(0, 500), st.integers(1, 500))
def test_wilsons_bound_is_below_the_share(errors: int, more: int) -> None:
    requests = errors + more
    assert 0.0 <= wilson_lower(errors, requests) <= errors / requests + 1e-9


def scrape(codes: dict[str, float], pod_name: str = "demo-1-rs-a", first: float = 0.0) -> dict:
    labels = (("namespace", "ns"), ("pod", pod_name), ("revision", "demo-1"), ("service", "demo"))
    series = {("mainsail:gateway_requests_total", tuple(sorted((*labels, ("code", code))))): value
              for code, value in codes.items()}  # fmt: skip
    for bound in ("0.1", "1.0", "+Inf"):
        count = first if bound != "0.1" else 0.0
        series["mainsail:gateway_time_to_first_token_seconds_bucket", tuple(sorted((*labels, ("le", bound))))] = count
    return series


def test_evidence_is_what_all_gateways_saw_since_the_step_began() -> None:
    signals = Signals()
    for gateway in ("g1", "g2"):
        history = signals.gateways.setdefault(gateway, History())
        history.add(100.0, scrape({"200": 50, "500": 7}, first=50))
        history.add(200.0, scrape({"200": 90, "500": 8, "502": 1, "499": 5, "404": 2}, first=90))
    (found,) = collect(signals, "ns", "demo", "demo-1", 100.0)
    assert found.pod == "demo-1-rs-a"
    assert found.errors == 4, "500 and 502, from two gateways; a client that left or asked for nonsense is no fault"
    assert found.requests == 2 * (40 + 1 + 1 + 2)
    assert found.first_token.count == 80
    assert collect(signals, "ns", "demo", "other", 100.0) == []


def test_a_gateway_that_restarts_takes_nothing_away() -> None:
    signals = Signals()
    history = signals.gateways.setdefault("g1", History())
    history.add(100.0, scrape({"200": 50}))
    history.add(105.0, scrape({"200": 60}))
    history.add(110.0, scrape({"200": 4}), 1)
    (found,) = collect(signals, "ns", "demo", "demo-1", 100.0)
    assert found.requests == 14


def test_together_adds_up() -> None:
    both = together([pod("a", 10, 1), pod("b", 20, 2)], "both")
    assert (both.requests, both.errors, both.first_token.count) == (30, 3, 30)
