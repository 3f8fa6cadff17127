"""How fetched models (hf://, s3://, oci://) come to the pods: pure builders. `fetched` reads how far they are.

    cache.claim      a Job fills the shared volume once, before the first pod exists: no GPU waits for a download
    cache.nodePath   a DaemonSet fetches to every node that replicas may run on, and stays for nodes to come
    no cache         nothing ahead of need

In each case the engine's pod has an init container `fetch` that does the same: where the copy is there already it ends
at once; where it is not (a cache that was emptied, a node that is new) it fetches it. One program does all three
(`mainsail_fetch`), so a copy is complete or not there, whoever made it.

A copy is named after the model, not after the revision: other settings of the engine fetch nothing. The Job or
DaemonSet may delete copies that nobody uses, to make room; an engine's own init container never does.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import cast

from lightkube.utils.quantity import parse_quantity

from mainsail_fetch.source import file_in, folder, parse
from mainsail_operator.settings import Settings
from mainsail_operator.types import JSON, InferenceServiceSpec
from mainsail_operator.types.model import SecretReference

CONTAINER = "fetch"
LABEL = "mainsail.dev/fetch-for"
"""Label of pods that fetch: the service's name. Not the label of engine pods, which Services select by."""
NAME = "mainsail-fetch"
PORT = 8002
_ROOT = "/models"
_VOLUME = "model"


def is_fetched(spec: InferenceServiceSpec) -> bool:
    return parse(spec.model.uri, spec.model.revision) is not None


def copy_name(spec: InferenceServiceSpec) -> str:
    """The folder that the model's copy has, in every cache."""
    return folder(spec.model.uri, spec.model.revision)


def model_path(spec: InferenceServiceSpec) -> str:
    """Where the engine finds the model: a folder, or the one file that the URI names."""
    source = parse(spec.model.uri, spec.model.revision)
    if source is None:
        raise ValueError(f"{spec.model.uri} is not fetched")
    path = f"{_ROOT}/{copy_name(spec)}"
    name = file_in(source)
    return f"{path}/{name}" if name else path


def volume(spec: InferenceServiceSpec) -> JSON:
    """The volume that holds the copies."""
    cache = spec.model.cache
    if cache is not None and cache.claim is not None:
        return {"name": _VOLUME, "persistentVolumeClaim": {"claimName": cache.claim}}
    if cache is not None and cache.node_path is not None:
        return {"name": _VOLUME, "hostPath": {"path": cache.node_path, "type": "DirectoryOrCreate"}}
    return {"name": _VOLUME, "emptyDir": {}}


def mount(*, read_only: bool) -> JSON:
    return {"name": _VOLUME, "mountPath": _ROOT} | ({"readOnly": True} if read_only else {})


def container(spec: InferenceServiceSpec, settings: Settings, *, stay: bool = False) -> JSON:
    """The container that fetches the model; `spec.podTemplate` may add to it under its name."""
    model = spec.model
    arguments = [model.uri, f"{_ROOT}/{copy_name(spec)}", "--revision", model.revision, "--port", str(PORT)]
    found = fetcher(CONTAINER, [*arguments, *(["--stay"] if stay else [])], model.secret_ref, settings)
    found["ports"] = [{"name": "progress", "containerPort": PORT, "protocol": "TCP"}]
    found["volumeMounts"].append(mount(read_only=False))
    return found


def fetcher(name: str, arguments: list[str], secret: SecretReference | None, settings: Settings) -> JSON:
    """A container that runs mainsail-fetch; the caller mounts where it fetches to."""
    found: JSON = {
        "name": name,
        "image": settings.fetch_image,
        "imagePullPolicy": settings.fetch_image_pull_policy,
        "command": ["mainsail-fetch"],
        "args": arguments,
        "env": [{"name": "HOME", "value": "/tmp"}],
        "resources": {"requests": {"cpu": "100m", "memory": "128Mi"}, "limits": {"memory": "2Gi"}},
        "securityContext": {
            "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
    }  # fmt: skip
    if secret is not None:
        # As variables and not as files: a Secret that is missing is then in the pod's status, and not only in an event.
        docker = {"secretKeyRef": {"name": secret.name, "key": ".dockerconfigjson", "optional": True}}
        found["env"].append({"name": "OCI_DOCKER_CONFIG", "valueFrom": docker})
        found["envFrom"] = [{"secretRef": {"name": secret.name}}]
    return found


def eviction(spec: InferenceServiceSpec, kept: Collection[str], now: float) -> list[str]:
    """Which other copies the fetcher may delete to make room (`mainsail_fetch.evict`)."""
    cache = spec.model.cache
    limit = parse_quantity(str(cache.limit)) if cache and cache.limit is not None else None
    found = ["--decided-at", f"{now:.0f}"]
    found += ["--limit", str(int(limit))] if limit is not None else []
    return found + [word for name in sorted(kept) for word in ("--keep", name)]


_SHARED = ("nodeSelector", "tolerations", "affinity", "imagePullSecrets", "hostAliases", "dnsConfig", "dnsPolicy",
           "securityContext", "priorityClassName")  # fmt: skip
"""What a pod that fetches takes over from spec.podTemplate.spec."""


def pod(spec: InferenceServiceSpec, settings: Settings, base: JSON, *, stay: bool) -> JSON:
    """The pod of the Job or DaemonSet. base: the parts of a pod that all of ours have."""
    template = spec.pod_template.spec
    found = copy.deepcopy(base) | {key: copy.deepcopy(template[key]) for key in _SHARED if key in template}
    own = [c for c in _list(template, "initContainers") if c.get("name") == CONTAINER]
    fetcher = container(spec, settings, stay=stay)
    for more in own:
        fetcher = _with(fetcher, more)
    if stay:
        ready = {"httpGet": {"path": "/ready", "port": "progress"}, "periodSeconds": 2}
        fetcher = {**fetcher, "readinessProbe": ready}
    tmp: JSON = {"name": "tmp", "emptyDir": {}}
    return found | {"containers": [fetcher], "volumes": [tmp, volume(spec), *_mounted(template, own)]}


def _with(base: JSON, more: JSON) -> JSON:
    """What a user gives the container `fetch`: variables, mounts (of a certificate, say), resources, an image."""
    names = {one["name"] for one in _list(more, "env")}
    paths = {one["mountPath"] for one in _list(more, "volumeMounts")}
    found = {
        **base,
        "env": [*(one for one in _list(base, "env") if one["name"] not in names), *_list(more, "env")],
        "volumeMounts": [
            *(one for one in _list(base, "volumeMounts") if one["mountPath"] not in paths),
            *_list(more, "volumeMounts"),
        ],
    }
    if sources := [*_list(base, "envFrom"), *_list(more, "envFrom")]:
        found["envFrom"] = sources
    return found | {key: more[key] for key in ("resources", "image", "imagePullPolicy") if key in more}


def _mounted(template: JSON, containers: Collection[JSON]) -> list[JSON]:
    """The template's volumes that these containers mount."""
    names = {one["name"] for container in containers for one in _list(container, "volumeMounts")}
    return [one for one in _list(template, "volumes") if one["name"] in names - {"tmp", _VOLUME}]


def _list(obj: JSON, key: str) -> list[JSON]:
    return cast("list[JSON]", obj.get(key) or [])
