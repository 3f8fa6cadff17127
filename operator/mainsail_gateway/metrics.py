"""The gateway's metrics, all under `mainsail:gateway_`. Each gateway has a registry of its own."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from mainsail_gateway.routes import Service, Table
from mainsail_gateway.watch import Key

FIRST_BYTE_BUCKETS = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
"""vLLM's bounds for the time to the first token, so that both can be laid over one another, with finer ones below."""
DURATION_BUCKETS = (0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)

_SERVICE = ("namespace", "service")


class ServiceMetrics:
    """The children of one service's labels, looked up once."""

    def __init__(self, metrics: "Metrics", key: Key) -> None:
        self._requests = metrics.requests
        self._failures = metrics.failures
        self._retries = metrics.retries
        self._key = key
        self._codes: dict[int, Counter] = {}
        self.in_flight = metrics.in_flight.labels(*key)
        self.endpoints = metrics.endpoints.labels(*key)
        self.first_byte = metrics.first_byte.labels(*key)
        self.duration = metrics.duration.labels(*key)

    def count(self, code: int) -> None:
        child = self._codes.get(code)
        if child is None:
            child = self._codes[code] = self._requests.labels(*self._key, str(code))
        child.inc()

    def failure(self, reason: str) -> None:
        self._failures.labels(*self._key, reason).inc()

    def retry(self, reason: str) -> None:
        self._retries.labels(*self._key, reason).inc()


class Metrics:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        name = "mainsail:gateway_"
        self.requests = Counter(
            name + "requests",
            "Requests answered, by service (empty: none was found) and HTTP status; 499: the client left first.",
            (*_SERVICE, "code"),
            registry=self.registry,
        )
        self.failures = Counter(
            name + "upstream_failures",
            "Exchanges that an endpoint broke, by reason.",
            (*_SERVICE, "reason"),
            registry=self.registry,
        )
        self.retries = Counter(
            name + "retries", "Requests sent once more, by reason.", (*_SERVICE, "reason"), registry=self.registry
        )
        self.in_flight = Gauge(name + "requests_in_flight", "Requests running.", _SERVICE, registry=self.registry)
        self.endpoints = Gauge(name + "endpoints", "Endpoints that are ready.", _SERVICE, registry=self.registry)
        self.conflicts = Gauge(
            name + "name_conflicts", "Served names that another, older service has too.", registry=self.registry
        )
        self.first_byte = Histogram(
            name + "time_to_first_token_seconds",
            "From a streamed request's arrival to the first byte of its answer's body.",
            _SERVICE,
            buckets=FIRST_BYTE_BUCKETS,
            registry=self.registry,
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
        self.requests.labels("", "", str(code)).inc()

    def update(self, table: Table) -> None:
        self.conflicts.set(len(table.conflicts))
        for key in self._services.keys() - table.services.keys():
            self._services.pop(key)
            for metric in (self.in_flight, self.endpoints, self.first_byte, self.duration):
                metric.remove(*key)
        for service in table.services.values():
            self.of(service).endpoints.set(len(service.endpoints))
