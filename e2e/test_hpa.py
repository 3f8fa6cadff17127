"""Kubernetes' own HorizontalPodAutoscaler drives a service by a metric of an aggregated API, beside GitOps."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import pytest

from e2e import external_metrics
from e2e.fake_nodes import fake_nodes, on_pool
from e2e.gitops import sync
from e2e.kube import HANG_S, Kube, Object, condition, wait_for
from e2e.services import pods, service

NAME = "driven"


@pytest.fixture
def metrics(kube: Kube) -> Iterator[None]:
    kube.apply(*external_metrics.objects())
    wait = ("wait", "--for=condition=Available", f"--timeout={HANG_S}s")
    kube.run(*wait, "apiservice/v1beta1.external.metrics.k8s.io")
    external_metrics.set_value(kube, 2)
    yield
    external_metrics.remove(kube)


def autoscaler() -> Object:
    """What KEDA or a user would make: a target of two per replica, without waiting before it shrinks."""
    metric = {"type": "External", "external": {"metric": {"name": external_metrics.METRIC},
                                               "target": {"type": "AverageValue", "averageValue": "2"}}}  # fmt: skip
    reference = {"apiVersion": "mainsail.dev/v1alpha1", "kind": "InferenceService", "name": NAME}
    return {
        "apiVersion": "autoscaling/v2", "kind": "HorizontalPodAutoscaler",
        "metadata": {"name": NAME, "namespace": "default"},
        "spec": {"scaleTargetRef": reference, "minReplicas": 1, "maxReplicas": 6, "metrics": [metric],
                 "behavior": {"scaleDown": {"stabilizationWindowSeconds": 0}}},
    }  # fmt: skip


def test_an_hpa_scales_it_and_nobody_fights(kube: Kube, metrics: None) -> None:
    wanted = on_pool(service(NAME), "driven")
    del wanted["spec"]["replicas"]
    manifest = json.dumps(wanted)

    def told() -> tuple[int, int, int]:
        """Asked for, decided, serving."""
        obj = kube.get("mis", NAME) or {}
        status = obj.get("status", {})
        return obj["spec"]["replicas"], status.get("scaling", {}).get("desired"), status.get("servingReplicas")

    def wait_told(replicas: int) -> None:
        wait_for(f"{replicas} replicas", lambda: told() == (replicas,) * 3, story=lambda: (
            f"{told()} {json.dumps((kube.get('hpa', NAME) or {}).get('status'))}"))  # fmt: skip

    with fake_nodes(kube, "driven", {"driven-a": 0}):
        sync(kube, manifest)
        kube.apply(autoscaler())
        try:
            wait_told(1)
            external_metrics.set_value(kube, 7)
            wait_told(4)
            assert condition(kube.get("hpa", NAME), "ScalingActive")["status"] == "True"
            before = (kube.get("mis", NAME) or {})["metadata"]["generation"]
            for _ in range(4):
                sync(kube, manifest)
                time.sleep(2)
            obj = json.loads(kube.run("get", "mis", NAME, "-o", "json", "--show-managed-fields"))
            assert obj["metadata"]["generation"] == before, "nobody has written the spec again"
            assert told() == (4, 4, 4)
            owners = {m["manager"] for m in obj["metadata"]["managedFields"]
                      if "f:replicas" in json.dumps(m["fieldsV1"].get("f:spec", {}))}  # fmt: skip
            assert owners.isdisjoint({"argocd-controller", "mainsail-operator"}), "the number is the HPA's alone"
            assert condition(obj, "Ready")["status"] == "True"
            external_metrics.set_value(kube, 1)
            wait_told(1)
            assert len(pods(kube, NAME)) == 1
        finally:
            kube.delete("hpa", NAME)
            kube.delete("mis", NAME)
