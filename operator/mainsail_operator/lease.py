"""Leader election on a coordination.k8s.io Lease: one operator writes, others stand by.

The holder renews every few seconds. Its right to write ends, by its own monotonic clock, before anyone else may take
the Lease over: a leader that was stopped and wakes up finds `holds()` false and writes nothing. Times count from before
the request was sent. A holder that ends well releases the Lease, so that the next one need not wait.
"""

from __future__ import annotations

import asyncio
import logging
import time
from datetime import UTC, datetime

import httpx2

from mainsail_operator.types import JSON

log = logging.getLogger(__name__)

DURATION_S = 10
"""A holder that renews no more is followed after this long, and a second for the other to look."""
RENEWALS = 4
"""In one duration: two may be lost before the right to write ends."""
MARGIN = 0.2
"""Share of the duration by which the holder stops writing before others may take over."""
LOOK_S = 1.0
"""How often one that stands by looks, at most."""


def _stamp() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


class Lease:
    def __init__(
        self,
        client: httpx2.AsyncClient,
        namespace: str,
        identity: str,
        name: str = "mainsail-operator",
        duration_s: int = DURATION_S,
    ) -> None:
        self._client = client
        self._duration_s = duration_s
        self._base = f"/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases"
        self._name = name
        self._namespace = namespace
        self._identity = identity
        self._until = 0.0
        self._seen: tuple[str, float] = ("", 0.0)
        """The other holder's last renewal as it stands in the object, and when we first saw it (monotonic)."""
        self.acquired = asyncio.Event()

    def holds(self) -> bool:
        """Whether a write is allowed now."""
        return time.monotonic() < self._until

    async def run(self) -> None:
        """Acquire and renew until cancelled; then release."""
        try:
            while True:
                try:
                    await self._round()
                except (httpx2.HTTPError, OSError) as error:
                    log.warning("lease: %s", error or type(error).__name__)
                if self.holds():
                    self.acquired.set()
                else:
                    self.acquired.clear()
                pause = self._duration_s / RENEWALS
                await asyncio.sleep(pause if self.holds() else min(LOOK_S, pause))
        finally:
            await self._release()

    async def _round(self) -> None:
        sent = time.monotonic()
        response = await self._client.get(f"{self._base}/{self._name}")
        if response.status_code == 404:
            body: JSON = {"metadata": {"name": self._name, "namespace": self._namespace}, "spec": self._spec(0)}
            made = await self._client.post(
                self._base, json={"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", **body}
            )
            self._took(made, sent)
            return
        response.raise_for_status()
        lease: JSON = response.json()
        spec: JSON = lease.get("spec") or {}
        holder = str(spec.get("holderIdentity") or "")
        if holder not in ("", self._identity) and not self._expired(str(spec.get("renewTime")), sent, spec):
            return
        turns = int(spec.get("leaseTransitions") or 0) + (holder != self._identity)
        lease["spec"] = self._spec(turns, str(spec.get("acquireTime") or "") if holder == self._identity else "")
        self._took(await self._client.put(f"{self._base}/{self._name}", json=lease), sent)

    def _spec(self, transitions: int, acquired: str = "") -> JSON:
        now = _stamp()
        return {
            "holderIdentity": self._identity, "leaseDurationSeconds": self._duration_s,
            "acquireTime": acquired or now, "renewTime": now, "leaseTransitions": transitions,
        }  # fmt: skip

    def _expired(self, renewed: str, now: float, spec: JSON) -> bool:
        """Judged by how long we have seen the same renewal, so that clocks of machines need not agree."""
        if renewed != self._seen[0]:
            self._seen = (renewed, now)
        return now - self._seen[1] >= int(spec.get("leaseDurationSeconds") or self._duration_s)

    def _took(self, response: httpx2.Response, sent: float) -> None:
        if response.status_code == 409:  # somebody was faster
            return
        response.raise_for_status()
        if not self.holds():
            log.info("leading as %s", self._identity)
        self._until = sent + self._duration_s * (1 - MARGIN)

    async def _release(self) -> None:
        if not self.holds():
            return
        self._until = 0.0
        try:
            response = await self._client.get(f"{self._base}/{self._name}")
            lease: JSON = response.json()
            if lease.get("spec", {}).get("holderIdentity") == self._identity:
                lease["spec"]["holderIdentity"] = ""
                await self._client.put(f"{self._base}/{self._name}", json=lease)
        except (httpx2.HTTPError, OSError, ValueError) as error:
            log.info("the lease was not released: %s", error)
