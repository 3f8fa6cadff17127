"""From a spec to the objects that carry it out: pure builders.

One Deployment for each revision; a revision is a hash of what the user asked for that changes the pod. Neither the
number of replicas nor anything of the operator (its version, its default image) is part of it, so scaling and upgrading
the operator restart nothing. Every object is owned by its InferenceService: deleting that deletes them, with no
finalizer that could hang.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, cast

from lightkube.utils.quantity import parse_quantity

from mainsail_operator import adapters, fetching
from mainsail_operator.settings import Settings
from mainsail_operator.types import API_VERSION, JSON, KIND, InferenceServiceSpec, pvc_source, seconds

SERVICE_LABEL = "mainsail.dev/service"
WORKER_LABEL = "mainsail.dev/worker-of"
"""Label of the pods of a group that serve nothing themselves, in place of the one above."""
REVISION_LABEL = "mainsail.dev/revision"
GROUP_LABEL = "leaderworkerset.sigs.k8s.io/group-index"
"""Of a LeaderWorkerSet's pods: which of its groups they belong to."""
GROUP_KIND = "LeaderWorkerSet"
APPLIED = "mainsail.dev/applied"
"""Annotation: hash of the manifest that was applied last. Equal: nothing to write."""
PAUSED = "mainsail.dev/paused"
"""Annotation of an InferenceService: while it is "true", nothing of the service is written but its status."""
DELETION_COST = "controller.kubernetes.io/pod-deletion-cost"
"""Kubernetes' own annotation: of the pods of a ReplicaSet that shrinks, those with the lowest cost go first."""
CONTAINER = "engine"
HTTP_PORT, HEALTH_PORT = 8000, 8001
MEETING_PORT = 29500
"""Where the ranks of a group meet, on its leader."""
KV_PORTS = {"kv-events": 5557, "kv-replay": 5558}
"""Where engines tell what KV blocks they store and remove, for the gateway: named so in Pods and EndpointSlices."""
KV_EVENTS = json.dumps(
    {
        "endpoint": f"tcp://*:{KV_PORTS['kv-events']}",
        "replay_endpoint": f"tcp://*:{KV_PORTS['kv-replay']}",
        "buffer_steps": 1000,
    }
)
PRE_STOP_S = 5
"""Between an endpoint's removal and SIGTERM: routers must have noticed before the engine stops accepting."""
_GRACE_MARGIN_S = 10
_LOST_NODE_S = 20
_USER = 65534


@dataclass(frozen=True, slots=True)
class Owner:
    """The InferenceService that objects belong to."""

    name: str
    namespace: str
    uid: str

    def reference(self) -> JSON:
        return {
            "apiVersion": API_VERSION, "kind": KIND, "name": self.name, "uid": self.uid,
            "controller": True, "blockOwnerDeletion": False,
        }  # fmt: skip


def labels(owner: Owner) -> dict[str, str]:
    return {
        "app.kubernetes.io/name": "mainsail-engine",
        "app.kubernetes.io/instance": owner.name,
        "app.kubernetes.io/managed-by": "mainsail",
        SERVICE_LABEL: owner.name,
    }


def labels_of_all(owner: Owner) -> dict[str, str]:
    """What all of a service's engine pods have in common, workers included."""
    return {name: labels(owner)[name] for name in ("app.kubernetes.io/name", "app.kubernetes.io/instance")}


def is_grouped(spec: InferenceServiceSpec) -> bool:
    """Whether a replica has several pods."""
    return spec.engine.pipeline_parallel_size > 1


def url(owner: Owner, settings: Settings) -> str:
    """Where a client in the cluster asks this service: its own name, which is one of the gateway's."""
    scheme, usual = ("https", 443) if settings.gateway_tls else ("http", 80)
    port = "" if settings.gateway_port == usual else f":{settings.gateway_port}"
    return f"{scheme}://{owner.name}.{owner.namespace}.svc.cluster.local{port}/v1"


def selector(owner: Owner) -> str:
    return f"{SERVICE_LABEL}={owner.name}"


def revision_of(spec: InferenceServiceSpec) -> str:
    """Ten hex digits of what differs from the defaults in the parts of the spec that change the pod."""
    parts = spec.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    for unrelated in ("replicas", "scaling", "rollout", "admission"):
        parts.pop(unrelated, None)
    parts["model"].get("cache", {}).pop("limit", None)
    return digest(parts)


def digest(value: object) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def _metadata(owner: Owner, name: str, more: dict[str, str] | None = None) -> JSON:
    return {
        "name": name,
        "namespace": owner.namespace,
        "labels": labels(owner) | (more or {}),
        "ownerReferences": [owner.reference()],
    }


def stamped(manifest: JSON) -> JSON:
    manifest["metadata"]["annotations"] = {APPLIED: digest(manifest)}
    return manifest


def digest_of(manifest: JSON) -> str:
    """The hash that a built manifest carries."""
    return str(manifest["metadata"]["annotations"][APPLIED])


def service_account(owner: Owner) -> JSON:
    return stamped(
        {
            "apiVersion": "v1",
            "kind": "ServiceAccount",
            "metadata": _metadata(owner, owner.name),
            "automountServiceAccountToken": False,
        }
    )


def front(owner: Owner, settings: Settings) -> JSON:
    """The service's own name in the cluster: another name of the gateway, whose keys, weights and fail-over hold so."""
    gateway = f"{settings.gateway_service}.{settings.namespace}.svc.cluster.local"
    return stamped(
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": _metadata(owner, owner.name),
            "spec": {"type": "ExternalName", "externalName": gateway},
        }
    )


def endpoints(owner: Owner) -> JSON:
    """A headless Service: its EndpointSlices, with its label, are what the gateway routes by."""
    ports: list[JSON] = [{"name": "http", "port": 80, "targetPort": "http", "protocol": "TCP"}]
    ports += [{"name": name, "port": port, "targetPort": name, "protocol": "TCP"} for name, port in KV_PORTS.items()]
    return stamped(
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": _metadata(owner, f"{owner.name}-engines"),
            "spec": {"clusterIP": "None", "selector": {SERVICE_LABEL: owner.name}, "ports": ports},
        }
    )


def network_policy(owner: Owner, settings: Settings, *, grouped: bool = False) -> JSON:
    """Only the gateway, the operator (which asks for metrics) and the namespaces that scrape metrics reach engines.

    Probes come from the node, which network plugins let through. grouped: pods of one replica reach one another."""
    name = "kubernetes.io/metadata.name"
    ours: JSON = {
        "namespaceSelector": {"matchLabels": {name: settings.namespace}},
        "podSelector": {"matchLabels": {"app.kubernetes.io/name": "mainsail"}},
    }
    scrapers: list[JSON] = [
        {"namespaceSelector": {"matchLabels": {name: namespace}}} for namespace in settings.metrics_namespaces
    ]
    # The second one tells how far a model is that the pod fetches.
    ports = [{"port": port, "protocol": "TCP"} for port in ("http", *KV_PORTS, fetching.PORT)]
    chosen = {"matchLabels": labels_of_all(owner) if grouped else {SERVICE_LABEL: owner.name}}
    peers: list[JSON] = [{"from": [{"podSelector": chosen}]}] if grouped else []
    return stamped(
        {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "NetworkPolicy",
            "metadata": _metadata(owner, owner.name),
            "spec": {
                "podSelector": chosen,
                "policyTypes": ["Ingress"],
                "ingress": [{"from": [ours, *scrapers], "ports": ports}, *peers],
            },
        }
    )


def disruption_budget(owner: Owner, *, grouped: bool = False) -> JSON:
    """A drain of nodes takes one replica at a time; one that does not serve never holds a node back.

    grouped: and with one pod of a group the whole of it."""
    chosen = labels_of_all(owner) if grouped else {SERVICE_LABEL: owner.name}
    return stamped(
        {
            "apiVersion": "policy/v1",
            "kind": "PodDisruptionBudget",
            "metadata": _metadata(owner, owner.name),
            "spec": {
                "maxUnavailable": 1,
                "selector": {"matchLabels": chosen},
                "unhealthyPodEvictionPolicy": "AlwaysAllow",
            },
        }
    )


def children(owner: Owner, settings: Settings, *, grouped: bool = False) -> list[JSON]:
    """Everything but what runs the pods. grouped: some replicas have several pods."""
    budget = disruption_budget(owner, grouped=grouped)
    found = [service_account(owner), endpoints(owner), front(owner, settings), budget]
    return [*found, network_policy(owner, settings, grouped=grouped)] if settings.network_policy else found


def grace_period_s(spec: InferenceServiceSpec) -> int:
    """preStop, then the drain, then a margin: the node never kills a drain midway."""
    return PRE_STOP_S + seconds(spec.drain.timeout) + _GRACE_MARGIN_S


def arguments(owner: Owner, spec: InferenceServiceSpec) -> list[str]:
    """The engine's command line."""
    engine, kv = spec.engine, spec.engine.kv_cache
    found = ["serve", "--model", model_path(spec), "--served-model-name", *(spec.model.served_names or [owner.name])]
    found += ["--host", "0.0.0.0", "--port", str(HTTP_PORT), "--health-port", str(HEALTH_PORT)]
    found += ["--max-num-seqs", str(engine.max_num_seqs), "--dtype", engine.dtype, "--load-format", engine.load_format]
    found += ["--drain-timeout", str(seconds(spec.drain.timeout))]
    optional = {
        "--max-model-len": engine.max_model_len,
        "--max-num-batched-tokens": engine.max_batched_tokens,
        "--kv-cache-blocks": kv.blocks,
        "--quantization": None if engine.quantization == "auto" else engine.quantization,
        "--kv-cache-dtype": None if kv.dtype == "auto" else kv.dtype,
        "--kv-offloading-size": None if kv.host_memory is None else f"{_gibibytes(kv.host_memory):g}",
        "--tensor-parallel-size": engine.tensor_parallel_size if engine.tensor_parallel_size > 1 else None,
    }
    for flag, value in optional.items():
        found += [flag, str(value)] if value is not None else []
    if is_grouped(spec):
        # The kubelet fills in what the LeaderWorkerSet's controller tells the pod in variables.
        found += ["--pipeline-parallel-size", str(engine.pipeline_parallel_size), "--nnodes", "$(LWS_GROUP_SIZE)"]
        found += ["--node-rank", "$(LWS_WORKER_INDEX)", "--master-addr", "$(LWS_LEADER_ADDRESS)"]
        found += ["--master-port", str(MEETING_PORT)]
    found += ["--gpu-memory-utilization", f"{kv.memory_fraction:g}"]
    found += ["--kv-events-config", KV_EVENTS] if kv.prefix_caching else ["--no-enable-prefix-caching"]
    return found + adapters.arguments(spec) + list(engine.extra_args)


def _gibibytes(quantity: int | str) -> float:
    return float(parse_quantity(str(quantity)) or 0) / 2**30


def model_path(spec: InferenceServiceSpec) -> str:
    if fetching.is_fetched(spec):
        return fetching.model_path(spec)
    source = pvc_source(spec.model.uri)
    return f"/models/{source.path}" if source else spec.model.uri.removeprefix("file://")


def _probe(path: str, period_s: int, failures: int, timeout_s: int = 2) -> JSON:
    return {
        "httpGet": {"path": f"/health/{path}", "port": "health"},
        "periodSeconds": period_s, "failureThreshold": failures, "timeoutSeconds": timeout_s,
    }  # fmt: skip


def _container(owner: Owner, spec: InferenceServiceSpec, image: str, pull_policy: str) -> JSON:
    mounts: list[JSON] = [{"name": "tmp", "mountPath": "/tmp"}, {"name": "shm", "mountPath": "/dev/shm"}]
    if fetching.is_fetched(spec):
        mounts.append(fetching.mount(read_only=True))
    if pvc_source(spec.model.uri):
        mounts.append({"name": "model", "mountPath": "/models", "readOnly": True})
    mounts += adapters.mounts(spec)
    return {
        "name": CONTAINER,
        "image": image,
        "imagePullPolicy": pull_policy,
        "command": ["mainsail-engine"],
        "args": arguments(owner, spec),
        "env": [{"name": "HOME", "value": "/tmp"}, *_ranks_environment(spec)],
        "ports": [
            {"name": "http", "containerPort": HTTP_PORT, "protocol": "TCP"},
            {"name": "health", "containerPort": HEALTH_PORT, "protocol": "TCP"},
            *({"name": name, "containerPort": port, "protocol": "TCP"} for name, port in KV_PORTS.items()),
        ],
        # A model may take an hour to load: the rollout's deadline judges that, not the startup probe.
        "startupProbe": _probe("startup", 1, 3600),
        "readinessProbe": _probe("ready", 2, 2),
        "livenessProbe": _probe("live", 10, 6, 5),
        "lifecycle": {"preStop": {"sleep": {"seconds": PRE_STOP_S}}},
        "resources": _resources(spec),
        "securityContext": {
            "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
        },
        "terminationMessagePolicy": "File",
        "volumeMounts": mounts,
    }  # fmt: skip


def _ranks_environment(spec: InferenceServiceSpec) -> list[JSON]:
    """The ranks of a pod are processes of one container: they meet on the loopback, whatever networks the pod has."""
    if spec.engine.tensor_parallel_size == 1 or is_grouped(spec):
        return []
    return [{"name": name, "value": "lo"} for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")]


def _resources(spec: InferenceServiceSpec) -> JSON:
    asked = spec.resources.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    found: JSON = {kind: {name: str(amount) for name, amount in amounts.items()} for kind, amounts in asked.items()}
    return found or {"limits": {"nvidia.com/gpu": str(spec.engine.tensor_parallel_size)}}


def _account(owner: Owner) -> JSON:
    """Who a pod of ours runs as."""
    return {
        "serviceAccountName": owner.name,
        "automountServiceAccountToken": False,
        "securityContext": {
            "runAsNonRoot": True, "runAsUser": _USER, "runAsGroup": _USER, "seccompProfile": {"type": "RuntimeDefault"},
        },
    }  # fmt: skip


def _pod(owner: Owner, spec: InferenceServiceSpec, settings: Settings) -> JSON:
    volumes: list[JSON] = [
        {"name": "tmp", "emptyDir": {}},
        {"name": "shm", "emptyDir": {"medium": "Memory"}},
    ]
    source = pvc_source(spec.model.uri)
    if source:
        volumes.append({"name": "model", "persistentVolumeClaim": {"claimName": source.claim, "readOnly": True}})
    if fetching.is_fetched(spec):
        volumes.append(fetching.volume(spec))
    volumes += adapters.volumes(spec)
    pod = _account(owner) | {
        "terminationGracePeriodSeconds": grace_period_s(spec),
        # A lost node (a spot instance taken back) is replaced soon; Kubernetes' own default is five minutes.
        "tolerations": [
            {
                "key": f"node.kubernetes.io/{state}",
                "operator": "Exists",
                "effect": "NoExecute",
                "tolerationSeconds": _LOST_NODE_S,
            }
            for state in ("not-ready", "unreachable")
        ],
        "containers": [_container(owner, spec, settings.engine_image, settings.engine_image_pull_policy)],
        "volumes": volumes,
    }
    fetchers = [fetching.container(spec, settings)] if fetching.is_fetched(spec) else []
    fetchers += adapters.init_containers(spec, settings)
    if fetchers:
        pod["initContainers"] = fetchers
    return merged(pod, spec.pod_template.spec)


_MERGED_BY = {
    "containers": "name", "initContainers": "name", "env": "name", "volumes": "name", "imagePullSecrets": "name",
    "volumeMounts": "mountPath", "ports": "containerPort",
}  # fmt: skip
_APPENDED = frozenset({"tolerations", "topologySpreadConstraints", "envFrom"})


def merged(base: JSON, patch: JSON) -> JSON:
    """Kubernetes' strategic merge for a pod: objects by key, the lists above by name, other lists replaced."""
    found = copy.deepcopy(base)
    for key, value in patch.items():
        old = found.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            found[key] = merged(cast(JSON, old), cast(JSON, value))
        elif isinstance(value, list) and isinstance(old, list):
            found[key] = _merged_list(key, cast("list[Any]", old), cast("list[Any]", value))
        else:
            found[key] = copy.deepcopy(cast(Any, value))
    return found


def _merged_list(key: str, old: list[Any], new: list[Any]) -> list[Any]:
    if key in _APPENDED:
        return old + [item for item in new if item not in old]
    if key not in _MERGED_BY:
        return copy.deepcopy(new)
    name = _MERGED_BY[key]
    found = {item.get(name): item for item in old}
    for item in new:
        known = found.get(item.get(name))
        found[item.get(name)] = merged(known, item) if known is not None else copy.deepcopy(item)
    return list(found.values())


def filler(
    owner: Owner, spec: InferenceServiceSpec, settings: Settings, kept: Collection[str] = (), now: float = 0.0
) -> JSON | None:
    """The Job or DaemonSet that fetches the model ahead of need; None where nothing does.

    Its name is a hash of all of it but the images and what it may delete: made once, it is not made anew by a new
    version of the operator. kept, now: the copies that are in use, and when (Unix seconds) that was looked at."""
    cache = spec.model.cache
    if cache is None or not fetching.is_fetched(spec):
        return None
    stay = cache.node_path is not None
    base = _account(owner) | ({} if stay else {"restartPolicy": "OnFailure"})
    pod = fetching.pod(spec, settings, base, stay=stay)
    nameless = {**pod, "containers": [{k: v for k, v in c.items() if "image" not in k} for c in pod["containers"]]}
    name = _filler_name(owner, nameless)
    pod["containers"][0]["args"] += fetching.eviction(spec, kept, now)
    marks = {"app.kubernetes.io/name": fetching.NAME, "app.kubernetes.io/managed-by": "mainsail",
             fetching.LABEL: owner.name}  # fmt: skip
    template: JSON = {"metadata": {"labels": marks}, "spec": pod}
    metadata = _metadata(owner, name) | {"labels": {**labels(owner), "app.kubernetes.io/name": fetching.NAME}}
    if stay:
        chosen = {fetching.LABEL: owner.name, "mainsail.dev/fetch": name}
        template["metadata"]["labels"] = marks | chosen
        body: JSON = {"selector": {"matchLabels": chosen}, "template": template}
        return {"apiVersion": "apps/v1", "kind": "DaemonSet", "metadata": metadata, "spec": body}
    # It is tried again for as long as the model is asked for: a Secret or a disk may be put right at any time.
    body = {"backoffLimit": 100_000, "template": template}
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": body}


def _filler_name(owner: Owner, pod: JSON) -> str:
    """At most 63 characters: a Job's name is a label of its pods. The hash tells services apart whose names are cut."""
    most = 63 - len("-fetch-") - 10
    hashed = digest(pod) if len(owner.name) <= most else digest([owner.name, pod])
    return f"{owner.name[:most]}-fetch-{hashed}"


def deployment_name(owner: Owner, revision: str) -> str:
    return f"{owner.name}-{revision}"


def deployment(owner: Owner, spec: InferenceServiceSpec, replicas: int, settings: Settings) -> JSON:
    """The Deployment of the spec's revision, as it is made; later only its replicas change."""
    chosen = {SERVICE_LABEL: owner.name, REVISION_LABEL: revision_of(spec)}
    manifest: JSON = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": workload_metadata(owner, spec),
        "spec": {
            "replicas": replicas,
            "revisionHistoryLimit": 0,
            "progressDeadlineSeconds": seconds(spec.rollout.progress_deadline),
            "selector": {"matchLabels": chosen},
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1}},
            "template": template(owner, spec, settings),
        },
    }
    return stamped(manifest)


def workload_metadata(owner: Owner, spec: InferenceServiceSpec) -> JSON:
    """Of what runs the pods of the spec's revision."""
    revision = revision_of(spec)
    return _metadata(owner, deployment_name(owner, revision), {REVISION_LABEL: revision})


def template(owner: Owner, spec: InferenceServiceSpec, settings: Settings) -> JSON:
    """The pods of the spec's revision."""
    asked, own = spec.pod_template.metadata, {REVISION_LABEL: revision_of(spec)}
    return {
        "metadata": {
            "labels": dict(asked.labels) | labels(owner) | own,
            "annotations": dict(asked.annotations),
        },
        "spec": _pod(owner, spec, settings),
    }
