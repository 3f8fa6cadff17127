"""What happens to services around their pods: refusals, pauses, other owners of fields, lost watches, lost operators.

Most of these services never run an engine: they ask for no replica, or for a node that does not exist.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from e2e import processes
from e2e.cluster import cgroups, netns, rig
from e2e.cluster.place import Place
from e2e.gitops import sync
from e2e.kube import Kube, KubectlError, Object, condition, wait_for, wait_still
from e2e.services import service

SYSTEM = "mainsail-system"
OPERATOR = "app.kubernetes.io/component=operator"
FAIL_OVER_S = 15


def nowhere(name: str, namespace: str = "default", **spec: Any) -> Object:
    """A service whose pods no node takes."""
    found = service(name)
    found["metadata"]["namespace"] = namespace
    found["spec"] |= {"podTemplate": {"spec": {"nodeSelector": {"no": "such"}}}} | spec
    return found


@pytest.fixture
def namespace(kube: Kube) -> Iterator[str]:
    name = "lifecycle"
    kube.run("create", "namespace", name)
    yield name
    kube.run("delete", "namespace", name, "--ignore-not-found", "--wait=false")


def stalled(kube: Kube, name: str, reason: str, namespace: str = "default") -> Object:
    return wait_for(
        f"{name} Stalled for {reason}",
        lambda: (c := condition(kube.get("mis", name, namespace), "Stalled")).get("reason") == reason and c,
        story=kube.story,
    )


def settled(kube: Kube, name: str, namespace: str = "default") -> Object:
    def check() -> Object | None:
        obj = kube.get("mis", name, namespace)
        moving = {condition(obj, kind).get("status") for kind in ("Reconciling", "Stalled")}
        return obj if obj and obj.get("status") and moving == {None} else None

    return wait_for(f"{name} settled", check, story=kube.story)


def test_what_cannot_be_carried_out_is_told_and_holds_up_nobody(kube: Kube, namespace: str) -> None:
    """A Service of somebody else, a quota, a typo that only the pod's schema knows; and one service that is well."""
    foreign = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "taken", "namespace": namespace},
               "spec": {"ports": [{"port": 5432}], "selector": {"app": "database"}}}  # fmt: skip
    quota = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "none", "namespace": namespace},
             "spec": {"hard": {"pods": "0"}}}  # fmt: skip
    kube.apply(foreign, quota)
    typo = nowhere("typo", namespace)
    typo["spec"]["podTemplate"]["spec"] = {"nodeSelectr": {"a": "b"}}
    kube.apply(nowhere("taken", namespace), nowhere("full", namespace), typo, nowhere("well", namespace, replicas=0))
    assert "taken" in stalled(kube, "taken", "WriteRefused", namespace)["message"]
    assert "exceeded quota" in stalled(kube, "full", "PodsRefused", namespace)["message"]
    assert "nodeSelectr" in stalled(kube, "typo", "WriteRefused", namespace)["message"]
    settled(kube, "well", namespace)
    there = kube.get("service", "taken", namespace)
    assert there is not None
    assert there["spec"]["selector"] == {"app": "database"}
    assert "ownerReferences" not in there["metadata"]
    kube.delete("service", "taken", namespace)
    kube.patch("mis", "taken", {"spec": {"replicas": 0}}, namespace)
    wait_for("taken's own Service", lambda: kube.get("service", "taken", namespace))
    settled(kube, "taken", namespace)
    kube.run("delete", "namespace", namespace, "--wait")


def test_the_paused_annotation_stops_all_writes(kube: Kube) -> None:
    kube.apply(nowhere("held", replicas=0))
    settled(kube, "held")
    kube.run("annotate", "mis/held", "mainsail.dev/paused=true")
    kube.apply(nowhere("held", replicas=0, engine={"maxNumSeqs": 9}))
    wait_for("Paused", lambda: condition(kube.get("mis", "held"), "Reconciling").get("reason") == "Paused")
    kube.delete("service", "held")
    time.sleep(3)
    selector = "mainsail.dev/service=held"
    assert len(kube.list("deployments", selector=selector)) == 1
    assert kube.get("service", "held") is None
    kube.run("annotate", "mis/held", "mainsail.dev/paused-")
    wait_for("its Service again", lambda: kube.get("service", "held"))
    settled(kube, "held")
    kube.delete("mis", "held")


def test_what_somebody_changes_of_ours_is_set_right(kube: Kube) -> None:
    """A policy that lets everybody in, a selector that takes the pods away; a label of theirs stays."""
    kube.apply(nowhere("opened", replicas=0))
    settled(kube, "opened")
    policy, engines = kube.get("networkpolicy", "opened"), kube.get("service", "opened-engines")
    assert policy is not None
    assert engines is not None
    kube.patch("networkpolicy", "opened", {"metadata": {"labels": {"their": "own"}}, "spec": {"ingress": [{}]}})
    kube.patch("service", "opened-engines", {"spec": {"selector": {"mainsail.dev/service": "other"}}})
    for kind, before in (("networkpolicy", policy), ("service", engines)):
        name = before["metadata"]["name"]
        wait_for(
            f"{kind} {name} as it was", lambda k=kind, n=name, b=before: (kube.get(k, n) or {}).get("spec") == b["spec"]
        )
    assert "their" in (kube.get("networkpolicy", "opened") or {})["metadata"]["labels"]
    kube.delete("mis", "opened")


def test_git_and_an_autoscaler_share_the_object(kube: Kube) -> None:
    """Argo CD applies without replicas, something like an HPA scales: neither undoes the other, and a diff is empty."""
    wanted = nowhere("shared")
    del wanted["spec"]["replicas"]
    manifest = json.dumps(wanted)

    sync(kube, manifest)
    wait_for("its Deployment", lambda: _deployments(kube, "shared"))
    kube.run("scale", "mis/shared", "--replicas=3")
    wait_for("three replicas", lambda: _replicas(kube, "shared") == 3)
    sync(kube, manifest)
    time.sleep(2)
    assert _replicas(kube, "shared") == 3
    obj = json.loads(kube.run("get", "mis", "shared", "-o", "json", "--show-managed-fields"))
    owners = {m["manager"] for m in obj["metadata"]["managedFields"]
              if "f:replicas" in json.dumps(m["fieldsV1"].get("f:spec", {}))}  # fmt: skip
    assert "argocd-controller" not in owners
    assert "mainsail-operator" not in owners, "the operator never writes a spec"
    kube.delete("mis", "shared")


def _replicas(kube: Kube, name: str) -> int:
    (found,) = _deployments(kube, name)
    return found["spec"]["replicas"]


def _deployments(kube: Kube, name: str) -> list[Object]:
    return kube.list("deployments", selector=f"mainsail.dev/service={name}")


def operators(kube: Kube) -> list[Object]:
    return [pod for pod in kube.list("pods", SYSTEM, OPERATOR) if "deletionTimestamp" not in pod["metadata"]]


def holder(kube: Kube) -> str:
    lease = kube.get("lease", "mainsail-operator", SYSTEM)
    return (lease or {}).get("spec", {}).get("holderIdentity", "")


def test_deletions_that_a_watch_missed(kube: Kube, cluster: Place) -> None:
    """The operator stands still while things are deleted and the API server forgets its history: 410 for watches."""
    kube.apply(nowhere("ghost", replicas=0), nowhere("bereft"))
    settled(kube, "ghost")
    wait_for("its Deployment", lambda: _deployments(kube, "bereft"))
    (operator,) = operators(kube)
    processes.send(operator, "mainsail-operator", signal.SIGSTOP)
    try:
        kube.delete("mis", "ghost")
        (lost,) = _deployments(kube, "bereft")
        kube.delete("deployment", lost["metadata"]["name"])
        compact(cluster, int(kube.list("mis")[0]["metadata"]["resourceVersion"]))
        time.sleep(2)
    finally:
        processes.send(operator, "mainsail-operator", signal.SIGCONT)
    wait_for("the Deployment again", lambda: _deployments(kube, "bereft"), story=kube.story)
    time.sleep(3)
    assert kube.get("service", "ghost") is None, "nothing is made for a service that is gone"
    kube.delete("mis", "bereft")


def compact(cluster: Place, version: int) -> None:
    """Let etcd forget everything before the version, so that older watches get 410."""
    body = json.dumps({"revision": str(version), "physical": True})
    code = (
        "import sys, urllib.request as r; "
        "r.urlopen(r.Request('http://127.0.0.1:2379/v3/kv/compaction', data=sys.argv[1].encode())).read()"
    )
    subprocess.run(["nsenter", f"--net={netns.path_of(cluster.name)}", str(cluster.venv / "bin/python"), "-c", code,
                    body], check=True, timeout=30)  # fmt: skip


@pytest.fixture
def two_operators(kube: Kube) -> Iterator[None]:
    kube.run("scale", "deploy/mainsail-operator", "-n", SYSTEM, "--replicas=2")
    wait_for("two operators", lambda: len([p for p in operators(kube) if _ready(p)]) == 2)
    yield
    kube.run("scale", "deploy/mainsail-operator", "-n", SYSTEM, "--replicas=1")
    wait_for("one operator", lambda: len(kube.list("pods", SYSTEM, OPERATOR)) == 1)


def _ready(pod: Object) -> bool:
    return condition(pod, "Ready").get("status") == "True"


@pytest.mark.slow
def test_a_stopped_leader_is_followed_and_writes_nothing_when_it_wakes(kube: Kube, two_operators: None) -> None:
    leader = holder(kube)
    pod = next(pod for pod in operators(kube) if pod["metadata"]["name"] == leader)
    kube.apply(nowhere("orphan", replicas=0))
    settled(kube, "orphan")
    began = time.monotonic()
    processes.send(pod, "mainsail-operator", signal.SIGSTOP)
    try:
        wait_for("another leader", lambda: holder(kube) not in ("", leader), timeout_s=FAIL_OVER_S)
        took = time.monotonic() - began
        kube.apply(nowhere("orphan", replicas=0, engine={"maxNumSeqs": 5}))
        settled(kube, "orphan")
    finally:
        processes.send(pod, "mainsail-operator", signal.SIGCONT)
    woken = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    kube.apply(nowhere("orphan", replicas=0, engine={"maxNumSeqs": 6}))
    settled(kube, "orphan")
    time.sleep(5)
    written = kube.run("logs", leader, "-n", SYSTEM, f"--since-time={woken}")
    assert "mainsail_operator.apply" not in written, written
    print(f"fail-over after SIGSTOP: {took:.1f} s")
    kube.delete("mis", "orphan")


@pytest.mark.slow
def test_a_killed_leader_is_followed(kube: Kube, two_operators: None) -> None:
    leader = holder(kube)
    began = time.monotonic()
    kube.run("delete", "pod", leader, "-n", SYSTEM, "--grace-period=0", "--force")
    wait_for("another leader", lambda: holder(kube) not in ("", leader), timeout_s=FAIL_OVER_S)
    print(f"fail-over after SIGKILL: {time.monotonic() - began:.1f} s")


def test_a_bad_object_is_refused_and_a_paused_rollout_is_valid(kube: Kube) -> None:
    bad = nowhere("bad", rollout={"strategy": "Canary", "steps": [{"weight": 50}, {"weight": 10}]})
    with pytest.raises(KubectlError, match="must grow"):
        kube.apply(bad)
    with pytest.raises(KubectlError, match="belong to strategy Canary"):
        kube.apply(nowhere("bad", rollout={"steps": [{"weight": 50}]}))


def test_the_api_server_is_killed_and_started_again(kube: Kube, cluster: Place) -> None:
    """Watches recover, the operator goes on in the same process, writes what changed once, and touches nothing else."""
    kube.apply(nowhere("steady"), nowhere("moved"))
    for name in ("steady", "moved"):
        wait_for(f"{name}'s Deployment", lambda n=name: _deployments(kube, n))
    before, (operator,) = wait_still("nothing written any more", lambda: _versions(kube, "steady")), operators(kube)
    (moved,) = _deployments(kube, "moved")
    (server,) = [pid for pid in cgroups.processes(cgroups.groups_named(cluster.name)) if _is(pid, "kube-apiserver")]
    os.kill(server, signal.SIGKILL)
    wait_for("its end to be noticed", lambda: rig.status(cluster).ended == ("kube-apiserver",))
    time.sleep(3)
    rig.revive(cluster)
    wait_for("the API server", lambda: _answers(kube))
    began = time.monotonic()
    kube.run("scale", "mis/moved", "--replicas=3")
    wait_for("three replicas", lambda: _replicas(kube, "moved") == 3, story=kube.story)
    print(f"scaled {time.monotonic() - began:.1f} s after the API server answered again")
    time.sleep(3)
    (same,) = _deployments(kube, "moved")
    assert same["metadata"]["uid"] == moved["metadata"]["uid"]
    assert same["metadata"]["generation"] == moved["metadata"]["generation"] + 1, "one write for one change"
    assert _versions(kube, "steady") == before
    (still,) = operators(kube)
    assert still["metadata"]["uid"] == operator["metadata"]["uid"]
    assert [c["restartCount"] for c in still["status"]["containerStatuses"]] == \
        [c["restartCount"] for c in operator["status"]["containerStatuses"]]  # fmt: skip
    for name in ("steady", "moved"):
        kube.delete("mis", name)


def _versions(kube: Kube, name: str) -> dict[str, str]:
    """What our own writes would change, of everything that a service has: generations, and resource versions of what
    no controller of Kubernetes writes to."""
    selector = f"mainsail.dev/service={name}"
    kinds = {"deployments": "generation", "services": "resourceVersion", "serviceaccounts": "resourceVersion",
             "networkpolicies": "resourceVersion"}  # fmt: skip
    return {f"{kind}/{one['metadata']['name']}": str(one["metadata"][field])
            for kind, field in kinds.items() for one in kube.list(kind, selector=selector)}  # fmt: skip


@pytest.mark.slow
def test_the_api_server_stands_still_and_comes_back(kube: Kube, cluster: Place) -> None:
    """Twenty seconds without an API server: the operator stays alive, holds its Lease again, and catches up."""
    kube.apply(nowhere("patient"))
    wait_for("its Deployment", lambda: _deployments(kube, "patient"))
    (operator,) = operators(kube)
    restarts = {c["name"]: c["restartCount"] for c in operator["status"]["containerStatuses"]}
    servers = [pid for pid in cgroups.processes(cgroups.groups_named(cluster.name)) if _is(pid, "kube-apiserver")]
    assert len(servers) == 1
    os.kill(servers[0], signal.SIGSTOP)
    time.sleep(20)
    os.kill(servers[0], signal.SIGCONT)
    wait_for("the API server", lambda: _answers(kube))
    kube.run("scale", "mis/patient", "--replicas=2")
    wait_for("two replicas", lambda: _replicas(kube, "patient") == 2, story=kube.story)
    (same,) = operators(kube)
    assert {c["name"]: c["restartCount"] for c in same["status"]["containerStatuses"]} == restarts
    kube.delete("mis", "patient")


def _is(pid: int, program: str) -> bool:
    try:
        return program in Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except OSError:
        return False


def _answers(kube: Kube) -> bool:
    """And knows our resource, which it reads from etcd by itself."""
    try:
        return kube.run("get", "--raw=/readyz", "--request-timeout=10s") == "ok" and bool(kube.list("mis"))
    except KubectlError:
        return False
