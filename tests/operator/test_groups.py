"""Replicas of several pods: what is made of a spec, and several pods read as one replica."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mainsail_operator import groups, objects
from mainsail_operator.gpus import Node, room
from mainsail_operator.observe import Deployment, Observed, Pod, Revision, Trouble, observe, read_group_set, read_pod
from mainsail_operator.plan import Apply, Delete, Scale, plan
from mainsail_operator.rollout import Situation, decide
from mainsail_operator.status import status
from mainsail_operator.types import InferenceServiceSpec

STAGED = {"engine": {"pipelineParallelSize": 3, "tensorParallelSize": 2}, "replicas": 2}


def chosen(selector: dict, labels: dict) -> bool:
    return selector["matchLabels"].items() <= labels.items()


def test_a_revision_is_a_set_of_groups(owner, make_spec, settings) -> None:
    made = groups.workload(owner, make_spec(**STAGED), 2, settings)
    assert (made["apiVersion"], made["kind"]) == ("leaderworkerset.x-k8s.io/v1", "LeaderWorkerSet")
    assert made["spec"]["replicas"] == 2
    group = made["spec"]["leaderWorkerTemplate"]
    assert (group["size"], group["restartPolicy"]) == (3, "None")
    leader, worker = group["leaderTemplate"], group["workerTemplate"]
    assert leader["spec"] == worker["spec"], "the same pod, with another place"
    engine = leader["spec"]["containers"][0]
    flags = dict(zip(engine["args"], engine["args"][1:], strict=False))
    assert flags["--pipeline-parallel-size"] == "3"
    assert flags["--tensor-parallel-size"] == "2"
    assert flags["--nnodes"] == "$(LWS_GROUP_SIZE)"
    assert flags["--node-rank"] == "$(LWS_WORKER_INDEX)"
    assert (flags["--master-addr"], flags["--master-port"]) == ("$(LWS_LEADER_ADDRESS)", "29500")
    assert {e["name"] for e in engine["env"]}.isdisjoint({"GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"})
    assert engine["resources"]["limits"] == {"nvidia.com/gpu": "2"}
    assert made["metadata"]["ownerReferences"][0]["uid"] == owner.uid


def test_one_pod_is_a_deployment_as_ever(owner, make_spec, settings) -> None:
    spec = make_spec()
    assert groups.workload(owner, spec, 1, settings) == objects.deployment(owner, spec, 1, settings)
    assert objects.revision_of(spec) == objects.revision_of(make_spec(engine={"pipelineParallelSize": 1}))


def test_workers_are_no_endpoints_and_are_guarded_all_the_same(owner, make_spec, settings) -> None:
    group = groups.workload(owner, make_spec(**STAGED), 2, settings)["spec"]["leaderWorkerTemplate"]
    leader, worker = (group[kind]["metadata"]["labels"] for kind in ("leaderTemplate", "workerTemplate"))
    selector = {"matchLabels": objects.endpoints(owner)["spec"]["selector"]}
    assert chosen(selector, leader)
    assert not chosen(selector, worker)
    policy, budget = (
        objects.network_policy(owner, settings, grouped=True),
        objects.disruption_budget(owner, grouped=True),
    )
    peers = policy["spec"]["ingress"][-1]
    assert "ports" not in peers, "ranks meet at ports that the system chooses"
    for labels in (leader, worker):
        assert chosen(policy["spec"]["podSelector"], labels)
        assert chosen(budget["spec"]["selector"], labels)
        assert chosen(peers["from"][0]["podSelector"], labels)
    alone = objects.network_policy(owner, settings)
    assert len(alone["spec"]["ingress"]) == 1


def test_room_for_a_replica_is_room_for_each_of_its_pods(make_spec) -> None:
    nodes = [Node(f"n{i}", gpus=4) for i in range(4)]
    assert room(make_spec(**STAGED), nodes, [("n0", 2)]) == 2, "seven places for two GPUs, three a replica"
    assert room(make_spec(engine={"tensorParallelSize": 2}), nodes, [("n0", 2)]) == 7


# --- several pods, read as one replica

LEADER = Pod("demo-r-0", serving=True, ending=False, scheduled=True, uid="l", revision="r", group="0", progress=100.0)
WORKER = Pod("demo-r-0-1", serving=True, ending=False, scheduled=True, uid="w", revision="r", group="0", progress=90.0)
SET = Deployment("r", "demo-r", 1, "2026-01-01T00:00:00Z", owner="u", kind="LeaderWorkerSet")


def seen(leader: Pod, *workers: Pod, gone: str = "") -> Revision:
    found = observe([SET], [leader], [], [frozenset({"l"})], "u", now=1000.0, gone=lambda node: node == gone,
                    workers=workers)  # fmt: skip
    return found.revisions[0]


def test_a_group_is_one_replica() -> None:
    revision = seen(LEADER, WORKER, replace(WORKER, name="demo-r-0-2"))
    assert (revision.kind, revision.serving, len(revision.alive)) == ("LeaderWorkerSet", 1, 1)
    another = replace(WORKER, group="1", scheduled=False, unschedulable_since=5.0)
    assert seen(LEADER, another).alive == (LEADER,), "a worker of another group says nothing about it"


def test_a_worker_without_a_place_is_a_replica_without_one() -> None:
    waits = replace(WORKER, scheduled=False, unschedulable_since=50.0, trouble=Trouble("Unschedulable", "no GPU"))
    (pod,) = seen(replace(LEADER, serving=False), waits).alive
    assert (pod.scheduled, pod.unschedulable_since) == (False, 50.0)
    assert pod.trouble == Trouble("Unschedulable", "worker demo-r-0-1: no GPU")


@pytest.mark.parametrize("own", ["LeaderLost", "RankLost", "EngineFailed"])
def test_the_pod_that_failed_has_the_word(own: str) -> None:
    lost_its_peers = replace(
        LEADER, serving=False, trouble=Trouble(own, "rank 1 is gone", load_failure=True, told=True)
    )
    failed = replace(WORKER, restarts=3, trouble=Trouble("OutOfMemory", "18 GiB", load_failure=True, told=True))
    (pod,) = seen(lost_its_peers, failed).alive
    assert pod.trouble is not None
    assert (pod.trouble.reason, pod.trouble.told, pod.restarts) == ("OutOfMemory", True, 3)


def test_restarts_of_a_worker_that_lost_its_leader_are_no_crash_loop() -> None:
    lost = Trouble("LeaderLost", "the connection is closed", load_failure=True, told=True)
    (pod,) = seen(replace(LEADER, restarts=1), replace(WORKER, restarts=5, serving=False, trouble=lost)).alive
    assert pod.restarts == 1
    (pod,) = seen(replace(LEADER, serving=False), replace(WORKER, serving=False, trouble=lost)).alive
    assert pod.trouble is not None
    assert not pod.trouble.told, "starting again helps"
    killed = Trouble("OOMKilled", "it took more memory than its limit", load_failure=True)
    (pod,) = seen(replace(LEADER, serving=False), replace(WORKER, restarts=3, trouble=killed)).alive
    assert (pod.restarts, pod.trouble is not None and pod.trouble.reason) == (3, "OOMKilled")


def test_a_worker_whose_node_is_gone_takes_the_replica_out_and_its_record_goes() -> None:
    revision = seen(LEADER, replace(WORKER, node="spot"), gone="spot")
    assert revision.serving == 0
    assert [(pod.name, pod.lost) for pod in revision.pods] == [("demo-r-0", False), ("demo-r-0-1", True)]


def test_what_the_labels_say() -> None:
    labels = {"mainsail.dev/revision": "r", objects.GROUP_LABEL: "4"}
    assert read_pod({"metadata": {"name": "demo-r-4-1", "labels": labels}}).group == "4"
    made = {"metadata": {"name": "demo-r", "labels": labels, "creationTimestamp": "x"}, "spec": {"replicas": 3}}
    found = read_group_set(made)
    assert (found.name, found.revision, found.replicas, found.kind) == ("demo-r", "r", 3, "LeaderWorkerSet")


# --- what is done


def planned(owner, spec: InferenceServiceSpec, settings, observed: Observed, **more) -> list:
    target = objects.deployment_name(owner, objects.revision_of(spec))
    decision = decide(
        None, Situation(spec=spec.rollout, target=target, desired=spec.replicas, observed=observed, now=1000.0)
    )
    return list(plan(owner, spec, observed, settings, decision, {}, **more).actions)


def test_groups_are_made_scaled_and_deleted(owner, make_spec, settings) -> None:
    spec = make_spec(**STAGED)
    made = [action.manifest for action in planned(owner, spec, settings, Observed()) if isinstance(action, Apply)]
    assert made[-1]["kind"] == "LeaderWorkerSet"
    revision, name = objects.revision_of(spec), objects.deployment_name(owner, objects.revision_of(spec))
    pods = (replace(LEADER, revision=revision), replace(LEADER, name="demo-r-1", uid="m", revision=revision))
    there = Revision(revision, name, 3, "2026-01-01T00:00:00Z", pods=pods, version="7", kind="LeaderWorkerSet")
    old = Revision("old", "demo-old", 0, "2025-01-01T00:00:00Z", version="3", kind="LeaderWorkerSet")
    actions = planned(owner, spec, settings, Observed((there, old)))
    (scaled,) = [action for action in actions if isinstance(action, Scale)]
    assert (scaled.kind, scaled.name, scaled.replicas, scaled.version) == ("LeaderWorkerSet", name, 2, "7")
    (deleted,) = [action for action in actions if isinstance(action, Delete)]
    assert (deleted.kind, deleted.name) == ("LeaderWorkerSet", "demo-old")


def test_without_the_api_nothing_is_made_and_the_condition_says_what_to_do(owner, make_spec, settings) -> None:
    spec = make_spec(**STAGED)
    actions = planned(owner, spec, settings, Observed(), makes=False)
    assert all(action.manifest["kind"] != "LeaderWorkerSet" for action in actions)
    target = objects.deployment_name(owner, objects.revision_of(spec))
    decision = decide(None, Situation(spec=spec.rollout, target=target, desired=2, observed=Observed()))
    told = status(owner, spec, 1, Observed(), decision, [], 0.0, settings=settings, lacking=groups.MISSING)
    found = {c.type: (c.status, c.reason, c.message) for c in told.conditions}
    assert found["Stalled"][:2] == ("True", "LeaderWorkerSetsMissing")
    assert "install LWS" in found["Stalled"][2]
    assert found["Ready"][:2] == ("False", "LeaderWorkerSetsMissing")
    assert "Reconciling" not in found
