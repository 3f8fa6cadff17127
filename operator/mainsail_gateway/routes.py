"""Which endpoints serve which model: a table built from InferenceServices and EndpointSlices.

`build` is a pure function of the two collections, and its table is immutable: a request works with the table that it
began with. `Routes` keeps the newest one up to date from two watches. A service that exists and has no ready endpoint is
in the table with none, so that its clients get 503 and not 404. When two services claim a name, the older one has it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime

import httpx2
import msgspec
from lightkube import KubeConfig
from lightkube.config.client_adapter import AsyncClient, ConnectionParams

from mainsail_gateway.settings import Settings
from mainsail_gateway.watch import Key, KubeObject, Reflector, Timing

log = logging.getLogger(__name__)

SERVICE_LABEL = "mainsail.dev/service"
PORT_NAME = "http"


class _Model(msgspec.Struct, frozen=True, rename="camel"):
    served_names: list[str] = []


class _ServiceSpec(msgspec.Struct, frozen=True):
    model: _Model = _Model()


class InferenceService(KubeObject, frozen=True, kw_only=True):
    spec: _ServiceSpec = _ServiceSpec()


class _Conditions(msgspec.Struct, frozen=True):
    ready: bool | None = None
    terminating: bool | None = None


class _Reference(msgspec.Struct, frozen=True):
    name: str = ""


class _SliceEndpoint(msgspec.Struct, frozen=True, rename="camel"):
    addresses: list[str] = []
    conditions: _Conditions = _Conditions()
    target_ref: _Reference | None = None


class _Port(msgspec.Struct, frozen=True):
    name: str | None = None
    port: int | None = None


class EndpointSlice(KubeObject, frozen=True, kw_only=True):
    endpoints: list[_SliceEndpoint] | None = None
    ports: list[_Port] | None = None


@dataclass(frozen=True, slots=True, order=True)
class Endpoint:
    """One engine pod."""

    address: str
    port: int
    pod: str = field(compare=False, default="")

    @property
    def base_url(self) -> str:
        host = f"[{self.address}]" if ":" in self.address else self.address
        return f"http://{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Service:
    """One InferenceService and the endpoints that serve it now."""

    key: Key
    names: tuple[str, ...]
    created: int
    """Unix seconds."""
    endpoints: tuple[Endpoint, ...] = ()


@dataclass(frozen=True, slots=True)
class Table:
    """Model name → service."""

    services: Mapping[str, Service] = field(default_factory=dict[str, Service])
    clashes: tuple[str, ...] = ()
    """Names that more than one service claims."""


def _unix(timestamp: str) -> int:
    try:
        return int(datetime.fromisoformat(timestamp).timestamp())
    except ValueError:
        return 0


def ready_endpoints(slices: Iterable[EndpointSlice]) -> tuple[Endpoint, ...]:
    """Endpoints that are ready and not on their way out, in a stable order, each once."""
    found: set[Endpoint] = set()
    for piece in slices:
        port = next((p.port for p in piece.ports or [] if p.name == PORT_NAME and p.port), None)
        if port is None:
            continue
        for endpoint in piece.endpoints or []:
            state = endpoint.conditions
            if state.ready is False or state.terminating or not endpoint.addresses:
                continue
            found.add(Endpoint(endpoint.addresses[0], port, endpoint.target_ref.name if endpoint.target_ref else ""))
    return tuple(sorted(found))


def build(services: Iterable[InferenceService], slices: Iterable[EndpointSlice]) -> Table:
    """The routing table. Where names clash, the service that was created first (then by namespace and name) wins."""
    by_service: dict[Key, list[EndpointSlice]] = {}
    for piece in slices:
        name = piece.metadata.labels.get(SERVICE_LABEL)
        if name:
            by_service.setdefault((piece.metadata.namespace, name), []).append(piece)
    table: dict[str, Service] = {}
    clashes: list[str] = []
    for item in sorted(services, key=lambda s: (_unix(s.metadata.creationTimestamp), _key(s))):
        names = tuple(dict.fromkeys(item.spec.model.served_names)) or (item.metadata.name,)
        service = Service(
            _key(item), names, _unix(item.metadata.creationTimestamp), ready_endpoints(by_service.get(_key(item), []))
        )
        for name in names:
            if table.setdefault(name, service) is not service:
                clashes.append(name)
    return Table(table, tuple(dict.fromkeys(clashes)))


def _key(item: KubeObject) -> Key:
    return item.metadata.namespace, item.metadata.name


class Routes:
    """The newest table, kept up to date by watches until `run` is cancelled."""

    def __init__(self, client: httpx2.AsyncClient, settings: Settings) -> None:
        self.table = Table()
        timing = Timing(relist_s=settings.relist_s)
        prefixes = [f"/namespaces/{name}" for name in settings.namespaces] or [""]
        self._services = [
            Reflector(client, f"/apis/mainsail.dev/v1alpha1{prefix}/inferenceservices", InferenceService,
                      self._rebuild, timing=timing)
            for prefix in prefixes
        ]  # fmt: skip
        self._slices = [
            Reflector(client, f"/apis/discovery.k8s.io/v1{prefix}/endpointslices", EndpointSlice,
                      self._rebuild, label_selector=SERVICE_LABEL, timing=timing)
            for prefix in prefixes
        ]  # fmt: skip

    @property
    def synced(self) -> bool:
        """Every collection was listed at least once."""
        return all(reflector.synced for reflector in (*self._services, *self._slices))

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for reflector in (*self._services, *self._slices):
                group.create_task(reflector.run())

    def _rebuild(self) -> None:
        old = self.table
        services = [item for reflector in self._services for item in reflector.store.values()]
        slices = [item for reflector in self._slices for item in reflector.store.values()]
        self.table = build(services, slices)
        for name in set(self.table.clashes) - set(old.clashes):
            owner = self.table.services[name].key
            log.warning("several services claim the model name %s: the oldest, %s/%s, has it", name, *owner)


def kube_client(kubeconfig: str | None) -> httpx2.AsyncClient:
    """An authenticated client of the API server: the given kubeconfig, else the Pod's account, else $KUBECONFIG."""
    config = KubeConfig.from_file(kubeconfig) if kubeconfig else KubeConfig.from_env()
    single = config.get()
    if single is None:
        raise ValueError("the kubeconfig has no current context: set one or pass --kubeconfig")
    return AsyncClient(single, ConnectionParams(trust_env=False))
