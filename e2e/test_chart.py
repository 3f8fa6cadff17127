"""The chart as helm renders it: keys, TLS, several workers, rights on Secrets."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from e2e import product
from e2e.cluster.place import Place
from e2e.kube import Kube, Object, wait_for
from e2e.services import service

SYSTEM = product.NAMESPACE
CHART = Path(__file__).parents[1] / "charts/mainsail"
Render = Callable[..., list[Object]]


@pytest.fixture(scope="module")
def render(cluster: Place) -> Render:
    """`helm template` with these settings."""

    def rendered(*settings: str) -> list[Object]:
        command = [cluster.programs / "helm", "template", "mainsail", CHART, "--namespace", SYSTEM]
        command += [part for setting in settings for part in ("--set", setting)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        if done.returncode:
            raise ValueError(done.stderr)
        return [found for found in yaml.safe_load_all(done.stdout) if found]

    return rendered


def gateway(objects: list[Object]) -> Object:
    return named(objects, "Deployment", "mainsail-gateway")


def named(objects: list[Object], kind: str, name: str) -> Object:
    return next(found for found in objects if (found["kind"], found["metadata"]["name"]) == (kind, name))


def flags(deployment: Object) -> dict[str, list[str]]:
    """Each flag of the gateway with its values; a switch has none."""
    args: list[str] = deployment["spec"]["template"]["spec"]["containers"][0]["args"]
    found: dict[str, list[str]] = {}
    flag = ""
    for arg in args:
        if arg.startswith("--"):
            flag = arg
        found.setdefault(flag, []).extend([] if arg == flag else [arg])
    return found


def test_without_settings_nobody_may_read_secrets(render: Render) -> None:
    objects = render()
    told = flags(gateway(objects))
    assert (told["--auth"], told["--workers"]) == (["anonymous"], ["1"])
    assert told.keys().isdisjoint({"--keys-namespace", "--tls-cert", "--external-namespace", "--no-kv-events"})
    of_gateway = [found for found in objects if "gateway" in found["metadata"]["name"] and "rules" in found]
    assert of_gateway
    assert not any("secrets" in rule["resources"] for found in of_gateway for rule in found["rules"])


def test_settings_become_flags_rights_and_files(render: Render) -> None:
    objects = render("gateway.auth.mode=Keys", "gateway.auth.namespace=keys", "gateway.tls.secretName=front",
                     "gateway.externalNamespaces={a,b}", "gateway.workers=3", "gateway.kvEvents=false")  # fmt: skip
    deployment = gateway(objects)
    told = flags(deployment)
    assert (told["--auth"], told["--keys-namespace"], told["--workers"]) == (["keys"], ["keys"], ["3"])
    assert told["--external-namespace"] == ["a", "b"]
    assert "--no-kv-events" in told
    assert told["--tls-cert"] == ["/etc/mainsail/tls/tls.crt"]
    pod = deployment["spec"]["template"]["spec"]
    assert {"name": "tls", "secret": {"secretName": "front"}} in pod["volumes"]
    mounts = pod["containers"][0]["volumeMounts"]
    assert {"name": "tls", "mountPath": "/etc/mainsail/tls", "readOnly": True} in mounts
    for name, namespaces in (("mainsail-gateway-keys", {"keys"}), ("mainsail-gateway-external", {"a", "b"})):
        roles = [x for x in objects if x["kind"] == "Role" and x["metadata"]["name"] == name]
        bindings = [x for x in objects if x["kind"] == "RoleBinding" and x["metadata"]["name"] == name]
        assert (
            {x["metadata"]["namespace"] for x in roles} == {x["metadata"]["namespace"] for x in bindings} == namespaces
        )
        reads = [{"apiGroups": [""], "resources": ["secrets"], "verbs": ["get", "list", "watch"]}]
        assert all(role["rules"] == reads for role in roles)
        account = {"kind": "ServiceAccount", "name": "mainsail-gateway", "namespace": SYSTEM}
        assert all(binding["subjects"] == [account] for binding in bindings)


def test_a_chart_may_depend_on_this_one_under_a_condition(render: Render) -> None:
    """`condition: mainsail.enabled` hands that value down, where the schema refuses what it does not know."""
    assert render("enabled=true") == render()


def test_a_load_balancer_is_told_what_its_cloud_wants(render: Render) -> None:
    found = named(render("gateway.service.annotations.internal=yes"), "Service", "mainsail-gateway")
    assert found["metadata"]["annotations"] == {"internal": "yes"}
    assert "annotations" not in named(render(), "Service", "mainsail-gateway")["metadata"]


def test_a_priority_class_is_for_operator_and_gateway(render: Render) -> None:
    for settings, expected in ((("priorityClassName=system-cluster-critical",), "system-cluster-critical"), ((), None)):
        deployments = [found for found in render(*settings) if found["kind"] == "Deployment"]
        assert len(deployments) == 2
        assert {d["spec"]["template"]["spec"].get("priorityClassName") for d in deployments} == {expected}


def test_pod_monitors_choose_pods_and_ports_that_are_there(render: Render, kube: Kube) -> None:
    """Of operator and gateway by what the chart gives their pods; of engines by what the operator does."""
    assert "PodMonitor" not in {found["kind"] for found in render()}
    objects = render("metrics.podMonitors.enabled=true", "metrics.podMonitors.labels.release=prom")
    monitors = {found["metadata"]["name"]: found for found in objects if found["kind"] == "PodMonitor"}
    assert all(monitor["metadata"]["labels"]["release"] == "prom" for monitor in monitors.values())
    for component in ("operator", "gateway"):
        pod = named(objects, "Deployment", f"mainsail-{component}")["spec"]["template"]
        assert chooses(monitors.pop(f"mainsail-{component}"), pod)
    engines = monitors.pop("mainsail-engine")
    assert not monitors
    kube.apply(service("monitored", replicas=0))
    selector = "mainsail.dev/service=monitored"
    (deployment,) = wait_for("its Deployment", lambda: kube.list("deployments", selector=selector), story=kube.story)
    pod = deployment["spec"]["template"]
    kube.delete("mis", "monitored")
    assert chooses(engines, pod)
    assert set(engines["spec"]["podTargetLabels"]) <= pod["metadata"]["labels"].keys()
    assert engines["spec"]["namespaceSelector"] == {"any": True}


def chooses(monitor: Object, pod: Object) -> bool:
    """Whether a PodMonitor takes the pod, and the port that it asks is one of the pod's."""
    labels, selector = pod["metadata"]["labels"], monitor["spec"]["selector"]
    ports = {port["name"] for container in pod["spec"]["containers"] for port in container["ports"]}
    return (
        selector["matchLabels"].items() <= labels.items()
        and all(it["operator"] == "Exists" and it["key"] in labels for it in selector.get("matchExpressions", []))
        and {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]} <= ports
    )


def test_an_endpoint_picker_has_a_port_of_its_own(render: Render) -> None:
    objects = render("gateway.endpointPicker.enabled=true", "gateway.endpointPicker.port=9004")
    deployment, service = gateway(objects), named(objects, "Service", "mainsail-gateway")
    assert flags(deployment)["--epp-port"] == ["9004"]
    ports = {p["name"]: p["containerPort"] for p in deployment["spec"]["template"]["spec"]["containers"][0]["ports"]}
    assert ports == {"http": 8080, "health": 8081, "grpc-ext-proc": 9004}
    (picker,) = (port for port in service["spec"]["ports"] if port["name"] == "grpc-ext-proc")
    assert (picker["port"], picker["targetPort"]) == (9004, "grpc-ext-proc")
    assert len(named(render(), "Service", "mainsail-gateway")["spec"]["ports"]) == 1


@pytest.mark.parametrize(
    "wrong", ["gateway.auth.mode=keys", "gateway.workers=0", "gateway.tls.secret=x", "gateway.externalNamespaces=a"]
)
def test_a_wrong_setting_is_refused(render: Render, wrong: str) -> None:
    with pytest.raises(ValueError, match="gateway"):
        render(wrong)
