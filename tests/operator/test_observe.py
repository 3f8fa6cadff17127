"""Kubernetes' objects → what plan and status read."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from mainsail_operator.observe import Pod, Revision, Trouble, observe, read_deployment, read_endpoints, read_pod


def pod(*, ready="False", state=None, last=None, scheduled=True, reason=None, **metadata):
    conditions = [{"type": "Ready", "status": ready}]
    if reason:
        conditions.append(
            {"type": "PodScheduled", "status": "False", "reason": reason, "message": "0/1 nodes",
             "lastTransitionTime": "2026-01-01T00:00:00Z"}
        )  # fmt: skip
    statuses = [{"name": "engine", "state": state or {}, "lastState": last or {}}]
    return {
        "metadata": {"name": "p", "labels": {"mainsail.dev/revision": "r"}, **metadata},
        "spec": {"nodeName": "n"} if scheduled else {},
        "status": {"conditions": conditions, "containerStatuses": statuses if scheduled else []},
    }


SAID = json.dumps({"reason": "MissingTensor", "message": "no tensor x"})


@pytest.mark.parametrize(
    ("found", "reason", "failed"),
    [
        (pod(last={"terminated": {"exitCode": 1, "message": SAID}}), "MissingTensor", True),
        (pod(state={"terminated": {"exitCode": 1, "message": f"noise\n{SAID}\n"}}), "MissingTensor", True),
        (pod(state={"terminated": {"exitCode": 137, "reason": "OOMKilled"}}), "OOMKilled", True),
        (pod(state={"terminated": {"exitCode": 2, "message": "boom"}}), "EngineFailed", True),
        (pod(state={"waiting": {"reason": "ImagePullBackOff", "message": "no image"}}), "ImagePullBackOff", False),
        (pod(scheduled=False, reason="Unschedulable"), "Unschedulable", False),
    ],
)
def test_trouble_has_a_stable_reason(found, reason: str, failed: bool) -> None:
    trouble = read_pod(found).trouble
    assert trouble is not None
    assert (trouble.reason, trouble.load_failure) == (reason, failed)
    assert trouble.message


def test_no_trouble_while_it_starts_or_serves() -> None:
    assert read_pod(pod(state={"waiting": {"reason": "ContainerCreating"}})).trouble is None
    assert read_pod(pod(ready="True", last={"terminated": {"exitCode": 1, "message": SAID}})).trouble is None
    assert read_pod(pod(ready="True")).serving
    assert read_pod(pod(deletionTimestamp="x")).ending


SLICE = {
    "endpoints": [
        {"targetRef": {"uid": "p1"}, "conditions": {"ready": True}},
        {"targetRef": {"uid": "p2"}, "conditions": {"ready": False}},
        {"targetRef": {"uid": "p3"}, "conditions": {"ready": True, "terminating": True}},
        {"targetRef": {"uid": "p4"}},
    ]
}


WAITS_AGAIN = {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 10s restarting failed container"}}
ENDED = {"terminated": {"exitCode": 3, "message": "no disk\n"}}
NO_IMAGE = {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}


@pytest.mark.parametrize("where", ["initContainerStatuses", "containerStatuses"])
@pytest.mark.parametrize(
    ("status", "reason", "words"),
    [
        ({"state": NO_IMAGE}, "ImagePullBackOff", "container theirs: no such image"),
        ({"state": ENDED}, "ContainerFailed", "container theirs ends with exit code 3: no disk"),
        (
            {"state": WAITS_AGAIN, "lastState": ENDED},
            "ContainerFailed",
            "container theirs ends with exit code 3: no disk",
        ),
    ],
)
def test_containers_of_the_pod_template_have_troubles_too(where: str, status, reason: str, words: str) -> None:
    """An init container that fails, a sidecar without an image: the engine itself has nothing to say."""
    found = pod(state={"waiting": {"reason": "PodInitializing"}})
    found["status"].setdefault(where, []).append({"name": "theirs", **status})
    trouble = read_pod(found).trouble
    assert trouble is not None
    assert (trouble.reason, trouble.message, trouble.load_failure) == (reason, words, False)


def test_a_sidecar_that_was_started_again_and_an_init_container_that_is_done_are_no_trouble() -> None:
    found = pod(state={"running": {}})
    found["status"]["containerStatuses"].append({"name": "theirs", "state": {"running": {}}, "lastState": ENDED})
    found["status"]["initContainerStatuses"] = [{"name": "prep", "state": {"terminated": {"exitCode": 0}}}]
    assert read_pod(found).trouble is None


def test_what_keeps_an_adapter_from_being_fetched_names_it() -> None:
    said = json.dumps({"reason": "ModelNotFound", "message": "no such repository; see spec.model.secretRef"})
    failed = {"terminated": {"exitCode": 1, "message": said}}
    loading = pod(state={"waiting": {"reason": "PodInitializing"}})
    adapter = {"name": "fetch-adapter-0", "args": ["hf://org/sql", "/adapters/0"]}
    loading["spec"]["initContainers"] = [{"name": "fetch", "args": ["hf://org/base"]}, adapter]
    loading["status"]["initContainerStatuses"] = [
        {"name": "fetch", "state": {"terminated": {"exitCode": 0}}},
        {"name": "fetch-adapter-0", "state": {"waiting": {"reason": "CrashLoopBackOff"}}, "lastState": failed},
    ]
    trouble = read_pod(loading).trouble
    said = "adapter hf://org/sql: no such repository; see the adapter's secretRef"
    assert trouble == Trouble("AdapterNotFound", said, adapter=True)
    unset = {"waiting": {"reason": "CreateContainerConfigError", "message": 'secret "hub" not found'}}
    loading["status"]["initContainerStatuses"][1] = {"name": "fetch-adapter-0", "state": unset}
    trouble = read_pod(loading).trouble
    assert trouble is not None
    assert (trouble.reason, trouble.adapter) == ("CreateContainerConfigError", True)
    assert 'adapter hf://org/sql: secret "hub" not found' in trouble.message


def test_gateways_route_to_what_is_ready_and_not_ending() -> None:
    assert read_endpoints(SLICE) == {"p1", "p4"}
    assert read_endpoints({"endpoints": None}) == frozenset()


def test_a_ready_pod_that_no_gateway_knows_does_not_serve() -> None:
    one = read_deployment(deployment("a", "r", "2026-01-01T00:00:00Z"))
    seen = observe([one], [read_pod(pod(ready="True", uid="p2"))], [], [read_endpoints(SLICE)], "u")
    assert seen.revisions[0].serving == 0
    assert seen.revisions[0].trouble is None


def test_what_was_on_a_node_that_is_gone_does_not_serve() -> None:
    one = read_deployment(deployment("a", "r", "2026-01-01T00:00:00Z"))
    there, ending = read_pod(pod(ready="True", uid="p1")), read_pod(pod(ready="True", uid="p1", deletionTimestamp="x"))
    new = replace(there, progress=96.0)

    def seen(found: Pod, *, gone: bool) -> Revision:
        only = observe([one], [found], [], [read_endpoints(SLICE)], "u", now=100.0, gone=lambda node: gone)
        return only.revisions[0]

    assert seen(there, gone=False).serving == 1
    lost = seen(there, gone=True)
    assert (lost.serving, lost.alive, lost.pods[0].lost) == (0, (), True)
    assert seen(new, gone=True).serving == 1, "we may not have heard of so new a node"
    assert not seen(ending, gone=True).pods[0].lost, "it has been replaced already"


def deployment(name: str, revision: str, created: str, uid: str = "u"):
    return {
        "metadata": {"name": name, "labels": {"mainsail.dev/revision": revision}, "creationTimestamp": created,
                     "ownerReferences": [{"kind": "InferenceService", "uid": uid}]},
        "spec": {"replicas": 2},
    }  # fmt: skip


def test_only_what_is_owned_counts_newest_first() -> None:
    seen = observe(
        [
            read_deployment(deployment("a", "r", "2026-01-01T00:00:00Z")),
            read_deployment(deployment("b", "s", "2026-01-02T00:00:00Z")),
            read_deployment(deployment("c", "t", "2026-01-03T00:00:00Z", uid="other")),
        ],
        [read_pod(pod(ready="True", uid="p1"))],
        [],
        [read_endpoints(SLICE)],
        "u",
    )
    assert [revision.name for revision in seen.revisions] == ["b", "a"]
    assert [revision.serving for revision in seen.revisions] == [0, 1]
