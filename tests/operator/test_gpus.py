"""Where GPUs are free, as far as nodes and pods tell."""

from __future__ import annotations

import pytest

from mainsail_operator.gpus import held_by, per_pod, read_node, room


def node(name: str = "n", gpus: int | None = 4, *, ready: str = "True", labels=None, taints=(), unschedulable=False):
    return read_node(
        {
            "metadata": {"name": name, "labels": labels or {}},
            "spec": {"taints": list(taints), **({"unschedulable": True} if unschedulable else {})},
            "status": {
                "allocatable": {"cpu": "8", **({"nvidia.com/gpu": str(gpus)} if gpus is not None else {})},
                "conditions": [{"type": "Ready", "status": ready}],
            },
        }
    )


def pod(gpus: int, *, node: str = "n", phase: str = "Running", init: int = 0):
    limits = {"resources": {"limits": {"nvidia.com/gpu": str(gpus)}}}
    before = {"resources": {"limits": {"nvidia.com/gpu": init}}}
    return {
        "spec": {"nodeName": node, "containers": [limits, {}], "initContainers": [before]},
        "status": {"phase": phase},
    }


TAINT = {"key": "nvidia.com/gpu", "value": "present", "effect": "NoSchedule"}


def test_what_pods_hold() -> None:
    assert held_by(pod(2)) == ("n", 2)
    assert held_by(pod(1, init=4)) == ("n", 4)
    assert held_by(pod(2, phase="Succeeded")) == held_by(pod(2, node="")) == held_by({}) == ("", 0)


def test_room_counts_whole_replicas_on_each_node(make_spec) -> None:
    spec = make_spec(resources={"limits": {"nvidia.com/gpu": 2}})
    nodes = [node("a", 4), node("b", 3), node("c", None)]
    assert room(spec, nodes, []) == 3
    assert room(spec, nodes, [("a", 1), ("a", 1), ("b", 2)]) == 1
    assert room(spec, nodes, [("a", 9)]) == 1


@pytest.mark.parametrize(
    "unfit", [{"ready": "Unknown"}, {"unschedulable": True}, {"taints": [TAINT]}, {"labels": {"zone": "b"}}]
)
def test_nodes_that_take_no_pod_have_no_room(make_spec, unfit) -> None:
    spec = make_spec(podTemplate={"spec": {"nodeSelector": {"zone": "a"}}})
    assert room(spec, [node(labels={"zone": "a"})], []) == 4
    assert room(spec, [node(**({"labels": {"zone": "a"}} | unfit))], []) == 0


@pytest.mark.parametrize(
    ("toleration", "fits"),
    [
        ({"key": "nvidia.com/gpu", "operator": "Exists"}, True),
        ({"operator": "Exists"}, True),
        ({"key": "nvidia.com/gpu", "value": "present", "effect": "NoSchedule"}, True),
        ({"key": "nvidia.com/gpu", "value": "other"}, False),
        ({"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoExecute"}, False),
    ],
)
def test_tolerations(make_spec, toleration, fits: bool) -> None:
    spec = make_spec(podTemplate={"spec": {"tolerations": [toleration]}})
    assert (room(spec, [node(taints=[TAINT])], []) == 4) is fits
    soft = TAINT | {"effect": "PreferNoSchedule"}
    assert room(make_spec(), [node(taints=[soft])], []) == 4


def test_no_limit_without_gpus_or_nodes_in_sight(make_spec) -> None:
    assert per_pod(make_spec()) == 1
    assert room(make_spec(), [], []) is None
    assert room(make_spec(resources={"limits": {"memory": "1Gi"}}), [node()], []) is None
