"""Rollouts behind a gate, on the real cluster, with real engines (a tiny model of random weights) and real traffic.

Three services share the time: one gets a good canary while its operator is killed in every phase, one a canary that
answers with errors, one a canary that is slow. What each must show is in `status.rollout`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from e2e import tiny
from e2e.cluster.place import Place
from e2e.faults import with_fault
from e2e.kube import Kube, KubectlError, Object, condition, wait_for
from e2e.services import pods, service, steady_traffic, wait_ready, wait_routed

NAMES = ("steps", "errors", "slowness")
CANARY = {
    "strategy": "Canary",
    "steps": [{"weight": 40, "hold": "3s"}],
    "gate": {"minRequests": 20, "maxTimeToFirstTokenRatio": 1000, "maxInterTokenRatio": 1000},
    "progressDeadline": "15m",
}  # fmt: skip


@pytest.fixture(scope="module")
def services(cluster: Place, kube: Kube, gateway_url: str) -> Iterator[None]:
    tiny.write(cluster.models / "tiny")
    kube.apply(*(canary(name) for name in NAMES))
    for name in NAMES:
        wait_ready(kube, name)
        wait_routed(gateway_url, name)
    yield
    for name in NAMES:
        kube.delete("mis", name, wait=False)


def canary(name: str, rollout: Object | None = None, **engine: Any) -> Object:
    found = service(name, uri="pvc://models/tiny", **engine)
    found["spec"]["rollout"] = CANARY | (rollout or {})
    found["spec"]["drain"] = {"timeout": "20s"}
    return found


def rollout(kube: Kube, name: str) -> Object:
    return (kube.get("mis", name) or {}).get("status", {}).get("rollout", {})


def wait_phase(kube: Kube, name: str, *phases: str, target_not: str = "") -> Object:
    def check() -> Object | None:
        found = rollout(kube, name)
        return found if found.get("phase") in phases and found.get("target") != target_not else None

    return wait_for(f"{name}: {' or '.join(phases)}", check, story=kube.story)


def kill_operator(kube: Kube) -> None:
    kube.run("delete", "pods", "-n", "mainsail-system", "-l", "app.kubernetes.io/component=operator",
             "--grace-period=0", "--force")  # fmt: skip


def uids(kube: Kube, name: str) -> dict[str, int]:
    """The pods by UID, with their restarts."""
    return {pod["metadata"]["uid"]: sum(c["restartCount"] for c in pod["status"]["containerStatuses"])
            for pod in pods(kube, name)}  # fmt: skip


def wait_events(kube: Kube, name: str, *reasons: str) -> None:
    """Until each of them has been told: an event follows the status that it is about."""

    def missing() -> set[str]:
        return set(reasons) - {e["reason"] for e in kube.list("events") if e["involvedObject"]["name"] == name}

    wait_for(f"{name}'s events {', '.join(reasons)}", lambda: not missing(), story=lambda: f"missing: {missing()}")


def test_good_faulty_and_slow_canaries(kube: Kube, gateway_url: str, services: None) -> None:
    stable = {name: rollout(kube, name)["target"] for name in NAMES}
    before = {name: uids(kube, name) for name in NAMES}
    good = canary("steps", maxNumSeqs=12)
    faulty = with_fault(canary("errors"), error_rate=0.5)
    # Far beyond what a busy machine adds to the stable revision's own times. The others' times are no matter.
    gate = {"gate": CANARY["gate"] | {"maxTimeToFirstTokenRatio": 2}}
    slow = with_fault(canary("slowness", gate), delay_s=8)
    with (
        steady_traffic(gateway_url, "steps", streams=3, max_tokens=8) as traffic,
        steady_traffic(gateway_url, "errors", streams=3, max_tokens=8),
        steady_traffic(gateway_url, "slowness", streams=12, max_tokens=8),
        ThreadPoolExecutor(3) as pool,
    ):
        kube.apply(good, faulty, slow)
        runs = [pool.submit(_killed_in_every_phase, kube, stable["steps"])]
        runs += [pool.submit(_rolled_back, kube, name, stable[name]) for name in ("errors", "slowness")]
        promoted, failed, late = (run.result() for run in runs)
    assert traffic.failures == []
    assert promoted["target"] != stable["steps"]
    assert len(pods(kube, "steps")) == 1
    assert (failed["reason"], late["reason"]) == ("GateFailed", "GateFailed")
    assert "failed" in failed["message"]
    assert "time to the first token" in late["message"]
    for name in ("errors", "slowness"):
        assert uids(kube, name) == before[name], "the stable revision was never touched"
        obj = kube.get("mis", name)
        assert condition(obj, "Stalled")["reason"] == "GateFailed"
        assert condition(obj, "Ready")["status"] == "True"
        wait_events(kube, name, "RolloutStarted", "RolloutGating", "RolloutFailed")
    wait_events(kube, "steps", "RolloutGating", "RolloutPromoting", "RolloutComplete")


def _killed_in_every_phase(kube: Kube, stable: str) -> Object:
    for phases in (("Starting",), ("Gating",), ("Promoting", "Complete")):
        found = wait_phase(kube, "steps", *phases, target_not=stable)
        if found["phase"] != "Starting":  # who is killed between a status and its event has told less than it did
            wait_events(kube, "steps", f"Rollout{found['phase']}")
        kill_operator(kube)
    return wait_phase(kube, "steps", "Complete", target_not=stable)


def _rolled_back(kube: Kube, name: str, stable: str) -> Object:
    return wait_phase(kube, name, "RolledBack", target_not=stable)


def test_a_revision_without_a_model_rolls_back_and_reverting_is_the_end_of_it(
    kube: Kube, gateway_url: str, services: None
) -> None:
    before, found = uids(kube, "steps"), kube.get("mis", "steps")
    assert found is not None
    bad = canary("steps", maxNumSeqs=12)
    bad["spec"]["model"]["uri"] = "pvc://models/no-such-model"
    with steady_traffic(gateway_url, "steps", streams=2, max_tokens=8) as traffic:
        kube.apply(bad)
        rolled = wait_phase(kube, "steps", "RolledBack")
        assert rolled["reason"] == "ModelNotFound"
        assert "no-such-model" in rolled["message"]
        kube.apply(canary("steps", maxNumSeqs=12))
        wait_ready(kube, "steps")
    assert traffic.failures == []
    assert uids(kube, "steps") == before
    assert rollout(kube, "steps")["phase"] == "Complete"


@pytest.mark.slow
def test_commands_and_blue_green_and_a_thousand_requests(kube: Kube, gateway_url: str, services: None) -> None:
    """pause, promote and rollback by annotation; BlueGreen; no request of a thousand fails."""

    def order(command: str) -> None:
        kube.run("annotate", "mis/steps", f"mainsail.dev/rollout={command}", "--overwrite")

    first = rollout(kube, "steps")["target"]
    with steady_traffic(gateway_url, "steps", streams=6, max_tokens=4) as traffic:
        order("pause")
        kube.apply(canary("steps", {"gate": CANARY["gate"] | {"minRequests": 5}}, maxNumSeqs=9))
        time.sleep(5)
        assert rollout(kube, "steps")["reason"] == "Paused"
        order("resume")
        wait_phase(kube, "steps", "Gating", target_not=first)
        order("rollback@1")
        assert wait_phase(kube, "steps", "RolledBack")["reason"] == "RolledBackByHand"
        order("retry@1")
        wait_phase(kube, "steps", "Gating")
        order("promote@1")
        wait_phase(kube, "steps", "Complete", target_not=first)
        blue_green = {"strategy": "BlueGreen", "steps": [], "hold": "5s"}
        kube.apply(canary("steps", blue_green, maxNumSeqs=8))
        wait_phase(kube, "steps", "Gating")
        wait_for("all the requests on the new revision", lambda: _weights(kube, "steps")[:1] == [100])
        wait_phase(kube, "steps", "Complete")
        wait_for("a thousand requests", lambda: traffic.completed >= 1000)
    assert traffic.failures == []


def _weights(kube: Kube, name: str) -> list[int]:
    return [r["weight"] for r in (kube.get("mis", name) or {})["status"]["revisions"]]


@pytest.mark.slow
def test_an_evicted_replica_finishes_what_it_has_and_one_goes_at_a_time(
    kube: Kube, gateway_url: str, services: None
) -> None:
    """What `kubectl drain` does to a node: evictions, one after another, held back by the disruption budget."""
    kube.run("scale", "mis/slowness", "--replicas=2")
    wait_for("two replicas", lambda: _serving(kube, "slowness") == 2, story=kube.story)
    first, second = pods(kube, "slowness")
    with steady_traffic(gateway_url, "slowness", streams=4, max_tokens=32) as traffic:
        evict(kube, first)
        with pytest.raises(KubectlError, match="disruption budget"):
            evict(kube, second)
        wait_for("two replicas again", lambda: _serving(kube, "slowness") == 2, story=kube.story)
    assert traffic.failures == []
    kube.run("scale", "mis/slowness", "--replicas=1")


def _serving(kube: Kube, name: str) -> int:
    return (kube.get("mis", name) or {})["status"]["servingReplicas"]


def evict(kube: Kube, pod: Object) -> None:
    metadata = {key: pod["metadata"][key] for key in ("name", "namespace")}
    body = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": metadata}
    path = f"/api/v1/namespaces/{metadata['namespace']}/pods/{metadata['name']}/eviction"
    kube.run("create", "--raw", path, "-f", "-", stdin=json.dumps(body))


@pytest.mark.slow
def test_a_revision_that_keeps_crashing_rolls_back(kube: Kube, gateway_url: str, services: None) -> None:
    before = uids(kube, "errors")
    crashing = canary("errors", maxNumSeqs=7)
    crashing["spec"]["resources"] = {"requests": {"cpu": "50m", "memory": "64Mi"}, "limits": {"memory": "64Mi"}}
    kube.apply(crashing)
    found = wait_for("back by itself", lambda: (r := rollout(kube, "errors"))["phase"] == "RolledBack" and
                     r["reason"] != "GateFailed" and r, story=kube.story)  # fmt: skip
    assert found["reason"] in ("OOMKilled", "CrashLoop"), json.dumps(found)
    assert uids(kube, "errors") == before


def test_a_rolling_update_that_fails_its_requests_goes_back(cluster: Place, kube: Kube, gateway_url: str) -> None:
    """Without steps: a new replica has to serve well for a while before it replaces an old one; this one does not."""
    tiny.write(cluster.models / "tiny")
    plain = service("plain", uri="pvc://models/tiny", replicas=2)
    plain["spec"] |= {"drain": {"timeout": "20s"}, "rollout": {"minReady": "10s"}}
    kube.apply(plain)
    try:
        wait_ready(kube, "plain", serving=2)
        wait_routed(gateway_url, "plain")
        before, stable = uids(kube, "plain"), rollout(kube, "plain")["target"]
        with steady_traffic(gateway_url, "plain", streams=4, max_tokens=4):
            kube.apply(with_fault(plain, error_rate=0.5))
            found = wait_phase(kube, "plain", "RolledBack", target_not=stable)
        assert found["reason"] == "GateFailed"
        assert "maxErrorRate" in found["message"]
        assert uids(kube, "plain") == before, "no old replica ended"
    finally:
        kube.delete("mis", "plain", wait=False)
