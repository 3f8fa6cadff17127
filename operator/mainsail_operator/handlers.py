"""kopf's part: watches. Indexes hold the objects, events wake the reconciler; nothing is decided here.

Only `index` and `on.event` handlers are registered: they need no finalizer and annotate nobody's objects.
kopf fills all indexes before it calls the first event handler, so a pass never sees half of a cluster.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any, cast

import kopf

from mainsail_operator.objects import SERVICE_LABEL
from mainsail_operator.observe import scrape_target
from mainsail_operator.reconcile import Key, Reconciler, Snapshot
from mainsail_operator.scrape import Target
from mainsail_operator.types import GROUP, JSON, PLURAL, VERSION

CHILDREN: dict[str, tuple[str, str]] = {
    "deployments": ("apps", "v1"),
    "pods": ("", "v1"),
    "services": ("", "v1"),
    "serviceaccounts": ("", "v1"),
}
GATEWAYS = "gateways"
"""Index of the gateway's pods, all under this one key."""
_GATEWAY_LABELS = {"app.kubernetes.io/name": "mainsail", "app.kubernetes.io/component": "gateway"}
GATEWAY_METRICS_PORT = 8081
_KINDS = {"services": "Service", "serviceaccounts": "ServiceAccount"}


class Store:
    """The objects of the indexes by InferenceService, whatever kopf calls them."""

    def __init__(self) -> None:
        self._indexes: dict[str, Any] = {}

    def bind(self, **indexes: Any) -> None:
        self._indexes = indexes

    def _values(self, kind: str, key: Hashable) -> list[JSON]:
        index = self._indexes.get(kind)
        found: Iterable[Any] = index.get(key, ()) if index is not None else ()
        return [cast(JSON, value) for value in found]

    def gateways(self) -> list[Target]:
        """The gateway pods that can be asked for metrics."""
        pods = self._values(GATEWAYS, GATEWAYS)
        return [target for pod in pods if (target := scrape_target(pod, GATEWAY_METRICS_PORT)) is not None]

    def read(self, key: Key) -> Snapshot | None:
        body = self._values(PLURAL, key)
        if not body:
            return None
        others = [{"kind": _KINDS[kind], **obj} for kind in _KINDS for obj in self._values(kind, key)]
        return Snapshot(body[0], self._values("deployments", key), self._values("pods", key), others)


def register(registry: kopf.OperatorRegistry, store: Store, reconciler: Reconciler) -> None:
    """Watch InferenceServices and what is labelled as belonging to one."""

    async def index_own(body: kopf.Body, **_: Any) -> dict[Key, JSON]:
        return {(str(body.metadata.namespace), str(body.metadata.name)): dict(body)}

    async def index_child(body: kopf.Body, **_: Any) -> dict[Key, JSON]:
        return {(str(body.metadata.namespace), body.metadata.labels[SERVICE_LABEL]): dict(body)}

    async def index_gateway(body: kopf.Body, **_: Any) -> dict[str, JSON]:
        return {GATEWAYS: dict(body)}

    async def changed(body: kopf.Body, inferenceservices: Any, deployments: Any, pods: Any, services: Any,
                serviceaccounts: Any, gateways: Any, **_: Any) -> None:  # fmt: skip
        store.bind(inferenceservices=inferenceservices, deployments=deployments, pods=pods, services=services,
                   serviceaccounts=serviceaccounts, gateways=gateways)  # fmt: skip
        name = body.metadata.labels.get(SERVICE_LABEL) if body.get("kind") != "InferenceService" else body.metadata.name
        reconciler.wake((str(body.metadata.namespace), str(name)))

    async def login(**kwargs: Any) -> kopf.ConnectionInfo | None:
        return kopf.login_with_service_account(**kwargs) or kopf.login_with_kubeconfig(**kwargs)

    kopf.on.login(registry=registry)(login)
    kopf.index(GROUP, VERSION, PLURAL, id=PLURAL, registry=registry)(index_own)
    kopf.on.event(GROUP, VERSION, PLURAL, registry=registry)(changed)
    kopf.index("", "v1", "pods", id=GATEWAYS, labels=_GATEWAY_LABELS, registry=registry)(index_gateway)
    labelled = {SERVICE_LABEL: kopf.PRESENT}
    for plural, (group, version) in CHILDREN.items():
        kopf.index(group, version, plural, id=plural, labels=labelled, registry=registry)(index_child)
        kopf.on.event(group, version, plural, labels=labelled, registry=registry)(changed)


def settings_for_watching() -> kopf.OperatorSettings:
    """Watches that cannot freeze, no scanning of the cluster, no events about ourselves."""
    settings = kopf.OperatorSettings()
    settings.scanning.disabled = True
    settings.posting.enabled = False
    settings.watching.server_timeout = 240
    settings.watching.client_timeout = 300
    settings.networking.error_backoffs = (0.5, 1, 2, 4, 8)
    return settings
