"""What a ModelRoute's status says: whether everybody exists whom it names. The gateway routes by the spec alone.

Level-based and small: every wake-up, and every `TICK_S`, all routes are listed and judged, and what differs is written.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, cast

import httpx2
import kopf
from pydantic import ValidationError

from mainsail_operator.apply import NotLeaderError, RefusedError, StaleError, WriteError, Writer
from mainsail_operator.lease import Lease
from mainsail_operator.status import Finding, timed
from mainsail_operator.store import Key
from mainsail_operator.types import GROUP, JSON, VERSION, Condition
from mainsail_operator.types.route import ROUTE_PLURAL, ModelRouteSpec, ModelRouteStatus, RouteTarget

log = logging.getLogger(__name__)

TICK_S = 30.0


def targets(spec: ModelRouteSpec) -> Iterator[RouteTarget]:
    """Everybody whom a route names."""
    for rule in spec.rules:
        yield from (*rule.to, *rule.fallback)


def status_of(
    key: Key, spec: ModelRouteSpec, generation: int, services: Collection[Key], old: Sequence[Condition], now: float
) -> ModelRouteStatus:
    """The status of a route while these InferenceServices exist (pure)."""
    namespace, name = key
    named = {target.service for target in targets(spec) if target.service is not None}
    missing = sorted(service for service in named if (namespace, service) not in services)
    if missing:
        message = f"No InferenceService {missing[0]} in namespace {namespace}: requests for it go to the fallbacks."
        finding = Finding("Ready", "False", "ServiceNotFound", message)
    else:
        finding = Finding("Ready", "True", "Resolved", "Every target exists.")
    return ModelRouteStatus(
        observed_generation=generation,
        names=list(dict.fromkeys(spec.names or [name])),
        conditions=[timed(finding, generation, old, now)],
    )


def _told(obj: JSON, services: Collection[Key], now: float) -> tuple[ModelRouteStatus, ModelRouteStatus]:
    """The status that is there, and the one that should be."""
    metadata: JSON = obj["metadata"]
    generation = int(metadata.get("generation", 0))
    try:
        before = ModelRouteStatus.model_validate(obj.get("status") or {}, extra="ignore")  # a newer operator's
    except ValidationError:
        before = ModelRouteStatus()
    try:
        spec = ModelRouteSpec.model_validate(obj.get("spec") or {})
    except ValidationError as error:
        finding = Finding("Ready", "False", "InvalidSpec", str(error)[:2000])
        conditions = [timed(finding, generation, before.conditions, now)]
        return before, ModelRouteStatus(observed_generation=generation, conditions=conditions)
    key = (str(metadata["namespace"]), str(metadata["name"]))
    return before, status_of(key, spec, generation, services, before.conditions, now)


class ModelRoutes:
    """Keeps the status of all routes true."""

    def __init__(
        self,
        client: httpx2.AsyncClient,
        writer: Writer,
        lease: Lease,
        namespaces: Sequence[str],
        services: Callable[[], Collection[Key]],
    ) -> None:
        self._client = client
        self._writer = writer
        self._lease = lease
        self._paths = [f"/apis/{GROUP}/{VERSION}{scope}/{ROUTE_PLURAL}" for scope in _scopes(namespaces)]
        self._services = services
        self._woken = asyncio.Event()

    def register(self, registry: kopf.OperatorRegistry) -> None:
        """Wake up when a route changes."""

        async def heard(**_: Any) -> None:
            self.wake()

        kopf.on.event(GROUP, VERSION, ROUTE_PLURAL, id="event-modelroutes", registry=registry)(heard)

    def wake(self) -> None:
        """A route may have changed."""
        self._woken.set()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            try:
                async with asyncio.timeout(TICK_S):
                    await self._woken.wait()
            except TimeoutError:
                pass
            self._woken.clear()
            await self._lease.acquired.wait()
            try:
                await self._pass()
            except NotLeaderError:
                continue
            except (WriteError, httpx2.HTTPError, OSError) as error:
                log.warning("routes: %s", error or type(error).__name__)

    async def _pass(self) -> None:
        services = set(self._services())
        for path in self._paths:
            response = await self._client.get(path)
            response.raise_for_status()
            for obj in cast("list[JSON]", response.json()["items"]):
                await self._tell(obj, services)

    async def _tell(self, obj: JSON, services: Collection[Key]) -> None:
        """Write what differs. A route that is gone meanwhile, or whose status is refused, is no matter of others."""
        before, told = _told(obj, services, time.time())
        if told == before:
            return
        metadata: JSON = obj["metadata"]
        key = (str(metadata["namespace"]), str(metadata["name"]))
        try:
            await self._writer.route_status(key, told)
        except StaleError as error:
            log.debug("%s/%s: %s", *key, error)
        except RefusedError as error:
            log.warning("%s/%s: refused: %s", *key, error)


def _scopes(namespaces: Sequence[str]) -> list[str]:
    return [f"/namespaces/{namespace}" for namespace in namespaces] or [""]
