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
    namespace: str = "mainsail-system"
    """MAINSAIL_NAMESPACE: where the operator itself lives, and its Lease."""
    watch_namespaces: tuple[str, ...] = ()
    """MAINSAIL_WATCH_NAMESPACES, separated by commas. Empty: all."""
    identity: str = "mainsail-operator"
    """MAINSAIL_IDENTITY: who holds the Lease; the pod's name."""
    health_port: int = 8081


def from_environment(environment: Mapping[str, str] = os.environ) -> Settings:
    """Raises ValueError naming the variable when a value cannot be read."""
    default = Settings()
    port = environment.get("MAINSAIL_HEALTH_PORT", str(default.health_port))
    if not port.isdigit():
        raise ValueError(f"MAINSAIL_HEALTH_PORT must be a port number, not {port!r}")
    namespaces = environment.get("MAINSAIL_WATCH_NAMESPACES", "").split(",")
    return Settings(
        engine_image=environment.get("MAINSAIL_ENGINE_IMAGE", default.engine_image),
        engine_image_pull_policy=environment.get("MAINSAIL_ENGINE_IMAGE_PULL_POLICY", default.engine_image_pull_policy),
        namespace=environment.get("MAINSAIL_NAMESPACE", default.namespace),
        watch_namespaces=tuple(name.strip() for name in namespaces if name.strip()),
        identity=environment.get("MAINSAIL_IDENTITY", socket.gethostname()),
        health_port=int(port),
    )
