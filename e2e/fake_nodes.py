"""Nodes that are objects alone, and one kubelet for all of them: for what needs several nodes, GPUs, or a node's end.

Scheduler, controllers and endpoints are the real ones; only the pods on these nodes do not run: their kubelet says that
they do, renews the nodes' Leases, and lets what is deleted go at once.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import httpx2
from lightkube import KubeConfig
from lightkube.config.client_adapter import Client, ConnectionParams

from e2e.kube import Kube, Object

LABEL = "e2e.mainsail.dev/nodes"
GPU = "nvidia.com/gpu"
_MERGE = {"content-type": "application/strategic-merge-patch+json"}
_LEASES = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases"


def placed(obj: Object, pool: str) -> Object:
    """The service with its pods on the nodes of a pool, at most one on each."""
    name = obj["metadata"]["name"]
    apart = {"labelSelector": {"matchLabels": {"mainsail.dev/service": name}}, "topologyKey": "kubernetes.io/hostname"}
    affinity = {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [apart]}}
    return on_pool(obj, pool, affinity=affinity)


def on_pool(obj: Object, pool: str, **more: Any) -> Object:
    """The service with its pods on the nodes of a pool. Its model is nowhere: a claim would bind it to a node."""
    obj = obj | {"spec": obj["spec"] | {"model": {"uri": "file:///models/none"}}}
    spec = {"nodeSelector": {LABEL: pool}, "tolerations": [{"key": LABEL, "operator": "Exists"}], **more}
    return obj | {"spec": obj["spec"] | {"podTemplate": {"spec": spec}}}


class FakeNodes:
    def __init__(self, client: httpx2.Client, pool: str, gpus: Mapping[str, int]) -> None:
        """gpus: by node."""
        self._client = client
        self._pool = pool
        self._nodes = dict(gpus)
        self._silent: set[str] = set()
        self._renewed = 0.0
        self.hold = threading.Event()
        """While set, no further pod becomes Ready."""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fake kubelet", daemon=True)

    def start(self) -> None:
        for name, gpus in self._nodes.items():
            self._send("POST", "/api/v1/nodes", {
                "apiVersion": "v1", "kind": "Node",
                "metadata": {"name": name, "labels": {LABEL: self._pool, "kubernetes.io/hostname": name}},
                "spec": {"taints": [{"key": LABEL, "effect": "NoSchedule"}]},
            })  # fmt: skip
            self.give_gpus(name, gpus)
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        self._thread.join(20)
        for name in self._nodes:
            self._client.delete(f"/api/v1/nodes/{name}")
            self._client.delete(f"{_LEASES}/{name}")

    def give_gpus(self, node: str, count: int) -> None:
        room = {"cpu": "32", "memory": "64Gi", "pods": "110", GPU: str(count)}
        self._send("PATCH", f"/api/v1/nodes/{node}/status", {"status": {
            "capacity": room, "allocatable": room,
            "conditions": [{"type": "Ready", "status": "True", "reason": "Fake", "message": "",
                            "lastHeartbeatTime": _now(), "lastTransitionTime": _now()}],
        }})  # fmt: skip

    def silence(self, node: str) -> None:
        """Its kubelet is heard no more: a lost machine, before anybody knows."""
        self._silent.add(node)

    def take_back(self, node: str) -> None:
        """A spot instance that was taken back: the machine and, by the cloud's controller, the Node object."""
        self._silent.add(node)
        self._client.delete(f"/api/v1/nodes/{node}").raise_for_status()

    def _send(self, method: str, path: str, body: Object) -> None:
        headers = _MERGE if method == "PATCH" else {}
        answer = self._client.request(method, path, json=body, headers=headers)
        if answer.status_code not in (404, 409):
            answer.raise_for_status()

    def _run(self) -> None:
        while not self._ended.wait(0.2):
            with contextlib.suppress(httpx2.HTTPError, OSError):  # the API server may be what is tested
                self._round()

    def _round(self) -> None:
        if time.monotonic() - self._renewed > 10:
            for node in self._nodes.keys() - self._silent:
                self._renew(node)
            self._renewed = time.monotonic()
        for node in self._nodes.keys() - self._silent:
            found = self._client.get("/api/v1/pods", params={"fieldSelector": f"spec.nodeName={node}"}).json()
            for number, pod in enumerate(found["items"]):
                self._tend(pod, f"10.99.{list(self._nodes).index(node)}.{number + 1}")

    def _renew(self, node: str) -> None:
        spec = {"holderIdentity": node, "leaseDurationSeconds": 40, "renewTime": _now(micro=True)}
        lease = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": node}, "spec": spec}
        self._send("POST", _LEASES, lease)
        self._send("PATCH", f"{_LEASES}/{node}", {"spec": spec})

    def _tend(self, pod: Object, address: str) -> None:
        path = f"/api/v1/namespaces/{pod['metadata']['namespace']}/pods/{pod['metadata']['name']}"
        if pod["metadata"].get("deletionTimestamp"):
            self._client.request("DELETE", path, json={"gracePeriodSeconds": 0})
        elif pod["status"].get("phase") == "Pending" and not self.hold.is_set():
            kinds = ("PodReadyToStartContainers", "Initialized", "ContainersReady", "Ready")
            conditions = [{"type": kind, "status": "True", "lastTransitionTime": _now()} for kind in kinds]
            state = {"imageID": "fake", "ready": True, "started": True, "restartCount": 0,
                     "state": {"running": {"startedAt": _now()}}}  # fmt: skip
            state = {"imageID": "fake", "ready": True, "started": True, "restartCount": 0,
                     "state": {"running": {"startedAt": _now()}}}  # fmt: skip
            containers = [state | {"name": c["name"], "image": c["image"]} for c in pod["spec"]["containers"]]
            self._send("PATCH", f"{path}/status", {"status": {
                "phase": "Running", "podIP": address, "podIPs": [{"ip": address}], "startTime": _now(),
                "conditions": conditions, "containerStatuses": containers,
            }})  # fmt: skip


def _now(*, micro: bool = False) -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ" if micro else "%Y-%m-%dT%H:%M:%SZ")


@contextmanager
def fake_nodes(kube: Kube, pool: str, gpus: Mapping[str, int]) -> Iterator[FakeNodes]:
    """Nodes of that name until the block ends."""
    config = KubeConfig.from_file(kube.kubeconfig).get()
    assert config is not None
    with Client(config, ConnectionParams(trust_env=False)) as client:
        nodes = FakeNodes(client, pool, gpus)
        nodes.start()
        try:
            yield nodes
        finally:
            nodes.stop()
