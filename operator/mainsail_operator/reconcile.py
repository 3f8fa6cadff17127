"""One pass over one InferenceService: observe → plan → apply → status. And the tasks that make passes.

Each object has one task, woken by any event of it or of a child and by a tick; passes of one object never overlap, and
one that keeps failing (with growing pauses) holds up no other.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import httpx2
from pydantic import ValidationError

from mainsail_operator.apply import NotLeaderError, WriteError, Writer
from mainsail_operator.lease import Lease
from mainsail_operator.objects import Owner
from mainsail_operator.observe import Child, Deployment, Observed, Pod, observe
from mainsail_operator.plan import plan
from mainsail_operator.scrape import Target
from mainsail_operator.settings import Settings
from mainsail_operator.sizing import Sizer
from mainsail_operator.status import invalid, status
from mainsail_operator.store import Key
from mainsail_operator.types import JSON, InferenceServiceSpec, InferenceServiceStatus

log = logging.getLogger(__name__)

TICK_S = 15.0
SCALED_TICK_S = 5.0
"""Of a service whose load decides its replicas: as often as its pods are scraped."""
_BACKOFF_S = (0.5, 60.0)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """An InferenceService and its children, as the watches have them."""

    body: JSON
    deployments: Sequence[Deployment]
    pods: Sequence[Pod]
    children: Sequence[Child]
    """Services, ServiceAccounts, …"""


Read = Callable[[Key], Snapshot | None]
"""None: the InferenceService is gone."""
Want = Callable[[Key, Sequence[Target]], None]
"""Says which pods' load this service's decisions need (`scrape.Scraper.want`)."""


class Reconciler:
    def __init__(self, writer: Writer, lease: Lease, settings: Settings, read: Read, want: Want, sizer: Sizer) -> None:
        self._writer = writer
        self._sizer = sizer
        self._want = want
        self._lease = lease
        self._settings = settings
        self._read = read
        self._wakes: dict[Key, asyncio.Event] = {}
        self._tasks: dict[Key, asyncio.Task[None]] = {}

    def wake(self, key: Key) -> None:
        """Something about this object changed. Starts its task when there is none."""
        if key not in self._tasks:
            self._wakes[key] = asyncio.Event()
            self._tasks[key] = asyncio.create_task(self._run(key), name=f"reconcile {key[0]}/{key[1]}")
        self._wakes[key].set()

    async def close(self) -> None:
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def _run(self, key: Key) -> None:
        failures = 0
        try:
            while True:
                tick = SCALED_TICK_S if self._sizer.watches(key) else TICK_S
                pause = tick if not failures else min(_BACKOFF_S[1], _BACKOFF_S[0] * 2**failures)
                try:
                    async with asyncio.timeout(pause):
                        await self._wakes[key].wait()
                except TimeoutError:
                    pass
                self._wakes[key].clear()
                await self._lease.acquired.wait()
                snapshot = self._read(key)
                if snapshot is None:
                    self._want(key, ())
                    self._sizer.forget(key)
                    return
                failures = 0 if await self._guarded(key, snapshot) else failures + 1
        finally:
            self._tasks.pop(key, None)
            self._wakes.pop(key, None)

    async def _guarded(self, key: Key, snapshot: Snapshot) -> bool:
        """A pass whose failure is said and stays its own."""
        try:
            await self._pass(snapshot)
        except NotLeaderError:
            return True
        except (WriteError, httpx2.HTTPError, OSError) as error:
            log.warning("%s/%s: %s", *key, error or type(error).__name__)
            return False
        except Exception:
            log.exception("%s/%s: the pass failed", *key)
            return False
        return True

    async def _pass(self, snapshot: Snapshot) -> None:
        body, now = snapshot.body, time.time()
        metadata: JSON = body["metadata"]
        if metadata.get("deletionTimestamp"):
            return
        owner = Owner(metadata["name"], metadata["namespace"], metadata["uid"])
        generation = int(metadata.get("generation", 0))
        before = _status_of(body)
        try:
            spec = InferenceServiceSpec.model_validate(body.get("spec", {}))
        except ValidationError as error:
            told = invalid(owner, generation, str(error), before.conditions, now)
        else:
            seen = observe(snapshot.deployments, snapshot.pods, snapshot.children, owner.uid)
            # Two revisions: the newest is judged beside the one before it.
            wanted = spec.scaling is not None or len(seen.revisions) > 1
            self._want((owner.namespace, owner.name), seen.targets if wanted else ())
            sized = self._sizer.size(owner, spec, seen, metadata.get("annotations") or {}, before.scaling, now)
            told = await self._carry_out(owner, sized.effective(spec), generation, seen, before, now)
            told = sized.told(told, generation, before.conditions, now)
        if told != before:
            await self._writer.status(owner, told)

    async def _carry_out(
        self, owner: Owner, spec: InferenceServiceSpec, generation: int, seen: Observed,
        before: InferenceServiceStatus, now: float,
    ) -> InferenceServiceStatus:  # fmt: skip
        todo = plan(owner, spec, seen, self._settings, now)
        for action in todo.actions:
            await self._writer.execute(owner, action)
        return status(owner, spec, generation, seen, todo, before.conditions, now)


def _status_of(body: JSON) -> InferenceServiceStatus:
    """The status that is there; one that cannot be read is as good as none."""
    raw = cast(JSON, body.get("status") or {})
    try:
        return InferenceServiceStatus.model_validate(raw)
    except ValidationError:
        return InferenceServiceStatus()
