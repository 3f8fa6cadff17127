"""Under a policy engine, only the gateway and the operator reach an engine; a stranger's pod does not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from e2e import policy, tiny
from e2e.cluster.images import CONTROL_PLANE_IMAGE
from e2e.cluster.place import Place
from e2e.kube import HANG_S, Kube, KubectlError, Object, wait_for
from e2e.services import client, pods, service, wait_ready, wait_routed

pytestmark = pytest.mark.slow
"""The engine is a Go build of some minutes, once on a machine."""
CONNECT = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 3).close(); print('connected')"


@pytest.fixture
def stranger(kube: Kube) -> Iterator[str]:
    """A pod of the service's own namespace."""
    name = "stranger"
    account = {"runAsNonRoot": True, "runAsUser": 65534, "seccompProfile": {"type": "RuntimeDefault"}}
    container: Object = {
        "name": "shell", "image": CONTROL_PLANE_IMAGE,
        "command": ["/opt/mainsail/venv/bin/python", "-c", "import time; time.sleep(600)"],
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }  # fmt: skip
    kube.apply({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": "default"},
                "spec": {"containers": [container], "securityContext": account,
                         "terminationGracePeriodSeconds": 0}})  # fmt: skip
    kube.run("wait", "--for=condition=Ready", f"pod/{name}", f"--timeout={HANG_S}s")
    yield name
    kube.delete("pod", name)


def reaches(kube: Kube, who: str, namespace: str, address: str, port: int) -> bool:
    """Whether a TCP connection from that pod is made."""
    command = ["exec", who, "-n", namespace, "--", "python", "-c", CONNECT, address, str(port)]
    try:
        return "connected" in kube.run(*command)
    except KubectlError as error:
        if "timed out" in str(error):
            return False
        raise


def test_only_the_gateway_and_the_operator_reach_an_engine(
    cluster: Place, kube: Kube, gateway_url: str, stranger: str, system_namespace: str
) -> None:
    tiny.write(cluster.models / "tiny")
    kube.apply(service("guarded", uri="pvc://models/tiny"))
    try:
        wait_ready(kube, "guarded")
        wait_routed(gateway_url, "guarded")
        (pod,) = pods(kube, "guarded")
        address = pod["status"]["podIP"]
        ours = [f"deploy/mainsail-{part}" for part in ("gateway", "operator")]
        assert reaches(kube, stranger, "default", address, 8000), "nothing enforces policies here by itself"
        with policy.enforced(cluster, kube):
            wait_for("the stranger kept out", lambda: not reaches(kube, stranger, "default", address, 8000))
            assert not reaches(kube, stranger, "default", address, 8001)
            for who in ours:
                assert reaches(kube, who, system_namespace, address, 8000)
            with client(gateway_url) as api:
                ask: Object = {"prompt": "Hi", "max_tokens": 3, "extra_body": {"ignore_eos": True}}
                usage = api.completions.create(model="guarded", **ask).usage
            assert usage is not None
            assert usage.completion_tokens == 3
        assert reaches(kube, stranger, "default", address, 8000), "it was the policy that kept it out"
    finally:
        kube.delete("mis", "guarded", wait=False)
