"""What counts as changed by somebody else, of objects as the API server returns them."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from mainsail_operator import objects
from mainsail_operator.drift import content_of, holds
from mainsail_operator.objects import Owner
from mainsail_operator.settings import Settings

OWNER = Owner("demo", "ns", "uid")
MADE = {
    f"{m['kind']}/{m['metadata']['name']}": m for m in objects.children(OWNER, Settings(metrics_namespaces=("mon",)))
}


def there(child: str) -> dict[str, Any]:
    """As it is in a cluster, with what API server, clouds and other controllers add."""
    obj = copy.deepcopy(MADE[child])
    obj["metadata"] |= {"uid": "x", "resourceVersion": "7", "managedFields": [{}]}
    obj["metadata"]["labels"]["team"] = "search"
    obj["metadata"]["annotations"]["cloud.example/neg"] = "{}"
    obj["status"] = {"loadBalancer": {}}
    if child == "Service/demo-engines":
        obj["spec"] |= {"sessionAffinity": "None", "type": "ClusterIP", "clusterIPs": ["None"], "ipFamilies": ["IPv4"]}
        obj["spec"]["ports"].append({"name": "mesh", "port": 15000, "targetPort": 15000, "protocol": "TCP"})
    if child.startswith("ServiceAccount"):
        obj |= {"imagePullSecrets": [{"name": "registry"}], "secrets": [{"name": "token"}]}
    return obj


@pytest.mark.parametrize("child", MADE)
def test_what_others_add_is_theirs(child: str) -> None:
    assert holds(content_of(there(child)), MADE[child])


def put(path: str, value: Any):
    def change(obj: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        for key in parents:
            obj = obj[key]
        obj[last] = value

    return change


ENGINES, POLICY = "Service/demo-engines", "NetworkPolicy/demo"
BUDGET, ACCOUNT = "PodDisruptionBudget/demo", "ServiceAccount/demo"


@pytest.mark.parametrize(
    ("child", "change"),
    [
        ("Service/demo", put("spec.externalName", "elsewhere.example")),
        (ENGINES, put("spec.selector.app", "other")),
        (ENGINES, lambda obj: obj["spec"]["ports"].pop(0)),
        (ENGINES, lambda obj: obj["spec"]["ports"][0].update(targetPort=9)),
        (ENGINES, lambda obj: obj["metadata"]["labels"].pop("app.kubernetes.io/managed-by")),
        (POLICY, lambda obj: obj["spec"]["ingress"].append({})),
        (POLICY, put("spec.ingress", [])),
        (POLICY, lambda obj: obj["spec"]["ingress"][0].pop("ports")),
        (POLICY, lambda obj: obj["spec"]["ingress"][0]["from"].append({"podSelector": {}})),
        (POLICY, lambda obj: obj["spec"]["ingress"][0]["from"][0]["podSelector"]["matchLabels"].clear()),
        (POLICY, put("spec.podSelector", {"matchLabels": {"no": "such"}})),
        (POLICY, lambda obj: obj["spec"]["podSelector"].update(matchExpressions=[{}])),
        (BUDGET, put("spec.maxUnavailable", 5)),
        (BUDGET, put("spec.selector.matchLabels.x", "y")),
        (ACCOUNT, put("automountServiceAccountToken", True)),
        (ACCOUNT, lambda obj: obj.pop("automountServiceAccountToken")),
    ],
)
def test_what_is_ours_is_missed(child: str, change) -> None:
    obj = there(child)
    change(obj)
    assert not holds(content_of(obj), MADE[child])
