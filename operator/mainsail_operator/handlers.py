"""kopf's part: watches. Events fill the store and wake the reconciler; nothing is decided here.

Only `on.event` handlers are registered: they need no finalizer and annotate nobody's objects. kopf's indexes are not
used: they hold whole objects, keep what was deleted while a watch was away (see `store`), and make every object wait
for all others at the start, which takes minutes with ten thousand. The first list is the relister's. Labels are
selected by the API server.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import kopf

from mainsail_operator import gpus, groups
from mainsail_operator.fetched import copied, read_fetcher, read_filler
from mainsail_operator.fetching import LABEL as FETCH_LABEL
from mainsail_operator.gpus import read_node
from mainsail_operator.objects import SERVICE_LABEL, WORKER_LABEL
from mainsail_operator.observe import (
    read_child,
    read_deployment,
    read_endpoints,
    read_group_set,
    read_pod,
    scrape_target,
)
from mainsail_operator.reconcile import Reconciler, Snapshot
from mainsail_operator.relist import Relister, Source
from mainsail_operator.scrape import Target
from mainsail_operator.store import Collection, Key, key_of
from mainsail_operator.types import GROUP, JSON, PLURAL, VERSION, InferenceServiceSpec

GATEWAYS: Key = ("", "gateways")
"""The group of the gateway's pods."""
NODES: Key = ("", "nodes")
"""The group of all nodes."""
GATEWAY_METRICS_PORT = 8081
NAME, COMPONENT = "app.kubernetes.io/name", "app.kubernetes.io/component"
CHILDREN: dict[str, tuple[str, str, str]] = {
    "services": ("Service", "", "v1"),
    "serviceaccounts": ("ServiceAccount", "", "v1"),
    "poddisruptionbudgets": ("PodDisruptionBudget", "policy", "v1"),
    "networkpolicies": ("NetworkPolicy", "networking.k8s.io", "v1"),
}
"""Kinds of which only whether they are there as applied matters: kind, group, version by plural."""
FILLERS: dict[str, tuple[str, str]] = {
    "jobs": ("Job", "/apis/batch/v1"),
    "daemonsets": ("DaemonSet", "/apis/apps/v1"),
}
"""What fetches models: kind and API by plural."""
_OURS = f"{SERVICE_LABEL}"
_PODS = f"{NAME} in (mainsail-engine, mainsail-fetch, mainsail)"


def _labels(obj: JSON) -> dict[str, str]:
    return cast("dict[str, str]", obj["metadata"].get("labels") or {})


def _by_label(obj: JSON) -> Key | None:
    service = _labels(obj).get(SERVICE_LABEL)
    return (str(obj["metadata"].get("namespace")), service) if service else None


def _by_worker(obj: JSON) -> Key | None:
    service = _labels(obj).get(WORKER_LABEL)
    return (str(obj["metadata"].get("namespace")), service) if service else None


def _by_fetch(obj: JSON) -> Key | None:
    """Pods that fetch a model, as their only work or before the engine."""
    found = _labels(obj)
    service = found.get(FETCH_LABEL) or found.get(SERVICE_LABEL) or found.get(WORKER_LABEL)
    return (str(obj["metadata"].get("namespace")), service) if service else None


def _gateway(obj: JSON) -> Key | None:
    found = _labels(obj)
    return GATEWAYS if found.get(NAME) == "mainsail" and found.get(COMPONENT) == "gateway" else None


def _body(obj: JSON) -> bytes:
    """As text, without the managers of its fields, which nobody reads: a tenth of what the parsed object takes, and it
    is parsed again only when the service's turn comes."""
    metadata = {key: value for key, value in obj["metadata"].items() if key != "managedFields"}
    return json.dumps({**obj, "metadata": metadata}, separators=(",", ":")).encode()


class Store:
    """The objects by InferenceService."""

    def __init__(self, namespaces: Sequence[str] = (), *, groups: bool = False) -> None:
        """namespaces: those whose InferenceServices are looked after; empty: all. groups: whether the cluster has
        LeaderWorkerSets to watch."""
        self._groups = groups

        def watched(obj: JSON) -> Key | None:
            key = key_of(obj["metadata"])
            return key if not namespaces or key[0] in namespaces else None

        self.services: Collection[bytes] = Collection(watched, _body)
        self.deployments = Collection(_by_label, read_deployment)
        self.group_sets = Collection(_by_label, read_group_set)
        self.pods = Collection(_by_label, read_pod)
        self.workers = Collection(_by_worker, read_pod)
        self.gateway_pods = Collection(_gateway, partial(scrape_target, port=GATEWAY_METRICS_PORT))
        self.endpoints = Collection(_by_label, read_endpoints)
        self.nodes = Collection(lambda _: NODES, read_node)
        self.fetchers = Collection(_by_fetch, read_fetcher)
        self.fillers = {
            plural: Collection(_by_label, partial(read_filler, kind)) for plural, (kind, _) in FILLERS.items()
        }
        self.children = {
            plural: Collection(_by_label, partial(read_child, kind)) for plural, (kind, *_) in CHILDREN.items()
        }

    def sources(self) -> list[Source]:
        """Every kind that is watched."""
        return [
            Source(f"/apis/{GROUP}/{VERSION}", PLURAL, "", (self.services,)),
            Source("/apis/apps/v1", "deployments", _OURS, (self.deployments,)),
            *([Source(groups.API, groups.PLURAL, _OURS, (self.group_sets,))] if self._groups else []),
            Source("/api/v1", "pods", _PODS, (self.pods, self.workers, self.gateway_pods, self.fetchers)),
            Source("/apis/discovery.k8s.io/v1", "endpointslices", _OURS, (self.endpoints,)),
            Source("/api/v1", "nodes", "", (self.nodes,), namespaced=False),
            *(Source(base, plural, _OURS, (self.fillers[plural],)) for plural, (_, base) in FILLERS.items()),
            *(
                Source(f"/apis/{group}/{version}" if group else f"/api/{version}", plural, _OURS,
                       (self.children[plural],))
                for plural, (_, group, version) in CHILDREN.items()
            ),
        ]  # fmt: skip

    def gateways(self) -> list[Target]:
        """The gateway pods that can be asked for metrics."""
        return [target for target in self.gateway_pods.of(GATEWAYS) if target is not None]

    def room(self, spec: InferenceServiceSpec) -> int | None:
        """Further replicas that the nodes have GPUs for, as far as Mainsail's own pods hold them."""
        if gpus.per_pod(spec) == 0:
            return None
        held = (
            (pod.node, pod.gpus)
            for kept in (self.pods, self.workers) for owner in kept.owners() for pod in kept.of(owner) if pod.gpus
        )  # fmt: skip
        return gpus.room(spec, self.nodes.of(NODES), held)

    def gone(self, node: str) -> bool:
        """Whether there is no such node; where none at all is in sight, nothing is known."""
        return len(self.nodes) > 0 and ("", node) not in self.nodes

    def on_node(self, node: str) -> set[Key]:
        """The services that have pods there."""
        return {
            owner
            for kept in (self.pods, self.workers) for owner in kept.owners()
            if any(pod.node == node for pod in kept.of(owner))
        }  # fmt: skip

    def copies(self) -> set[str]:
        """The copies of models that any service asks for or any pod was made with, wherever they lie."""
        asked = {copied(json.loads(body)) for owner in self.services.owners() for body in self.services.of(owner)}
        fetchers = (one for owner in self.fetchers.owners() for one in self.fetchers.of(owner))
        return {name for name in asked if name} | {one.model for one in fetchers if one is not None and one.model}

    def heard(self, plural: str, obj: JSON) -> None:
        """What the API server answered to a write."""
        workloads = {"deployments": self.deployments, groups.PLURAL: self.group_sets}
        held = {PLURAL: self.services, **workloads, **self.fillers, **self.children}[plural]
        held.put(obj)

    def read(self, key: Key) -> Snapshot | None:
        body = self.services.of(key)
        if not body:
            return None
        children = [child for collection in self.children.values() for child in collection.of(key)]
        fillers = [filler for collection in self.fillers.values() for filler in collection.of(key)]
        fetchers = [fetcher for fetcher in self.fetchers.of(key) if fetcher is not None]
        return Snapshot(
            json.loads(body[0]), [*self.deployments.of(key), *self.group_sets.of(key)], self.pods.of(key), children,
            self.endpoints.of(key), fillers, fetchers, self.gone, self.copies, self.workers.of(key),
        )  # fmt: skip


def register(registry: kopf.OperatorRegistry, store: Store, reconciler: Reconciler, relister: Relister) -> None:
    """Watch InferenceServices and what is labelled as belonging to one."""
    kopf.on.login(registry=registry)(_login)
    for source in store.sources():
        group, _, version = source.base.removeprefix("/apis/").removeprefix("/api/").rpartition("/")
        bereft = store.on_node if source.plural == "nodes" else _nobody
        handler = _listener(source.collections, woken(reconciler), relister, bereft)
        name = f"event-{source.plural}-{group or 'core'}"
        kopf.on.event(group, version, source.plural, id=name, registry=registry)(handler)


async def _login(**kwargs: Any) -> kopf.ConnectionInfo | None:
    return kopf.login_with_service_account(**kwargs) or kopf.login_with_kubeconfig(**kwargs)


def _nobody(name: str) -> set[Key]:
    """Most objects that are deleted concern only those that they belong to."""
    return set()


def _listener(
    collections: Sequence[Collection[Any]], wake: Callable[[Key], None], relister: Relister,
    bereft: Callable[[str], set[Key]] = _nobody,
) -> Any:  # fmt: skip
    """Wakes whom an event concerns, and notices when kopf lists again. bereft: whom the end of an object of that name
    concerns besides."""
    seen: set[str] = set()

    async def heard(body: kopf.Body, type: str | None, **_: Any) -> None:
        obj: JSON = dict(body)
        uid = str(body.metadata.uid)
        if type is None and uid in seen:
            relister.suspect()
        for collection in collections:
            owner = collection.remove(obj["metadata"]) if type == "DELETED" else collection.put(obj)
            if owner is not None:
                wake(owner)
        if type == "DELETED":
            for key in bereft(str(body.metadata.name)):
                wake(key)
        (seen.discard if type == "DELETED" else seen.add)(uid)

    return heard


def settings_for_watching() -> kopf.OperatorSettings:
    """Watches that cannot freeze, no scanning of the cluster, no events about ourselves; the server selects labels."""
    settings = kopf.OperatorSettings()
    settings.scanning.disabled = True
    settings.posting.enabled = False
    settings.watching.server_timeout = 240
    settings.watching.client_timeout = 300
    settings.watching.chunk_size = 250  # a list of ten thousand pods at once would take 300 MB for a moment
    # A worker stays for five seconds after its object's event: at the start, those of all objects at once.
    settings.queueing.idle_timeout = 0.1
    settings.networking.error_backoffs = (0.5, 1, 2, 4, 8)
    for source in Store().sources():
        if source.selector:
            settings.watching.label_selectors[source.plural] = source.selector
    return settings


def woken(reconciler: Reconciler) -> Callable[[Key], None]:
    """Wakes the service of a group, if it is one."""
    return lambda key: None if key in (GATEWAYS, NODES) else reconciler.wake(key)
