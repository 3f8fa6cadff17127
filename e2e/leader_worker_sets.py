"""LeaderWorkerSets on the rig: the real controller (sigs.k8s.io/lws), built from its Go module, and its manifests.

It is built in the module's folder, with the versions that its own go.mod and go.sum pin. It runs as a Pod, as it does
elsewhere, with the program from a folder of the node.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from e2e.cluster import cache, gobuild
from e2e.cluster.images import CONTROL_PLANE_IMAGE
from e2e.cluster.place import Place
from e2e.kube import Kube, Object
from e2e.steps import read, run

MODULE = "sigs.k8s.io/lws@v0.8.0"
NAMESPACE = "lws-system"
MANAGER = "lws-controller-manager"


def source(place: Place) -> Path:
    """The module's folder, fetched when it is not there."""
    environment = gobuild.build_environment(os.environ)
    run(["go", "mod", "download", MODULE], log=place.logs / "lws-build.log", do=gobuild.GO_MISSING, env=environment,
        cwd=place.cache)  # fmt: skip
    found = read(["go", "env", "GOMODCACHE"], do=gobuild.GO_MISSING)
    return Path(found.strip(), *MODULE.split("/"))


def ensure(place: Place, module: Path) -> Path:
    """The folder with the program; builds it when the cache has none."""

    def build(draft: Path) -> None:
        run(["go", "build", *gobuild.TRIMMED, "-o", draft / "manager", "./cmd"], log=place.logs / "lws-build.log",
            do="see the log", env=gobuild.build_environment(os.environ), cwd=module)  # fmt: skip

    return cache.entry(place.cache, f"lws-{cache.key_of(MODULE)}", build)


@contextmanager
def installed(place: Place, kube: Kube) -> Iterator[None]:
    """The cluster has LeaderWorkerSets in the block, and none after it."""
    module = source(place)
    program = ensure(place, module)
    manifests = kube.run("kustomize", str(module / "config/default"))
    objects: list[Object] = [_here(one, program) for one in yaml.safe_load_all(manifests) if one]
    kube.apply(*objects)
    try:
        kube.run("rollout", "status", f"deployment/{MANAGER}", "-n", NAMESPACE, "--timeout=120s", timeout_s=130)
        yield
    finally:
        for one in reversed(objects):
            if one["kind"] in ("MutatingWebhookConfiguration", "ValidatingWebhookConfiguration", "ClusterRole",
                               "ClusterRoleBinding", "CustomResourceDefinition"):  # fmt: skip
                kube.delete(one["kind"], one["metadata"]["name"], wait=False)
        kube.delete("namespace", NAMESPACE, wait=False)


def _here(manifest: dict[str, Any], program: Path) -> Object:
    """The manager's Deployment with the program of this node; everything else as it is."""
    if manifest["kind"] != "Deployment":
        return manifest
    manifest["spec"]["replicas"] = 1
    pod = manifest["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    container |= {"image": CONTROL_PLANE_IMAGE, "command": ["/lws/manager"], "resources": {}}
    container["readinessProbe"] |= {"initialDelaySeconds": 0, "periodSeconds": 1}
    container["volumeMounts"].append({"name": "program", "mountPath": "/lws", "readOnly": True})
    pod["volumes"].append({"name": "program", "hostPath": {"path": str(program)}})
    return manifest
