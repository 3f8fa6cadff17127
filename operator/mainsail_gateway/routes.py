"""model -> service -> endpoints: an immutable table, built from what the watches mirror, swapped whole.

A request reads the table once and keeps that reading, so a change never shows it half. `build` is pure. A name that two
services claim goes to the older one (creationTimestamp, then namespace and name), the same in every gateway; the other
is not served under that name, which is logged and counted, and heals by itself when either changes.

ModelRoutes take part in that with their names (virtual.py).

A service's status says which revision gets which share of the requests. A pod of a revision that it does not name yet
gets none until it does (split.py).

Endpoints come from EndpointSlices labelled `mainsail.dev/service`: ready, not terminating, port `http`. Readiness of
an engine means that it has generated a token and is not draining.
"""

import asyncio
import datetime
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import httpx2
import msgspec

from mainsail_gateway.shed import Policy
from mainsail_gateway.virtual import ModelRoute, Virtual
from mainsail_gateway.watch import Key, KubeObject, Reflector, Timing

log = logging.getLogger(__name__)

SERVICE_LABEL = "mainsail.dev/service"
PORT_NAME = "http"
KV_PORT_NAMES = "kv-events", "kv-replay"


class ModelSpec(msgspec.Struct, frozen=True):
    servedNames: list[str] | None = None


class AdapterSpec(msgspec.Struct, frozen=True):
    name: str


class EngineSpec(msgspec.Struct, frozen=True):
    maxModelLen: int | None = None
    maxNumSeqs: int = 256


class AdmissionSpec(msgspec.Struct, frozen=True):
    maxQueuedRequests: int = 512
    maxQueueTime: str = "30s"
    maxConcurrency: int | None = None
    priorities: dict[str, int] | None = None


class ToZeroSpec(msgspec.Struct, frozen=True):
    holdRequests: int = 200
    holdFor: str = "10m"


class ScalingSpec(msgspec.Struct, frozen=True):
    min: int = 1
    toZero: ToZeroSpec = ToZeroSpec()


class ServiceSpec(msgspec.Struct, frozen=True):
    model: ModelSpec = ModelSpec()
    adapters: list[AdapterSpec] | None = None
    engine: EngineSpec = EngineSpec()
    admission: AdmissionSpec = AdmissionSpec()
    scaling: ScalingSpec | None = None


class RevisionStatus(msgspec.Struct, frozen=True):
    name: str = ""
    weight: int = 0


class ServiceStatus(msgspec.Struct, frozen=True):
    revisions: list[RevisionStatus] | None = None


class InferenceService(KubeObject, frozen=True, kw_only=True):
    spec: ServiceSpec = ServiceSpec()
    status: ServiceStatus | None = None


class SliceConditions(msgspec.Struct, frozen=True):
    ready: bool | None = None
    terminating: bool | None = None


class TargetRef(msgspec.Struct, frozen=True):
    name: str = ""
    uid: str = ""


class SliceEndpoint(msgspec.Struct, frozen=True):
    addresses: list[str] = []
    conditions: SliceConditions = SliceConditions()
    targetRef: TargetRef | None = None


class SlicePort(msgspec.Struct, frozen=True):
    name: str | None = None
    port: int | None = None


class EndpointSlice(KubeObject, frozen=True, kw_only=True):
    addressType: str = "IPv4"
    endpoints: list[SliceEndpoint] | None = None
    ports: list[SlicePort] | None = None


@dataclass(frozen=True, slots=True)
class Endpoint:
    key: str
    """The pod's UID and the port: an address that another pod inherits is another endpoint."""
    host: str
    port: int
    pod: str
    revision: str = ""
    """The Deployment that the pod is of, as in the service's `status.revisions`."""
    kv_events: tuple[int, int] | None = None
    """The ports where its engine tells what KV blocks it stores and removes, and what it has; None: it does not."""


@dataclass(frozen=True, slots=True)
class Service:
    namespace: str
    name: str
    created: int
    """Seconds since the epoch."""
    served_names: tuple[str, ...]
    max_model_len: int | None
    endpoints: tuple[Endpoint, ...]
    weights: tuple[tuple[str, int], ...] = ()
    """Revisions and their shares of the requests, the newest first. Empty: all endpoints are alike."""

    policy: Policy = field(default_factory=Policy)
    adapters: frozenset[str] = frozenset()
    """Those of the served names that are LoRA adapters'."""

    @property
    def key(self) -> Key:
        return self.namespace, self.name


@dataclass(frozen=True, slots=True)
class Table:
    models: Mapping[str, Service] = field(default_factory=lambda: MappingProxyType({}))
    services: Mapping[Key, Service] = field(default_factory=lambda: MappingProxyType({}))
    virtual: Mapping[str, Virtual] = field(default_factory=lambda: MappingProxyType({}))
    """The names that ModelRoutes have."""
    conflicts: tuple[tuple[str, Key, Key], ...] = ()
    """Model, the service that has it, the service that wanted it too."""


def visible(table: Table, host: str, suffixes: Sequence[str]) -> Table:
    """What a request for that host may see: of `NAME.NAMESPACE.SUFFIX` that InferenceService alone (nothing, if there
    is none), of any other host everything."""
    host = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
    for suffix in suffixes:
        place = host.lower().removesuffix("." + suffix.lower().strip("."))
        if place == host.lower():
            continue
        name, _, namespace = place.partition(".")
        service = table.services.get((namespace, name))
        if service is None:
            return Table()
        return Table(MappingProxyType(dict.fromkeys(service.served_names, service)), table.services)
    return table


def build(
    services: Iterable[InferenceService], slices: Iterable[EndpointSlice], routes: Iterable[ModelRoute] = ()
) -> Table:
    """The routing table of a state of the cluster."""
    endpoints: dict[Key, dict[str, Endpoint]] = {}
    for piece in slices:
        owner = piece.metadata.labels.get(SERVICE_LABEL)
        if owner:
            endpoints.setdefault((piece.metadata.namespace, owner), {}).update(_endpoints(piece))
    by_key: dict[Key, Service] = {}
    holders: dict[str, Service | Virtual] = {}
    conflicts: list[tuple[str, Key, Key]] = []
    for item in sorted((*services, *routes), key=_age):
        if isinstance(item, ModelRoute):
            owner, names = _virtual(item)
        else:
            owner = _service(item, endpoints.get((item.metadata.namespace, item.metadata.name), {}))
            by_key[owner.key] = owner
            names = owner.served_names
        for name in names:
            holder = holders.setdefault(name, owner)
            if holder is not owner:
                conflicts.append((name, holder.key, owner.key))
    models = {name: holder for name, holder in holders.items() if isinstance(holder, Service)}
    virtual = {name: holder for name, holder in holders.items() if isinstance(holder, Virtual)}
    return Table(MappingProxyType(models), MappingProxyType(by_key), MappingProxyType(virtual), tuple(conflicts))


def _virtual(item: ModelRoute) -> tuple[Virtual, tuple[str, ...]]:
    names = tuple(dict.fromkeys(item.spec.names or [item.metadata.name]))
    key = (item.metadata.namespace, item.metadata.name)
    return Virtual(key, _epoch(item.metadata.creationTimestamp), tuple(item.spec.rules)), names


def _age(item: InferenceService | ModelRoute) -> tuple[str, str, str]:
    return item.metadata.creationTimestamp, item.metadata.namespace, item.metadata.name


def _service(item: InferenceService, endpoints: Mapping[str, Endpoint]) -> Service:
    revisions = (item.status and item.status.revisions) or []
    names = item.spec.model.servedNames or [item.metadata.name]
    adapters = [adapter.name for adapter in item.spec.adapters or ()]
    return Service(
        namespace=item.metadata.namespace,
        name=item.metadata.name,
        created=_epoch(item.metadata.creationTimestamp),
        served_names=tuple(dict.fromkeys([*names, *adapters])),
        max_model_len=item.spec.engine.maxModelLen,
        endpoints=tuple(endpoints[key] for key in sorted(endpoints)),
        weights=tuple((r.name, r.weight) for r in revisions) if any(r.weight > 0 for r in revisions) else (),
        policy=_policy(item.spec),
        adapters=frozenset(adapters) - frozenset(names),
    )


def _policy(spec: ServiceSpec) -> Policy:
    admission = spec.admission
    holds = spec.scaling.toZero if spec.scaling is not None and spec.scaling.min == 0 else None
    default = Policy()
    return Policy(
        max_queued_requests=admission.maxQueuedRequests,
        max_queue_time_s=seconds(admission.maxQueueTime),
        priorities=default.priorities if admission.priorities is None else MappingProxyType(admission.priorities),
        max_running=admission.maxConcurrency or spec.engine.maxNumSeqs,
        hold_requests=holds.holdRequests if holds else 0,
        hold_for_s=seconds(holds.holdFor) if holds else 0.0,
    )


_UNITS = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}


def seconds(duration: str) -> float:
    """`2m30s` → 150. What the API server has let through is well formed; anything else counts as nothing."""
    return sum(int(count) * _UNITS[unit] for count, unit in re.findall(r"([0-9]+)(ms|[hms])", duration))


def _epoch(timestamp: str) -> int:
    try:
        return int(datetime.datetime.fromisoformat(timestamp).timestamp())
    except ValueError:
        return 0


def _endpoints(piece: EndpointSlice) -> dict[str, Endpoint]:
    port = next((p.port for p in piece.ports or [] if p.name == PORT_NAME), None)
    if port is None or piece.addressType == "FQDN":
        return {}
    ports = {p.name: p.port for p in piece.ports or [] if p.port is not None}
    events, snapshots = (ports.get(name) for name in KV_PORT_NAMES)
    told = (events, snapshots) if events is not None and snapshots is not None else None
    found: dict[str, Endpoint] = {}
    for item in piece.endpoints or []:
        # The API's rule: an unknown readiness counts as ready.
        if item.conditions.ready is False or item.conditions.terminating or not item.addresses:
            continue
        pod = item.targetRef or TargetRef()
        key = f"{pod.uid or item.addresses[0]}:{port}"
        revision = revision_of(pod.name)
        found[key] = Endpoint(key, item.addresses[0], port, pod.name, revision, told)
    return found


def revision_of(pod: str) -> str:
    """The Deployment of a pod: its name without the ReplicaSet's and the pod's own endings."""
    return pod.rsplit("-", 2)[0]


class Routes:
    """Holds the current `table`; rebuilds it when a mirrored collection changes."""

    def __init__(
        self,
        client: httpx2.AsyncClient,
        namespaces: Sequence[str],
        on_table: Callable[[Table], None],
        *,
        timing: Timing | None = None,
    ) -> None:
        self.table = Table()
        self._on_table = on_table
        self._dirty = asyncio.Event()
        scopes = [f"/namespaces/{name}" for name in namespaces] or [""]
        changed = self._dirty.set
        self.services = [
            Reflector(
                client,
                f"/apis/mainsail.dev/v1alpha1{scope}/inferenceservices",
                InferenceService,
                changed,
                timing=timing,
            )
            for scope in scopes
        ]
        self.virtual = [
            Reflector(client, f"/apis/mainsail.dev/v1alpha1{scope}/modelroutes", ModelRoute, changed, timing=timing)
            for scope in scopes
        ]
        self.slices = [
            Reflector(
                client,
                f"/apis/discovery.k8s.io/v1{scope}/endpointslices",
                EndpointSlice,
                changed,
                label_selector=SERVICE_LABEL,
                timing=timing,
            )
            for scope in scopes
        ]

    @property
    def _mirrors(self) -> list[Reflector[InferenceService] | Reflector[EndpointSlice]]:
        return [*self.services, *self.slices]

    @property
    def synced(self) -> bool:
        """Everything has been listed once. From then on the table is the best knowledge there is, and is used.

        Not so ModelRoutes: where their CRD is not installed yet, services are served all the same."""
        return all(reflector.synced for reflector in self._mirrors)

    async def run(self) -> None:
        """Watch and rebuild until cancelled. Any end of a part is an error, and ends the whole."""
        async with asyncio.TaskGroup() as tasks:
            for reflector in (*self._mirrors, *self.virtual):
                tasks.create_task(reflector.run())
            tasks.create_task(self._rebuild())

    async def _rebuild(self) -> None:
        while True:
            await self._dirty.wait()
            await asyncio.sleep(0.01)  # one table for a burst of events
            self._dirty.clear()
            if not self.synced:
                continue
            services = [item for reflector in self.services for item in reflector.store.values()]
            slices = [item for reflector in self.slices for item in reflector.store.values()]
            routes = [item for reflector in self.virtual for item in reflector.store.values()]
            table = build(services, slices, routes)
            for name, holder, other in set(table.conflicts) - set(self.table.conflicts):
                log.warning("model %s is served by %s/%s; the younger %s/%s is left out", name, *holder, *other)
            self.table = table
            self._on_table(table)
