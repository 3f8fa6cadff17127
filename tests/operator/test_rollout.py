"""Rollouts: every strategy, by table and over thousands of histories on a simulated cluster."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.operator.simulation import BAD, OWNER, SETTINGS, Cluster, name_of, settled, spec_of

from mainsail_operator.observe import Revision
from mainsail_operator.plan import Apply, Delete, Mark, Scale, plan
from mainsail_operator.rollout import Situation, decide, failure
from mainsail_operator.settings import Settings
from mainsail_operator.status import status

STRATEGIES = ("RollingUpdate", "Canary", "BlueGreen")
CANARY: dict[str, Any] = {
    "strategy": "Canary",
    "steps": [{"weight": 10, "hold": "30s"}, {"weight": 50, "hold": "1m"}],
    "progressDeadline": "5m",
}  # fmt: skip
BLUE_GREEN: dict[str, Any] = {"strategy": "BlueGreen", "hold": "30s", "progressDeadline": "5m"}
ROLLING: dict[str, Any] = {"progressDeadline": "5m"}
OF = {"RollingUpdate": ROLLING, "Canary": CANARY, "BlueGreen": BLUE_GREEN}


def told(cluster: Cluster) -> dict[str, tuple[str, str]]:
    return {c.type: (c.status, c.reason) for c in cluster.written.conditions}


def run_until(cluster: Cluster, spec, phase: str, ticks: int = 200) -> None:
    for _ in range(ticks):
        if cluster.phase == phase:
            return
        cluster.pass_over(spec)
        cluster.advance()
        cluster.check()
    raise AssertionError(f"never {phase}: {cluster.events}")


# --- good revisions


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("replicas", [1, 3, 8])
def test_a_good_revision_is_promoted_and_nothing_is_missing(strategy: str, replicas: int) -> None:
    cluster, _ = settled(1, replicas, 2 * replicas)
    new = spec_of(2, replicas, **OF[strategy])
    cluster.settle(new, least=replicas)
    assert cluster.names == {name_of(new)}
    assert cluster.phase == "Complete"
    assert told(cluster)["RolloutComplete"] == ("True", "Complete")
    assert {"Reconciling", "Stalled"}.isdisjoint(told(cluster))


def test_a_canary_goes_step_by_step() -> None:
    cluster, old = settled(1, 4, 8)
    new, weights = spec_of(2, 4, **CANARY), []
    for _ in range(100):
        cluster.pass_over(new)
        cluster.advance()
        if not weights or weights[-1] != cluster.weight(name_of(new)):
            weights.append(cluster.weight(name_of(new)))
        if cluster.phase == "Complete":
            break
    assert weights[:3] == [0, 10, 50]
    assert weights[-1] == 100
    assert weights == sorted(weights)
    assert [e for e in cluster.events if e.startswith("Gating")] == ["Gating/1", "Gating/2"]
    cluster.settle(new, least=4)
    assert name_of(old) not in cluster.names


def test_blue_green_moves_the_requests_at_once_and_keeps_the_old_one_for_a_while() -> None:
    cluster, old = settled(1, 3, 6)
    new = spec_of(2, 3, **BLUE_GREEN)
    run_until(cluster, new, "Gating")
    cluster.pass_over(new)
    assert (cluster.weight(name_of(new)), cluster.weight(name_of(old))) == (100, 0)
    assert cluster.revisions[name_of(old)].serving == 3
    cluster.settle(new, least=3)
    assert cluster.names == {name_of(new)}


@pytest.mark.parametrize(("requests", "words"), [(40.0, "The gate has passed"), (0.0, "could not be judged in time")])
def test_what_was_not_judged_is_not_said_to_have_passed(requests: float, words: str) -> None:
    cluster, _ = settled(1, 2, 4)
    cluster.requests_per_tick = requests
    new = spec_of(2, 2, **BLUE_GREEN, gate={"onInconclusive": "Proceed"})
    run_until(cluster, new, "Promoting")
    assert cluster.rollout.reason == "GatePassed"
    assert words in cluster.rollout.message


def test_a_surge_is_a_quarter_at_a_time() -> None:
    cluster, _ = settled(1, 8, 100)
    new = spec_of(2, 8)
    most = 0
    for _ in range(60):
        cluster.pass_over(new)
        cluster.advance()
        most = max(most, sum(len(revision.alive) for revision in cluster.revisions.values()))
    assert cluster.phase == "Complete"
    assert most == 10


# --- bad ones


@pytest.mark.parametrize("like", BAD)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("replicas", [1, 4])
def test_a_bad_revision_is_rolled_back_by_itself(strategy: str, like: str, replicas: int) -> None:
    if strategy == "RollingUpdate" and like == "slow":
        pytest.skip("a RollingUpdate does not compare times")
    cluster, old = settled(1, replicas, 3 * replicas)
    new = spec_of(2, replicas, **OF[strategy])
    cluster.like[name_of(new)] = like
    cluster.settle(new, least=replicas)
    assert cluster.phase == "RolledBack"
    assert cluster.names == {name_of(old)}
    assert cluster.serving == replicas
    assert told(cluster)["Ready"] == ("True", "Serving")
    assert told(cluster)["Stalled"][0] == "True"
    reason = cluster.rollout.reason
    assert reason == {"broken": "MissingTensor", "stuck": "ProgressDeadlineExceeded", "crashing": "CrashLoop"}.get(
        like, "GateFailed"
    )
    assert cluster.weight(name_of(old)) == 100


@pytest.mark.parametrize("like", ["slow", "failing", "crashing"])
def test_a_bad_canary_never_gets_more_than_its_step(like: str) -> None:
    cluster, _ = settled(1, 4, 8)
    new = spec_of(2, 4, **CANARY)
    cluster.like[name_of(new)] = like
    for _ in range(100):
        cluster.pass_over(new)
        cluster.advance()
        assert cluster.weight(name_of(new)) <= 10
    assert cluster.phase == "RolledBack"


def test_a_rolling_update_whose_pods_fail_stops_where_it_is_when_it_may_not_go_back() -> None:
    cluster, old = settled(1, 8, 16)
    new = spec_of(2, 8, **OF["RollingUpdate"], autoRollback=False)
    cluster.like[name_of(new)] = "failing"
    for _ in range(60):
        cluster.pass_over(new)
        cluster.advance()
    assert (cluster.phase, cluster.rollout.reason) == ("Stalled", "GateFailed")
    assert cluster.names == {name_of(old), name_of(new)}
    assert cluster.weight(name_of(old)) == 100, "who fails gets no more requests"
    cluster.command = "rollback@1"
    cluster.settle(new)
    assert cluster.names == {name_of(old)}


@given(
    st.integers(1, 6),
    st.integers(0, 12),
    st.floats(4.0, 400.0),
    st.booleans(),
    st.sampled_from(["failing", "crashing"]),
)
@settings(max_examples=60, deadline=None)
def test_a_rolling_update_that_is_bad_never_costs_a_good_replica(
    replicas: int, spare: int, per_replica: float, room: bool, like: str
) -> None:
    """However many replicas, however much room and traffic: where it surges, all old ones are there until the end."""
    cluster, old = settled(1, replicas, replicas + (spare + 1 if room else 0))
    cluster.requests_per_tick = per_replica * replicas
    new = spec_of(2, replicas, **ROLLING)
    cluster.like[name_of(new)] = like
    for _ in range(150):
        cluster.pass_over(new)
        cluster.advance()
        missing = 1 if cluster.rollout.drain_first else 0
        assert cluster.revisions[name_of(old)].serving >= replicas - missing, cluster.events
        if cluster.phase == "RolledBack":
            break
    cluster.settle(new)
    assert cluster.names == {name_of(old)}
    assert cluster.serving == replicas


@pytest.mark.parametrize(("requests", "most_s"), [(0.0, 20 + 4 * 35), (0.1, 20 + 4 * 75), (40.0, 20 + 4 * 75)])
def test_a_rolling_update_ends_in_time_with_and_without_requests(requests: float, most_s: float) -> None:
    cluster, _ = settled(1, 4, 8)
    cluster.requests_per_tick = requests
    new, began = spec_of(2, 4, **ROLLING), cluster.now
    while cluster.phase != "Complete" or cluster.rollout.target != name_of(new):
        cluster.pass_over(new)
        cluster.advance()
        assert cluster.now - began <= most_s


def test_a_new_replica_replaces_an_old_one_once_it_has_proven_itself() -> None:
    cluster, old = settled(1, 1, 2)
    new = spec_of(2, 1, minReady="30s")
    until_promoting(cluster, new, old)
    (pod,) = cluster.revisions[name_of(new)].pods
    assert cluster.now - pod.progress >= 30
    cluster.settle(new, least=1)
    assert cluster.names == {name_of(new)}


def until_promoting(cluster: Cluster, new, old) -> None:
    while True:
        assert cluster.revisions[name_of(old)].serving == old.replicas
        cluster.pass_over(new)
        if cluster.phase == "Promoting":
            return
        cluster.advance()


def test_what_it_is_watched_for_is_said() -> None:
    cluster, _ = settled(1, 2, 4)
    new, said = spec_of(2, 2), []
    for _ in range(30):
        cluster.pass_over(new)
        cluster.advance()
        said.append(cluster.rollout)
    proving = next(one for one in said if one.reason == "Proving")
    assert "0 of 2 replicas of the newest revision have proven themselves; 1 more serve" in proving.message
    promoting = next(one for one in said if one.phase == "Promoting")
    assert promoting.since == proving.since, "what was seen of the first pod goes on counting"
    assert cluster.phase == "Complete"


def test_an_operator_that_was_not_there_watches_for_itself() -> None:
    """The next operator does not know what the gateways said to the one before."""
    cluster, old = settled(1, 1, 2)
    new = spec_of(2, 1)
    for _ in range(6):
        cluster.pass_over(new)
        cluster.advance()
    assert cluster.phase == "Starting"
    cluster.pass_over(new, killed_after=0)
    began = cluster.now
    until_promoting(cluster, new, old)
    assert cluster.now - began >= 20


def test_time_to_prove_itself_is_no_standstill_and_only_for_who_serves() -> None:
    cluster, _ = settled(1, 1, 2)
    slow = {"minReady": "60s", "progressDeadline": "30s"}
    cluster.settle(spec_of(2, 1, **slow), least=1)
    assert cluster.phase == "Complete"
    new, began = spec_of(3, 1, **slow), cluster.now
    cluster.like[name_of(new)] = "stuck"
    run_until(cluster, new, "RolledBack")
    assert cluster.now - began < 60


def test_growth_in_the_middle_of_a_roll_waits_for_no_proof() -> None:
    cluster, _ = settled(1, 2, 20)
    for _ in range(3):
        cluster.pass_over(spec_of(2, 2))
        cluster.advance()
    grown = spec_of(2, 8)
    for _ in range(3):
        cluster.pass_over(grown)
        cluster.advance()
    assert cluster.serving >= 8
    cluster.settle(grown, least=8)


def test_an_old_revision_that_does_not_serve_is_replaced_at_once() -> None:
    cluster, old = settled(1, 4, 20)
    revision = cluster.revisions[name_of(old)]
    cluster.like[name_of(old)] = "stuck"
    cluster.revisions[name_of(old)] = replace(revision, pods=tuple(replace(p, serving=False) for p in revision.pods))
    new = spec_of(2, 4)
    for _ in range(4):
        cluster.pass_over(new)
        cluster.advance()
    assert cluster.revisions[name_of(new)].serving == 4


def test_a_rolling_update_promoted_by_hand_is_not_judged() -> None:
    cluster, _ = settled(1, 4, 12)
    new = spec_of(2, 4, **OF["RollingUpdate"])
    cluster.like[name_of(new)] = "failing"
    cluster.pass_over(new)
    cluster.command = "promote@1"
    cluster.settle(new, least=4)
    assert (cluster.phase, cluster.names) == ("Complete", {name_of(new)})


def test_a_revision_that_was_rolled_back_is_not_tried_again_until_it_is_told_to() -> None:
    cluster, old = settled(1, 2, 6)
    new = spec_of(2, 2, **CANARY)
    cluster.like[name_of(new)] = "broken"
    cluster.settle(new, least=2)
    events = len(cluster.events)
    for _ in range(100):
        assert cluster.pass_over(new).actions == ()
        cluster.advance()
    assert len(cluster.events) == events
    cluster.like.clear()
    cluster.command = "retry"
    cluster.settle(new, least=2)
    assert cluster.names == {name_of(new)}
    assert name_of(old) not in cluster.names


def test_without_auto_rollback_it_stops_and_says_so() -> None:
    cluster, old = settled(1, 2, 6)
    new = spec_of(2, 2, **CANARY, autoRollback=False)
    cluster.like[name_of(new)] = "failing"
    cluster.settle(new, least=2)
    assert cluster.phase == "Stalled"
    assert told(cluster)["Stalled"] == ("True", "GateFailed")
    assert (cluster.weight(name_of(new)), cluster.weight(name_of(old))) == (0, 100)
    cluster.command = "promote"
    cluster.settle(new, least=2)
    assert cluster.names == {name_of(new)}


def test_the_first_revision_stalls_and_mends() -> None:
    cluster, spec = Cluster(4), spec_of(1, 2)
    cluster.like[name_of(spec)] = "broken"
    cluster.settle(spec)
    assert told(cluster)["Stalled"] == ("True", "MissingTensor")
    cluster.like.clear()
    cluster.settle(spec)
    assert told(cluster)["Ready"] == ("True", "Serving")
    assert cluster.phase == "Complete"


# --- changes on the way


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("passes", range(0, 16, 3))
def test_reverting_the_spec_is_a_way_back_and_no_third_revision(strategy: str, passes: int) -> None:
    cluster, old = settled(1, 3, 6, **OF[strategy])
    new, ever = spec_of(2, 3, **OF[strategy]), set()
    for _ in range(passes):
        cluster.pass_over(new)
        cluster.advance()
    for _ in range(60):
        cluster.pass_over(old)
        cluster.advance()
        cluster.check()
        ever |= cluster.names
        assert cluster.serving >= 3
    assert cluster.names == {name_of(old)}
    assert cluster.phase == "Complete"
    assert ever <= {name_of(old), name_of(new)}
    assert told(cluster)["RolloutComplete"] == ("True", "Complete")


def test_a_change_on_the_way_starts_anew_with_the_same_stable_revision() -> None:
    cluster, old = settled(1, 3, 12)
    first, second = spec_of(2, 3, **CANARY), spec_of(3, 3, **CANARY)
    run_until(cluster, first, "Gating")
    cluster.pass_over(second)
    rollout = cluster.rollout
    assert (rollout.phase, rollout.target, rollout.stable) == ("Starting", name_of(second), name_of(old))
    cluster.like[name_of(second)] = "failing"
    cluster.settle(second, least=3)
    assert cluster.names == {name_of(old)}


# --- by hand


def test_pause_holds_and_resume_goes_on() -> None:
    cluster, _ = settled(1, 2, 8)
    new = spec_of(2, 2, **CANARY)
    run_until(cluster, new, "Gating")
    cluster.command = "pause"
    for _ in range(60):
        cluster.pass_over(new)
        cluster.advance()
        assert (cluster.phase, cluster.rollout.step) == ("Gating", 1)
    assert told(cluster)["Reconciling"] == ("True", "Paused")
    cluster.command = ""
    cluster.settle(new, least=2)
    assert cluster.names == {name_of(new)}


def test_pause_does_not_keep_a_bad_revision() -> None:
    cluster, old = settled(1, 2, 8)
    new = spec_of(2, 2, **CANARY)
    cluster.like[name_of(new)] = "failing"
    run_until(cluster, new, "Gating")
    cluster.command = "pause"
    cluster.settle(new, least=2)
    assert cluster.names == {name_of(old)}


def test_promote_skips_the_gate_once() -> None:
    cluster, _ = settled(1, 2, 8)
    second, third = spec_of(2, 2, **CANARY), spec_of(3, 2, **CANARY)
    run_until(cluster, second, "Gating")
    cluster.command = "promote@1"
    cluster.settle(second, least=2)
    assert "Gating/2" not in cluster.events
    run_until(cluster, third, "Gating")
    for _ in range(3):
        cluster.pass_over(third)
        cluster.advance()
        assert cluster.phase == "Gating", "the same command is not carried out twice"
    cluster.command = "promote@2"
    cluster.pass_over(third)
    assert cluster.phase == "Promoting"


def test_rollback_by_hand() -> None:
    cluster, old = settled(1, 2, 8)
    new = spec_of(2, 2, **CANARY)
    run_until(cluster, new, "Gating")
    cluster.command = "rollback"
    cluster.settle(new, least=2)
    assert cluster.names == {name_of(old)}
    assert cluster.rollout.reason == "RolledBackByHand"


# --- room


@pytest.mark.parametrize("strategy", STRATEGIES)
@given(replicas=st.integers(1, 5))
@settings(max_examples=10, deadline=None)
def test_without_room_one_at_a_time_is_replaced(strategy: str, replicas: int) -> None:
    cluster, _ = settled(1, replicas, replicas)
    new = spec_of(2, replicas, **OF[strategy])
    cluster.settle(new, least=replicas - (1 if strategy != "Canary" else (replicas + 1) // 2))
    assert cluster.names == {name_of(new)}
    assert cluster.serving == replicas


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_without_room_it_says_so(strategy: str) -> None:
    cluster, _ = settled(1, 2, 2)
    new = spec_of(2, 2, **OF[strategy])
    reasons = set()
    for _ in range(200):
        cluster.pass_over(new)
        cluster.advance()
        reasons.add(told(cluster).get("Reconciling", ("", ""))[1])
    assert "DrainFirst" in reasons
    assert cluster.phase == "Complete"


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_surge_waits_for_room_and_rolls_back_at_the_deadline(strategy: str) -> None:
    cluster, old = settled(1, 2, 2)
    new = spec_of(2, 2, **OF[strategy], gpuPolicy="Surge")
    cluster.settle(new, least=2)
    assert cluster.names == {name_of(old)}
    assert cluster.rollout.reason == "ProgressDeadlineExceeded"
    assert "nvidia.com/gpu" in cluster.rollout.message


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("replicas", [1, 3])
def test_no_replica_makes_way_for_one_that_cannot_be_made_yet(strategy: str, replicas: int) -> None:
    """The new model is on its way for an hour, or the API server refuses the Deployment: the old replicas serve on."""
    cluster, old = settled(1, replicas, replicas)
    new = spec_of(2, replicas, **OF[strategy], gpuPolicy="DrainFirst")
    for _ in range(10):
        decision = cluster.decision(new)
        assert decision.replicas[name_of(old)] == replicas
        waiting = plan(OWNER, new, cluster.observed(), SETTINGS, decision, {}, makes=False)
        assert not [action for action in waiting.actions if isinstance(action, Scale | Delete)]
        cluster.pass_over(new, killed_after=1)
        cluster.advance()
    cluster.settle(new, least=replicas - 1)
    assert cluster.names == {name_of(new)}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_drain_first_never_has_more_pods_than_replicas(strategy: str) -> None:
    cluster, _ = settled(1, 3, 10)
    new = spec_of(2, 3, **OF[strategy], gpuPolicy="DrainFirst")
    for _ in range(300):
        cluster.pass_over(new)
        assert sum(max(revision.replicas, 0) for revision in cluster.revisions.values()) <= 3
        cluster.advance()
        assert cluster.serving >= 1
    assert cluster.phase == "Complete"
    assert cluster.names == {name_of(new)}


def test_a_full_quota_is_no_room() -> None:
    cluster, _ = settled(1, 2, 8)
    new = spec_of(2, 2)
    cluster.pass_over(new)
    name = name_of(new)
    cluster.revisions[name] = replace(cluster.revisions[name], refusal='pods "x" is forbidden: exceeded quota: gpus')
    assert cluster.decision(new).status.drain_first


@pytest.mark.parametrize(
    "refusal",
    [
        'persistentvolumeclaim "typo" not found',
        "0/1 nodes are available: 1 node(s) didn't match Pod's node affinity/selector.",
    ],
)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_pod_that_no_room_would_help_never_costs_an_old_one(refusal: str, strategy: str) -> None:
    cluster, _ = settled(1, 1, 1)
    cluster.refusal = refusal
    new = spec_of(2, 1, **OF[strategy])
    for _ in range(40):
        cluster.pass_over(new)
        cluster.advance()
        assert cluster.serving == 1


# --- scale


@pytest.mark.parametrize("strategy", ["Canary", "BlueGreen"])
def test_replicas_change_in_the_middle(strategy: str) -> None:
    cluster, _ = settled(1, 2, 20)
    run_until(cluster, spec_of(2, 2, **OF[strategy]), "Gating")
    grown = spec_of(2, 6, **OF[strategy])
    for _ in range(3):
        cluster.pass_over(grown)
        cluster.advance()
    assert cluster.serving >= 6
    cluster.settle(grown, least=6)
    assert cluster.serving == 6


def test_to_zero_in_the_middle_of_a_canary_and_back() -> None:
    cluster, _ = settled(1, 2, 20)
    new = spec_of(2, 2, **CANARY)
    cluster.requests_per_tick = 0
    cluster.like[name_of(new)] = "failing"
    run_until(cluster, new, "Gating")
    for _ in range(20):
        cluster.pass_over(spec_of(2, 0, **CANARY))
        cluster.advance()
    assert cluster.serving == 0
    assert cluster.phase == "Gating", "what has not been proven is not promoted by being asleep"
    cluster.requests_per_tick = 40
    cluster.settle(new)
    assert cluster.phase == "RolledBack"


def test_the_time_asleep_or_paused_or_fetching_does_not_count_against_a_revision() -> None:
    cluster, _ = settled(1, 2, 20)
    asleep, new = spec_of(2, 0, **CANARY), spec_of(2, 2, **CANARY)
    cluster.pass_over(new)
    cluster.pass_over(asleep)
    cluster.now += 3600
    cluster.pass_over(asleep)
    cluster.settle(new)
    assert cluster.phase == "Complete"

    cluster, _ = settled(1, 2, 20)
    cluster.command = "pause"
    cluster.pass_over(new)
    cluster.now += 3600
    cluster.pass_over(new)
    cluster.command = ""
    cluster.settle(new, least=2)
    assert cluster.phase == "Complete"

    cluster, _ = settled(1, 2, 20)
    cluster.pass_over(new, killed_after=1)
    cluster.now += 3600
    made = datetime.fromtimestamp(cluster.now, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    fresh = Revision(revision="x", name=name_of(new), replicas=1, created=made)
    assert failure(fresh, 1, cluster.now - 3600, 300, cluster.now) is None
    assert failure(fresh, 1, cluster.now - 3600, 300, cluster.now + 400) is not None


def test_a_rolled_back_service_wakes_from_zero_with_the_stable_revision() -> None:
    cluster, old = settled(1, 2, 20)
    new = spec_of(2, 2, **CANARY)
    cluster.like[name_of(new)] = "broken"
    cluster.settle(new)
    for _ in range(5):
        cluster.pass_over(spec_of(2, 0, **CANARY))
        cluster.advance()
    assert cluster.serving == 0
    cluster.settle(new)
    assert cluster.names == {name_of(old)}
    assert cluster.serving == 2


# --- state


def test_an_upgrade_of_the_operator_restarts_nothing() -> None:
    cluster, spec = settled(1, 2, 4)
    decision = cluster.decision(spec)
    for other in (SETTINGS, Settings(engine_image="engine:2", engine_image_pull_policy="Always")):
        assert plan(OWNER, spec, cluster.observed(), other, decision, {}).actions == ()


def test_without_the_status_the_proven_revision_is_still_the_stable_one() -> None:
    cluster, old = settled(1, 2, 8)
    new = spec_of(2, 2, **CANARY)
    run_until(cluster, new, "Gating")
    decision = decide(None, cluster.situation(new))
    assert decision.status.stable == name_of(old)
    assert decision.replicas[name_of(old)] == 2


def test_a_stable_revision_that_was_deleted_by_hand_is_forgotten() -> None:
    cluster, old = settled(1, 2, 8)
    new = spec_of(2, 2, **CANARY)
    run_until(cluster, new, "Gating")
    del cluster.revisions[name_of(old)]
    cluster.settle(new)
    assert cluster.names == {name_of(new)}


def test_a_decision_is_a_fixed_point_of_itself() -> None:
    cluster, _ = settled(1, 3, 8)
    new = spec_of(2, 3, **CANARY)
    for _ in range(40):
        cluster.pass_over(new)
        again = cluster.decision(new)
        written = cluster.rollout
        assert (again.status.phase, again.status.step, again.status.since) == (
            written.phase, written.step, written.since,
        ) or again.status.phase != written.phase  # fmt: skip
        cluster.advance()


def test_scale_writes_replicas_of_the_deployment_only() -> None:
    cluster, _ = settled(1, 2, 8)
    more = spec_of(1, 5)
    (action,) = plan(OWNER, more, cluster.observed(), SETTINGS, cluster.decision(more), {}).actions
    assert isinstance(action, Scale)
    assert action.replicas == 5


def test_the_least_loaded_pods_are_marked_to_go_first() -> None:
    cluster, _ = settled(1, 3, 8)
    (name,) = cluster.names
    pods = tuple(replace(pod, uid=f"u{i}") for i, pod in enumerate(cluster.revisions[name].pods))
    cluster.revisions[name] = replace(cluster.revisions[name], pods=pods)
    fewer = spec_of(1, 2)
    loads = {"u0": 3.0, "u1": 0.0, "u2": 1.0}
    actions = plan(OWNER, fewer, cluster.observed(), SETTINGS, cluster.decision(fewer), loads).actions
    assert [type(action) for action in actions] == [Mark, Mark, Scale], "cost 0 is what a pod without a mark has"
    costs = {action.name: action.cost for action in actions if isinstance(action, Mark)}
    assert costs == {pods[0].name: 300, pods[2].name: 100}
    unknown = plan(OWNER, fewer, cluster.observed(), SETTINGS, cluster.decision(fewer), {"u0": 3.0}).actions
    assert [type(action) for action in unknown] == [Scale]


def test_a_new_service_gets_its_children_first() -> None:
    cluster, spec = Cluster(4), spec_of(1, 2)
    kinds = [a.manifest["kind"] for a in cluster.pass_over(spec).actions if isinstance(a, Apply)]
    assert kinds[-1] == "Deployment"
    assert set(kinds) == {"ServiceAccount", "Service", "PodDisruptionBudget", "NetworkPolicy", "Deployment"}


def test_a_child_that_a_setting_takes_away_is_deleted() -> None:
    cluster, spec = settled(1, 1, 4)
    without = replace(SETTINGS, network_policy=False)
    (action,) = plan(OWNER, spec, cluster.observed(), without, cluster.decision(spec), {}).actions
    assert isinstance(action, Delete)
    assert (action.kind, action.name) == ("NetworkPolicy", "demo")


# --- histories

Step = tuple[int, int, str, int, str, int | None]


@st.composite
def histories(draw: st.DrawFn) -> list[Step]:
    """Model, replicas, strategy, passes, command, and after how many writes of the last pass the operator is killed."""
    return draw(
        st.lists(
            st.tuples(
                st.integers(1, 4),
                st.integers(0, 4),
                st.sampled_from(STRATEGIES),
                st.integers(0, 14),
                st.sampled_from(["", "", "", "pause", "promote@1", "promote@2", "rollback@1", "retry@1"]),
                st.none() | st.integers(0, 3),
            ),
            min_size=1,
            max_size=8,
        )
    )


ANY = (
    histories(),
    st.integers(1, 9),
    st.sampled_from(["Auto", "Auto", "DrainFirst"]),
    st.dictionaries(st.integers(2, 4), st.sampled_from(BAD), max_size=2),
)


@given(*ANY)
@example(history=[(2, 1, "RollingUpdate", 1, "", None), (3, 2, "Canary", 2, "", 1), (1, 2, "Canary", 0, "", None)],
         room=2, policy="Auto", bad={})  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_any_history_ends_well(history: list[Step], room: int, policy: str, bad: dict[int, str]) -> None:
    ends_well(history, room, policy, bad)


@pytest.mark.slow
@given(*ANY)
@settings(max_examples=5000, deadline=None, database=None)
def test_thousands_of_histories_end_well(history: list[Step], room: int, policy: str, bad: dict[int, str]) -> None:
    ends_well(history, room, policy, bad)


def ends_well(history: list[Step], room: int, policy: str, bad: dict[int, str]) -> None:
    """Specs, replicas, strategies, commands and kills in any order, good and bad revisions, any room. Then nothing more
    is asked: the last spec's revision serves if it is good; if not, an older one that is, if there was one."""
    cluster = Cluster(room)

    def spec(model: int, replicas: int, strategy: str):
        made = spec_of(model, replicas, **OF[strategy], gpuPolicy=policy)
        if model in bad:
            cluster.like[name_of(made)] = bad[model]
        return made

    for model, replicas, strategy, passes, command, killed_after in history:
        cluster.command = command
        for number in range(passes):
            last = number == passes - 1
            cluster.pass_over(spec(model, replicas, strategy), killed_after=killed_after if last else None)
            cluster.advance()
            cluster.check()
    cluster.command = "resume"
    model, replicas, strategy, *_ = history[-1]
    last = spec(model, replicas, strategy)
    if replicas > room:
        last = spec(model, room, strategy)
    cluster.settle(last)
    like = cluster.like.get(name_of(last), "good")
    if cluster.phase == "Complete":
        assert cluster.names == {name_of(last)}
        if like == "good":
            assert cluster.serving == last.replicas
    elif cluster.phase == "RolledBack":
        assert cluster.names == {cluster.rollout.stable}
    if like == "good":
        by_hand = "by hand" in cluster.rollout.message
        asleep = last.replicas == 0 and cluster.serving == 0
        assert cluster.phase == "Complete" or by_hand or asleep, cluster.written.rollout
    told_ = status(OWNER, last, 1, cluster.observed(), cluster.decision(last), [], cluster.now, settings=SETTINGS)
    assert {c.type for c in told_.conditions} >= {"Ready", "ModelLoaded", "RolloutComplete"}


@given(st.sampled_from(STRATEGIES), st.sampled_from(("good", *BAD)), st.integers(1, 4), st.integers(0, 60),
       st.integers(0, 3))  # fmt: skip
@settings(max_examples=120, deadline=None)
def test_killed_anywhere_it_ends_the_same(strategy: str, like: str, replicas: int, tick: int, writes: int) -> None:
    """A kill at any tick, after any number of writes: the next operator ends where the first would have."""
    if strategy == "RollingUpdate" and like == "slow":
        return  # it does not compare times
    cluster, old = settled(1, replicas, 3 * replicas)
    new = spec_of(2, replicas, **OF[strategy])
    if like != "good":
        cluster.like[name_of(new)] = like
    for _ in range(tick):
        cluster.pass_over(new)
        cluster.advance()
    cluster.pass_over(new, killed_after=writes)
    cluster.advance()
    cluster.settle(new, least=replicas)
    assert cluster.names == {name_of(new if like == "good" else old)}


def test_a_situation_without_anything_is_a_first_start() -> None:
    spec = spec_of(1, 2)
    decision = decide(
        None, Situation(spec=spec.rollout, target=name_of(spec), desired=2, observed=Cluster(1).observed())
    )
    assert decision.status.phase == "Starting"
    assert decision.replicas == {name_of(spec): 2}
