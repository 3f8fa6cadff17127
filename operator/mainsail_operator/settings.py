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
    fetch_image: str = "mainsail/control-plane:0.1.0"
    """MAINSAIL_FETCH_IMAGE: the image with `mainsail-fetch`, for models that are fetched. As above."""
    fetch_image_pull_policy: str = "IfNotPresent"
    namespace: str = "mainsail-system"
    """MAINSAIL_NAMESPACE: where the operator itself lives, and its Lease."""
    watch_namespaces: tuple[str, ...] = ()
    """MAINSAIL_WATCH_NAMESPACES, separated by commas. Empty: all."""
    identity: str = "mainsail-operator"
    """MAINSAIL_IDENTITY: who holds the Lease; the pod's name."""
    gateway_service: str = "mainsail-gateway"
    """MAINSAIL_GATEWAY_SERVICE: the gateway's Service in the operator's namespace."""
    network_policy: bool = True
    """MAINSAIL_NETWORK_POLICY=false: no NetworkPolicy; whoever reaches a pod's address reaches its engine."""
    metrics_namespaces: tuple[str, ...] = ()
    """MAINSAIL_METRICS_NAMESPACES, separated by commas: whose pods may read engines' metrics (a Prometheus)."""
    health_port: int = 8081

    @property
    def listened_namespaces(self) -> tuple[str, ...]:
        """The watched ones, and the operator's own, where the gateways are. Empty: all."""
        return tuple(dict.fromkeys((*self.watch_namespaces, self.namespace))) if self.watch_namespaces else ()


def from_environment(environment: Mapping[str, str] = os.environ) -> Settings:
    """Raises ValueError naming the variable when a value cannot be read."""
    default = Settings()
    port = environment.get("MAINSAIL_HEALTH_PORT", str(default.health_port))
    if not port.isdigit():
        raise ValueError(f"MAINSAIL_HEALTH_PORT must be a port number, not {port!r}")
    policy = environment.get("MAINSAIL_NETWORK_POLICY", "true").lower()
    if policy not in ("true", "false"):
        raise ValueError(f"MAINSAIL_NETWORK_POLICY must be true or false, not {policy!r}")
    return Settings(
        engine_image=environment.get("MAINSAIL_ENGINE_IMAGE", default.engine_image),
        engine_image_pull_policy=environment.get("MAINSAIL_ENGINE_IMAGE_PULL_POLICY", default.engine_image_pull_policy),
        fetch_image=environment.get("MAINSAIL_FETCH_IMAGE", default.fetch_image),
        fetch_image_pull_policy=environment.get("MAINSAIL_FETCH_IMAGE_PULL_POLICY", default.fetch_image_pull_policy),
        namespace=environment.get("MAINSAIL_NAMESPACE", default.namespace),
        watch_namespaces=_names(environment.get("MAINSAIL_WATCH_NAMESPACES", "")),
        gateway_service=environment.get("MAINSAIL_GATEWAY_SERVICE", default.gateway_service),
        network_policy=policy == "true",
        metrics_namespaces=_names(environment.get("MAINSAIL_METRICS_NAMESPACES", "")),
        identity=environment.get("MAINSAIL_IDENTITY", socket.gethostname()),
        health_port=int(port),
    )


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())
