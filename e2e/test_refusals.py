"""Objects that a user gets wrong are refused by the API server itself, with a message that says what to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from e2e.kube import Kube, KubectlError, Object
from e2e.services import service


def put(path: str, value: Any) -> Callable[[Object], None]:
    """A change: the value at a dotted path below spec."""

    def change(obj: Object) -> None:
        *parents, last = path.split(".")
        node = obj["spec"]
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = value

    return change


BAD: list[tuple[str, Callable[[Object], None], str]] = [
    ("unknown scheme", put("model.uri", "ftp://models/x"), "pvc://"),
    ("pvc without a path", put("model.uri", "pvc://models"), "pvc://"),
    ("no model", lambda obj: obj["spec"].pop("model"), "model"),
    ("negative replicas", put("replicas", -1), "replicas"),
    ("replicas as text", put("replicas", "two"), "replicas"),
    ("unknown field", put("engine.maxModelLength", 5), "maxModelLength"),
    ("unknown dtype", put("engine.dtype", "int3"), "dtype"),
    ("no context", put("engine.maxModelLen", 0), "maxModelLen"),
    ("no sequences", put("engine.maxNumSeqs", 0), "maxNumSeqs"),
    ("memory fraction above one", put("engine.kvCache.memoryFraction", "1.5"), "memoryFraction"),
    ("too few blocks", put("engine.kvCache.blocks", 1), "blocks"),
    ("served name twice", put("model.servedNames", ["a", "a"]), "servedNames"),
    ("a served name with a space", put("model.servedNames", ["a b"]), "servedNames"),
    ("a flag that a field owns", put("engine.extraArgs", ["--port=9"]), "--port"),
    ("a flag that a field owns, by its short name", put("engine.extraArgs", ["-n", "2"]), "-n"),
    ("a Secret for what is mounted", put("model.secretRef", {"name": "hub"}), "secretRef"),
    (
        "a Secret for an adapter that is mounted",
        put("adapters", [{"name": "a", "uri": "pvc://models/a", "secretRef": {"name": "hub"}}]),
        "secretRef",
    ),
    ("drain without a unit", put("drain.timeout", "soon"), "timeout"),
    ("GPUs that are not the ranks", put("resources.limits", {"nvidia.com/gpu": 2}), "tensorParallelSize"),
    ("too many ranks", put("engine.tensorParallelSize", 16), "tensorParallelSize"),
    ("host memory that is no quantity", put("engine.kvCache.hostMemory", "much"), "not a quantity"),
    ("a negative quantity", put("engine.kvCache.hostMemory", "-1Gi"), "hostMemory"),
    ("no time for progress", put("rollout.progressDeadline", "0s"), "progressDeadline"),
    ("a label's value with a space", put("podTemplate.metadata.labels", {"team": "a b"}), "labels.team"),
    ("unknown load format", put("engine.loadFormat", "magic"), "loadFormat"),
]


@pytest.mark.parametrize(("change", "names"), [pytest.param(c, n, id=what) for what, c, n in BAD])
def test_refused_with_a_helpful_message(kube: Kube, change: Callable[[Object], None], names: str) -> None:
    obj = service("refused")
    change(obj)
    with pytest.raises(KubectlError) as refusal:
        kube.apply(obj)
    assert names in str(refusal.value)
    assert kube.get("mis", "refused") is None


def test_a_name_that_the_pods_of_groups_cannot_carry(kube: Kube) -> None:
    """Their StatefulSets would be there, and never get a pod."""

    def applied(length: int) -> str:
        obj = service("x" * length, pipelineParallelSize=2)
        return kube.run("apply", "--server-side", "--dry-run=server", "-f", "-", stdin=json.dumps(obj))

    applied(37)
    with pytest.raises(KubectlError, match="at most 37 characters"):
        applied(38)


def test_scaling_after_a_scale_by_hand_says_what_to_do(kube: Kube) -> None:
    """The manifest has no replicas then: they are what `kubectl scale` has written."""
    obj = service("switched")
    obj["spec"] |= {"replicas": 0, "podTemplate": {"spec": {"nodeSelector": {"no": "such"}}}}
    kube.apply(obj)
    kube.run("scale", "mis/switched", "--replicas=2")
    del obj["spec"]["replicas"]
    obj["spec"]["scaling"] = {"max": 3}
    with pytest.raises(KubectlError, match="set it to 1"):
        kube.apply(obj)
    obj["spec"]["replicas"] = 1
    kube.apply(obj)
    kube.delete("mis", "switched")


def test_a_good_object_passes_the_same_door(kube: Kube) -> None:
    kube.run("apply", "--dry-run=server", "--validate=strict", "-f", "-", stdin=json.dumps(service("good")))
