"""The operator's settings: environment variables MAINSAIL_*, read once into one frozen value."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Settings:
    engine_image: str = "mainsail/engine:0.1.0"
    """MAINSAIL_ENGINE_IMAGE: the image of new revisions. Existing ones keep theirs: an upgrade restarts nothing."""
    engine_image_pull_policy: str = "IfNotPresent"
    """MAINSAIL_ENGINE_IMAGE_PULL_POLICY."""
    fetch_image: str = "mainsail/control-plane:0.1.0"
    """MAINSAIL_FETCH_IMAGE: the image with `mainsail-fetch`, for models that are fetched. As above."""
    fetch_image_pull_policy: str = "IfNotPresent"
    """MAINSAIL_FETCH_IMAGE_PULL_POLICY."""
    namespace: str = "mainsail-system"
    """MAINSAIL_NAMESPACE: where the operator itself lives, and its Lease."""
    watch_namespaces: tuple[str, ...] = ()
    """MAINSAIL_WATCH_NAMESPACES, separated by commas. Empty: all."""
    identity: str = "mainsail-operator"
    """MAINSAIL_IDENTITY: who holds the Lease; the pod's name."""
    gateway_service: str = "mainsail-gateway"
    """MAINSAIL_GATEWAY_SERVICE: the gateway's Service in the operator's namespace."""
    gateway_port: int = 80
    """MAINSAIL_GATEWAY_PORT: the port of that Service; part of status.url."""
    gateway_tls: bool = False
    """MAINSAIL_GATEWAY_TLS=true: the gateway speaks HTTPS there."""
    network_policy: bool = True
    """MAINSAIL_NETWORK_POLICY=false: no NetworkPolicy; whoever reaches a pod's address reaches its engine."""
    metrics_namespaces: tuple[str, ...] = ()
    """MAINSAIL_METRICS_NAMESPACES, separated by commas: whose pods may read engines' metrics (a Prometheus)."""
    health_port: int = 8081
    """MAINSAIL_HEALTH_PORT: /health/live and /metrics."""

    @property
    def listened_namespaces(self) -> tuple[str, ...]:
        """The watched ones, and the operator's own, where the gateways are. Empty: all."""
        return tuple(dict.fromkeys((*self.watch_namespaces, self.namespace))) if self.watch_namespaces else ()


VARIABLES = """\
Without arguments `mainsail-operator` runs the operator. Its settings are environment variables, which the chart sets:

    MAINSAIL_ENGINE_IMAGE              image of new revisions (mainsail/engine:0.1.0)
    MAINSAIL_ENGINE_IMAGE_PULL_POLICY  (IfNotPresent)
    MAINSAIL_FETCH_IMAGE               image with mainsail-fetch (mainsail/control-plane:0.1.0)
    MAINSAIL_FETCH_IMAGE_PULL_POLICY   (IfNotPresent)
    MAINSAIL_NAMESPACE                 where the operator and its Lease are (mainsail-system)
    MAINSAIL_WATCH_NAMESPACES          namespaces to watch, separated by commas (all)
    MAINSAIL_IDENTITY                  who holds the Lease (the host's name)
    MAINSAIL_GATEWAY_SERVICE           the gateway's Service in that namespace (mainsail-gateway)
    MAINSAIL_GATEWAY_PORT              its port, a part of status.url (80)
    MAINSAIL_GATEWAY_TLS               true: it speaks HTTPS there (false)
    MAINSAIL_NETWORK_POLICY            false: no NetworkPolicy for engines (true)
    MAINSAIL_METRICS_NAMESPACES        namespaces that may read engines' metrics, separated by commas (none)
    MAINSAIL_HEALTH_PORT               port of /health/live and /metrics (8081)
"""
"""For --help: each variable and, in brackets, its default."""


def from_environment(environment: Mapping[str, str] = os.environ) -> Settings:
    """Raises ValueError naming the variable when a value cannot be read."""
    default = Settings()
    return Settings(
        engine_image=environment.get("MAINSAIL_ENGINE_IMAGE", default.engine_image),
        engine_image_pull_policy=environment.get("MAINSAIL_ENGINE_IMAGE_PULL_POLICY", default.engine_image_pull_policy),
        fetch_image=environment.get("MAINSAIL_FETCH_IMAGE", default.fetch_image),
        fetch_image_pull_policy=environment.get("MAINSAIL_FETCH_IMAGE_PULL_POLICY", default.fetch_image_pull_policy),
        namespace=environment.get("MAINSAIL_NAMESPACE", default.namespace),
        watch_namespaces=_names(environment.get("MAINSAIL_WATCH_NAMESPACES", "")),
        gateway_service=environment.get("MAINSAIL_GATEWAY_SERVICE", default.gateway_service),
        gateway_port=_port(environment, "MAINSAIL_GATEWAY_PORT", default.gateway_port),
        gateway_tls=_truth(environment, "MAINSAIL_GATEWAY_TLS", default=default.gateway_tls),
        network_policy=_truth(environment, "MAINSAIL_NETWORK_POLICY", default=default.network_policy),
        metrics_namespaces=_names(environment.get("MAINSAIL_METRICS_NAMESPACES", "")),
        identity=environment.get("MAINSAIL_IDENTITY", socket.gethostname()),
        health_port=_port(environment, "MAINSAIL_HEALTH_PORT", default.health_port),
    )


def _port(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name, str(default))
    if not text.isdigit() or not 0 < int(text) < 65_536:
        raise ValueError(f"{name} must be a port number, not {text!r}")
    return int(text)


def _truth(environment: Mapping[str, str], name: str, *, default: bool) -> bool:
    text = environment.get(name, str(default)).lower()
    if text not in ("true", "false"):
        raise ValueError(f"{name} must be true or false, not {text!r}")
    return text == "true"


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())
