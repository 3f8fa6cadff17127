"""The gateway's metrics, all under `mainsail:gateway_`. Each gateway has a registry of its own."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from mainsail_gateway.pod_metrics import PodMetrics, PodsCollector
from mainsail_gateway.routes import Endpoint, Service, Table
from mainsail_gateway.watch import Key

DURATION_BUCKETS = (0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)

_SERVICE = ("namespace", "service")


class ServiceMetrics:
    """The children of one service's labels, looked up once."""

    def __init__(self, metrics: "Metrics", key: Key) -> None:
        self._failures = metrics.failures
        self._retries = metrics.retries
        self._pods = metrics.pods
        self._failovers = metrics.failovers
        self._key = key
        self.in_flight = metrics.in_flight.labels(*key)
        self.endpoints = metrics.endpoints.labels(*key)
        self.duration = metrics.duration.labels(*key)

    def pod(self, endpoint: Endpoint) -> PodMetrics:
        """What is counted for one endpoint."""
        return self._pods.of((*self._key, endpoint.revision, endpoint.pod))

    def count(self, code: int) -> None:
        """A request that the gateway answered itself."""
        self._pods.of((*self._key, "", "")).count(code)

    def failure(self, reason: str) -> None:
        self._failures.labels(*self._key, reason).inc()

    def retry(self, reason: str) -> None:
        self._retries.labels(*self._key, reason).inc()

    def failover(self, reason: str) -> None:
        self._failovers.labels(*self._key, reason).inc()


class Metrics:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        name = "mainsail:gateway_"
        self.pods = PodsCollector(name)
        self.registry.register(self.pods)
        self.failures = Counter(
            name + "upstream_failures",
            "Exchanges that an endpoint broke, by reason.",
            (*_SERVICE, "reason"),
            registry=self.registry,
        )
        self.retries = Counter(
            name + "retries", "Requests sent once more, by reason.", (*_SERVICE, "reason"), registry=self.registry
        )
        self.failovers = Counter(
            name + "failovers",
            "Answers that broke after they had begun and went on at another endpoint, by reason.",
            (*_SERVICE, "reason"),
            registry=self.registry,
        )
        self.in_flight = Gauge(name + "requests_in_flight", "Requests running.", _SERVICE, registry=self.registry)
        self.endpoints = Gauge(name + "endpoints", "Endpoints that are ready.", _SERVICE, registry=self.registry)
        self.conflicts = Gauge(
            name + "name_conflicts", "Served names that another, older service has too.", registry=self.registry
        )
        self.duration = Histogram(
            name + "request_duration_seconds",
            "From a request's arrival to the end of its answer.",
            _SERVICE,
            buckets=DURATION_BUCKETS,
            registry=self.registry,
        )
        self._services: dict[Key, ServiceMetrics] = {}

    def of(self, service: Service) -> ServiceMetrics:
        found = self._services.get(service.key)
        if found is None:
            found = self._services[service.key] = ServiceMetrics(self, service.key)
        return found

    def refused(self, code: int) -> None:
        """A request that reached no service."""
        self.pods.of(("", "", "", "")).count(code)

    def update(self, table: Table, now: float) -> None:
        self.pods.retain(
            {(*key, e.revision, e.pod) for key, service in table.services.items() for e in service.endpoints},
            set(table.services),
            now,
        )
        self.conflicts.set(len(table.conflicts))
        for key in self._services.keys() - table.services.keys():
            self._services.pop(key)
            for metric in (self.in_flight, self.endpoints, self.duration):
                metric.remove(*key)
        for service in table.services.values():
            self.of(service).endpoints.set(len(service.endpoints))
