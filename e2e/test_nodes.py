"""Several nodes, their GPUs, and their end: rollouts with and without a free GPU, and what was on a node that is lost.

The nodes are objects whose kubelet is the test's own (`fake_nodes`); everything else is the real cluster.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from e2e.fake_nodes import GPU, fake_nodes, on_pool, placed
from e2e.kube import HANG_S, Kube, Object, condition, wait_for
from e2e.services import pods, service

REPLACED_S = 30
"""Bound of the promise: from when Kubernetes says that a node is lost. Held to by the slow tests,
that are run by hand; the others only wait for what has to happen."""


@contextmanager
def served(kube: Kube, obj: Object, replicas: int) -> Iterator[str]:
    name = obj["metadata"]["name"]
    kube.apply(obj)
    try:
        wait_serving(kube, name, replicas)
        yield name
    finally:
        kube.delete("mis", name, wait=False)


def serving(kube: Kube, name: str) -> int:
    return (kube.get("mis", name) or {}).get("status", {}).get("servingReplicas", 0)


def wait_serving(kube: Kube, name: str, replicas: int, *, timeout_s: float = HANG_S) -> None:
    wait_for(f"{name} with {replicas} serving", lambda: serving(kube, name) == replicas, timeout_s=timeout_s,
             story=kube.story)  # fmt: skip


def test_what_was_on_a_spot_node_is_replaced(kube: Kube) -> None:
    """The Node object is deleted: its pods stop counting at once, and others take their place."""
    with (
        fake_nodes(kube, "spot", {"spot-a": 0, "spot-b": 0, "spot-c": 0}) as nodes,
        served(kube, placed(service("spot", replicas=2), "spot"), 2) as name,
    ):
        time.sleep(6)  # a pod placed just now might be on a node that nobody has heard of yet
        lost = pods(kube, name)[0]
        nodes.hold.set()
        began = time.monotonic()
        nodes.take_back(lost["spec"]["nodeName"])
        wait_serving(kube, name, 1)
        told = time.monotonic() - began
        nodes.hold.clear()
        wait_serving(kube, name, 2)
        print(f"status true after {told:.1f} s, replaced after {time.monotonic() - began:.1f} s")
        assert kube.get("pod", lost["metadata"]["name"]) is None
        assert lost["spec"]["nodeName"] not in {pod["spec"]["nodeName"] for pod in pods(kube, name)}


@pytest.mark.slow
def test_what_was_on_a_node_that_falls_silent_is_replaced(kube: Kube) -> None:
    """The kubelet is heard no more: Kubernetes itself notices after 50 s, and from then on the promise holds."""
    with (
        fake_nodes(kube, "quiet", {"quiet-a": 0, "quiet-b": 0, "quiet-c": 0}) as nodes,
        served(kube, placed(service("quiet", replicas=2), "quiet"), 2) as name,
    ):
        lost = pods(kube, name)[0]["spec"]["nodeName"]
        nodes.silence(lost)
        wait_for("the node to be given up", lambda: condition(kube.get("node", lost, ""), "Ready").get("status") !=
                 "True")  # fmt: skip
        began = time.monotonic()
        nodes.hold.set()
        wait_serving(kube, name, 1, timeout_s=REPLACED_S)
        told = time.monotonic() - began
        nodes.hold.clear()
        wait_serving(kube, name, 2, timeout_s=REPLACED_S)
        took = time.monotonic() - began
        print(f"after the node was given up: status true in {told:.1f} s, replaced in {took:.1f} s")
        assert took < REPLACED_S


def cards(*, sequences: int, **spec: object) -> Object:
    found = on_pool(service("cards", replicas=2, maxNumSeqs=sequences), "cards")
    found["spec"]["resources"]["limits"][GPU] = 1
    found["spec"] |= {"drain": {"timeout": "5s"}, **spec}
    return found


class Watched:
    """A change, and the extremes of its rollout."""

    def __init__(self, kube: Kube, changed: Object) -> None:
        name = changed["metadata"]["name"]
        before = (kube.get("mis", name) or {})["status"]["rollout"]["target"]
        kube.apply(changed)
        self.least, self.most, self.drained = 99, 0, False

        def done() -> bool:
            status = (kube.get("mis", name) or {}).get("status", {})
            rollout = status["rollout"]
            self.least = min(self.least, status["servingReplicas"])
            self.most = max(self.most, status["replicas"])
            self.drained |= rollout["drainFirst"]
            return rollout["target"] != before and rollout["phase"] == "Complete"

        wait_for(f"{name} rolled out", done, story=kube.story)


@pytest.mark.slow
def test_gpus_decide_between_surge_and_drain(kube: Kube) -> None:
    """With every GPU taken one replica at a time makes way; with one free, nothing ends before its successor serves."""
    with (
        fake_nodes(kube, "cards", {"cards-a": 2}) as nodes,
        served(kube, cards(sequences=8), 2) as name,
    ):
        full = Watched(kube, cards(sequences=9))
        assert full.drained
        assert full.least == 1
        assert {"DrainFirst"} <= {e["reason"] for e in kube.list("events") if e["involvedObject"]["name"] == name}
        nodes.give_gpus("cards-a", 3)
        roomy = Watched(kube, cards(sequences=10))
        assert not roomy.drained
        assert (roomy.least, roomy.most) == (2, 3)
        assert len(pods(kube, name)) == 2


@pytest.mark.slow
def test_a_surge_that_finds_no_gpu_says_so_and_gives_up_in_time(kube: Kube) -> None:
    surge = {"rollout": {"gpuPolicy": "Surge", "progressDeadline": "15s"}}
    with (
        fake_nodes(kube, "cards", {"cards-b": 2}),
        served(kube, cards(sequences=8, **surge), 2) as name,
    ):
        kube.apply(cards(sequences=9, **surge))

        def rollout() -> Object:
            return (kube.get("mis", name) or {})["status"]["rollout"]

        told = wait_for("the reason", lambda: (r := rollout())["reason"] == "WaitingForRoom" and r)
        assert "Insufficient nvidia.com/gpu" in told["message"]
        back = wait_for("the way back", lambda: (r := rollout())["phase"] == "RolledBack" and r)
        assert back["reason"] == "ProgressDeadlineExceeded"
        assert serving(kube, name) == 2
