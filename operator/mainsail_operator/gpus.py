"""Where GPUs are free, so that nobody asks for replicas that no node can take (pure).

An estimate, not a scheduler: it looks at what decides for GPUs in practice (a node's allocatable GPUs, what everybody's
pods hold, node selectors, taints, cordons), and not at affinities or other resources. Where it is too hopeful,
the pod stays Pending and counts as unplaced; where a node is out of sight, nothing is limited.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from mainsail_operator.types import JSON, InferenceServiceSpec

RESOURCE = "nvidia.com/gpu"


@dataclass(frozen=True, slots=True)
class Node:
    name: str
    gpus: int
    labels: Mapping[str, str] = field(default_factory=dict[str, str])
    taints: tuple[JSON, ...] = ()
    """Those that keep pods away."""
    usable: bool = True
    """Ready, and not cordoned."""


def read_node(node: JSON) -> Node:
    spec, status = cast(JSON, node.get("spec") or {}), cast(JSON, node.get("status") or {})
    conditions = cast("list[JSON]", status.get("conditions") or [])
    taints = cast("list[JSON]", spec.get("taints") or [])
    ready = any(one.get("type") == "Ready" and one.get("status") == "True" for one in conditions)
    return Node(
        name=str(node["metadata"]["name"]),
        gpus=_count(cast(JSON, status.get("allocatable") or {}).get(RESOURCE)),
        labels=dict(node["metadata"].get("labels") or {}),
        taints=tuple(taint for taint in taints if taint.get("effect") in ("NoSchedule", "NoExecute")),
        usable=ready and not spec.get("unschedulable"),
    )


def held_by(pod: JSON) -> tuple[str, int]:
    """The node that a pod is on and the GPUs that it holds there; ("", 0) when it holds none."""
    spec, status = cast(JSON, pod.get("spec") or {}), cast(JSON, pod.get("status") or {})
    if not spec.get("nodeName") or status.get("phase") in ("Succeeded", "Failed"):
        return "", 0
    together = sum(_limit(container) for container in cast("list[JSON]", spec.get("containers") or []))
    before = (_limit(container) for container in cast("list[JSON]", spec.get("initContainers") or []))
    gpus = max([together, *before])
    return (str(spec["nodeName"]), gpus) if gpus else ("", 0)


def _limit(container: JSON) -> int:
    resources = cast(JSON, container.get("resources") or {})
    return _count(cast(JSON, resources.get("limits") or {}).get(RESOURCE))


def _count(amount: Any) -> int:
    """GPUs are whole numbers; Kubernetes refuses anything else."""
    text = str(amount or 0)
    return int(text) if text.isdigit() else 0


def per_pod(spec: InferenceServiceSpec) -> int:
    asked = spec.resources
    if not asked.requests and not asked.limits:
        return spec.engine.tensor_parallel_size
    return _count(asked.limits.get(RESOURCE))


def room(spec: InferenceServiceSpec, nodes: Iterable[Node], held: Iterable[tuple[str, int]]) -> int | None:
    """Further replicas that the nodes have GPUs for. None: it needs none, or no node is in sight.

    A replica of several pods needs them for each."""
    wanted, seen = per_pod(spec), list(nodes)
    if wanted == 0 or not seen:
        return None
    used: dict[str, int] = {}
    for name, gpus in held:
        used[name] = used.get(name, 0) + gpus
    template = spec.pod_template.spec
    selector = cast("dict[str, str]", template.get("nodeSelector") or {})
    tolerations = cast("list[JSON]", template.get("tolerations") or [])
    pods = sum(
        max(0, node.gpus - used.get(node.name, 0)) // wanted for node in seen if _takes(node, selector, tolerations)
    )
    return pods // spec.engine.pipeline_parallel_size


def _takes(node: Node, selector: Mapping[str, str], tolerations: Sequence[JSON]) -> bool:
    chosen = selector.items() <= node.labels.items()
    return node.usable and chosen and all(any(_tolerates(t, taint) for t in tolerations) for taint in node.taints)


def _tolerates(toleration: JSON, taint: JSON) -> bool:
    """Kubernetes' rule: an empty key with Exists matches every taint, an empty effect every effect."""
    if toleration.get("effect") and toleration["effect"] != taint.get("effect"):
        return False
    if toleration.get("operator", "Equal") == "Exists":
        return not toleration.get("key") or toleration["key"] == taint.get("key")
    return toleration.get("key") == taint.get("key") and (toleration.get("value") or "") == (taint.get("value") or "")
