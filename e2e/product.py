"""The product on a cluster, as a user would put it there: chart by helm, model in a claim, service by kubectl.

Works on any cluster that `Target` describes; what differs between the rig and another one (whose images, which
storage) is decided by the callers.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from e2e import model
from e2e.cluster.network import NODE
from e2e.cluster.place import Place
from e2e.steps import StepError, read, run, wait_until

NAMESPACE = "mainsail-system"
EXAMPLE = Path(__file__).parent / "example/smollm2.yaml"
EXAMPLE_NAME = "smollm2"
QUESTION = "What is the capital of France?"
ROLLOUT_S = 240
READY_S = 300
ROUTED_S = 180


@dataclass(frozen=True, kw_only=True)
class Target:
    """A cluster and how to reach it."""

    kubectl: Path
    helm: Path
    kubeconfig: Path
    engine_image: str
    control_plane_image: str
    logs: Path

    @property
    def _access(self) -> list[str | Path]:
        return ["--kubeconfig", self.kubeconfig]

    def read(self, *argv: str, stdin: str | None = None) -> str:
        """kubectl's output."""
        return read([self.kubectl, *self._access, *argv], stdin=stdin, do="see what the API server says in the message")

    def apply(self, *objects: dict[str, object]) -> None:
        """Server-side apply, validated strictly."""
        items = json.dumps({"apiVersion": "v1", "kind": "List", "items": objects})
        self.read("apply", "--server-side", "--force-conflicts", "--field-manager=mainsail-up", "--validate=strict",
                  "-f", "-", stdin=items)  # fmt: skip

    def run_helm(self, *argv: str | Path) -> None:
        """helm, into its log."""
        run([self.helm, *self._access, *argv], log=self.logs / "helm.log",
            do=f"see what is wrong in the namespace: `{self.kubectl} --kubeconfig {self.kubeconfig} "
               f"-n {NAMESPACE} get pods,events`")  # fmt: skip

    def tell_why(self) -> None:
        """Add what the cluster says about the product's Pods to helm's log, whose last lines are shown."""
        warnings = ["get", "events", "-n", NAMESPACE, "--field-selector=type=Warning", "-o",
                    "custom-columns=OBJECT:.involvedObject.name,MESSAGE:.message", "--no-headers"]  # fmt: skip
        for argv in (["get", "pods", "-n", NAMESPACE], warnings):
            run(
                [self.kubectl, *self._access, *argv],
                log=self.logs / "helm.log",
                do="see whether the cluster still runs",
            )


def install(target: Target, checkout: Path) -> None:
    """CRD, operator and gateway from the chart; waits until they run."""
    chart = checkout / "charts/mainsail"
    try:
        _install_chart(target, chart)
    except StepError:
        target.tell_why()
        raise
    crds = sorted((chart / "crds").glob("*.yaml"))
    for crd in crds:  # helm creates what lies in crds/ once and never upgrades it
        target.read("apply", "--server-side", "--force-conflicts", "-f", str(crd))
        target.read("wait", "--for=condition=Established", "--timeout=120s", "-f", str(crd))


def _install_chart(target: Target, chart: Path) -> None:
    target.run_helm("upgrade", "--install", "mainsail", chart, "--namespace", NAMESPACE, "--create-namespace",
                    "--wait", "--timeout", f"{ROLLOUT_S}s", *image_values(target))  # fmt: skip


def image_values(target: Target) -> list[str]:
    """helm's settings for the images."""
    values: list[str] = []
    for component, image in (("operator", target.control_plane_image), ("gateway", target.control_plane_image),
                             ("engine", target.engine_image)):  # fmt: skip
        repository, colon, tag = image.rpartition(":")
        if not colon or "/" in tag:
            raise StepError(f"the image {image!r} has no tag", do="name it with one, like example/engine:1.0")
        values += ["--set-string", f"{component}.image.repository={repository},{component}.image.tag={tag}"]
    return values


def local_volume(folder: Path, capacity: str = "1Gi") -> list[dict[str, object]]:
    """A folder of the rig's node as a PersistentVolume, and the claim `models` that it is bound to."""
    mode = {"accessModes": ["ReadOnlyMany"], "storageClassName": "mainsail-local"}
    on_node = {"key": "kubernetes.io/hostname", "operator": "In", "values": [NODE]}
    volume: dict[str, object] = {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": "mainsail-models"},
        "spec": {
            **mode,
            "capacity": {"storage": capacity},
            "persistentVolumeReclaimPolicy": "Retain",
            "local": {"path": str(folder)},
            "claimRef": {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "name": "models", "namespace": "default"},
            "nodeAffinity": {"required": {"nodeSelectorTerms": [{"matchExpressions": [on_node]}]}},
        },
    }
    claim: dict[str, object] = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": "models", "namespace": "default"},
        "spec": {**mode, "volumeName": "mainsail-models", "resources": {"requests": {"storage": capacity}}},
    }
    return [volume, claim]


def provide_local_model(target: Target, place: Place) -> None:
    """The model's folder as the claim `models`."""
    model.ensure(place)
    target.apply(*local_volume(place.models))
    target.read("wait", "--for=jsonpath={.status.phase}=Bound", "pvc/models", "-n", "default", "--timeout=180s")


def start_example(target: Target) -> None:
    """Apply the example service and wait until it is Ready."""
    target.read("apply", "--server-side", "--force-conflicts", "--validate=strict", "-f", str(EXAMPLE))
    kubectl = f"{target.kubectl} --kubeconfig {target.kubeconfig}"
    try:
        wait_until(f"InferenceService {EXAMPLE_NAME} is Ready", lambda: is_ready(service(target)), seconds=READY_S,
                   every=0.5, do=f"see why: `{kubectl} describe mis {EXAMPLE_NAME}`, `{kubectl} logs -l "
                                 f"mainsail.dev/service={EXAMPLE_NAME}`, and the operator's: "
                                 f"`{kubectl} -n {NAMESPACE} logs deploy/mainsail-operator`")  # fmt: skip
    except StepError as error:
        raise StepError(f"{error.what}; its conditions: {conditions_in_words(service(target))}", do=error.do) from error


def conditions_in_words(found: dict[str, Any]) -> str:
    """What the status says, for a terminal."""
    conditions = found.get("status", {}).get("conditions", [])
    words = [f"{one['type']}={one['status']} {one.get('reason', '')}: {one.get('message', '')}" for one in conditions]
    return "; ".join(words) or "none (the operator has not written any)"


def service(target: Target) -> dict[str, Any]:
    """The example's object."""
    return json.loads(target.read("get", "inferenceservice", EXAMPLE_NAME, "-n", "default", "-o", "json"))


def is_ready(found: dict[str, Any]) -> bool:
    """Ready, and said about the newest spec."""
    status = found.get("status", {})
    ready = any(one["type"] == "Ready" and one["status"] == "True" for one in status.get("conditions", []))
    return ready and status.get("observedGeneration") == found["metadata"]["generation"]


def wait_routed(host: str, port: int) -> None:
    """Until the gateway lists the example (it watches, so this follows readiness within moments)."""
    wait_until(f"the gateway on port {port} lists {EXAMPLE_NAME}", lambda: _lists(host, port), seconds=ROUTED_S,
               do=f"see the gateway's log: `kubectl -n {NAMESPACE} logs deploy/mainsail-gateway`")  # fmt: skip


def _lists(host: str, port: int) -> bool:
    connection = http.client.HTTPConnection(host, port, timeout=5)
    try:
        connection.request("GET", "/v1/models")
        response = connection.getresponse()
        body = response.read()
        return response.status == 200 and any(one["id"] == EXAMPLE_NAME for one in json.loads(body)["data"])
    except (OSError, http.client.HTTPException, ValueError):
        return False
    finally:
        connection.close()


def ask(host: str, port: int, question: str) -> Iterator[str]:
    """One question to the example through the gateway; the answer's pieces as they are streamed."""
    body = {"model": EXAMPLE_NAME, "messages": [{"role": "user", "content": question}], "stream": True,
            "max_tokens": 48, "temperature": 0}  # fmt: skip
    connection = http.client.HTTPConnection(host, port, timeout=120)
    try:
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise StepError(f"the gateway answered {response.status}: {response.read().decode(errors='replace')}",
                            do=f"see the logs of the gateway and of the engine: `kubectl -n {NAMESPACE} logs "
                               f"deploy/mainsail-gateway`, `kubectl logs -l mainsail.dev/service={EXAMPLE_NAME}`",
                            )  # fmt: skip
        yield from pieces(line.decode() for line in response)
    finally:
        connection.close()


def pieces(lines: Iterator[str]) -> Iterator[str]:
    """The text in a stream of server-sent chat chunks; an error event, or no [DONE], is an error here."""
    for line in lines:
        field, _, data = line.strip().partition(":")
        if field != "data":
            continue
        if data.strip() == "[DONE]":
            return
        event = json.loads(data)
        if "error" in event:
            raise StepError(f"the stream ended with an error: {event['error']}", do="see the engine's log")
        yield from (choice["delta"].get("content") or "" for choice in event["choices"])
    raise StepError("the stream broke off", do="see the engine's log")
