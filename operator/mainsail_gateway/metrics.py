"""What the gateway counts, in Prometheus' form. Our own names go under `mainsail:`; seconds and counts, no content."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
"""From a cached prompt on a fast card to a long prompt on a CPU."""


class Metrics:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "mainsail:gateway_requests", "Requests by model and HTTP status.", ["model", "code"], registry=self.registry
        )
        self.first_byte = Histogram(
            "mainsail:gateway_time_to_first_byte_seconds", "From the whole request to the first byte of its answer.",
            ["model"], buckets=_SECONDS, registry=self.registry,
        )  # fmt: skip
        self.in_flight = Gauge(
            "mainsail:gateway_requests_in_flight", "Requests being answered.", ["model"], registry=self.registry
        )
        self.retries = Counter(
            "mainsail:gateway_retries", "Requests sent to another replica before the first byte of an answer.",
            ["model"], registry=self.registry,
        )  # fmt: skip
        self.broken = Counter(
            "mainsail:gateway_broken_streams", "Answers that a replica broke off.", ["model"], registry=self.registry
        )
        self.endpoints = Gauge(
            "mainsail:gateway_endpoints", "Endpoints that serve a model now.", ["model"], registry=self.registry
        )
