"""Scrapes engine and gateway pods into `Signals`: bounded in number, time and size, and never in a reconcile's way.

    engine pods    :8000/metrics  every 5 s, only of services whose load somebody wants to know
    gateway pods   :8081/metrics  every second for what waits there (requests, and agents' sessions that are held), and
                                  every 5 s for what clients met, while somebody wants to know that

**From zero.** A gateway that gets a request for a service without replicas holds it and says so in the gauge
`mainsail:gateway_queued_requests{namespace,service}`. The operator asks each gateway every second (with
`?name[]=mainsail:gateway_queued_requests&…`, Prometheus' own way to ask for some series only) and wakes the service: a
lost message cannot leave a request waiting, and a new leader sees the need within a second. At once, and for people,
the annotation `mainsail.dev/wake` on the InferenceService (an RFC 3339 time) asks for a first replica.

A pod that does not answer is asked less and less often, up to once a minute; its numbers grow stale meanwhile, and
whoever decides sees that they are.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

import httpx2

from mainsail_operator.exposition import Series, parse
from mainsail_operator.signals import (
    DEMAND,
    LONG_HORIZON_S,
    History,
    Signals,
    is_engine_signal,
    is_gateway_signal,
    waiting,
)

log = logging.getLogger(__name__)

Key = tuple[str, str]
"""Namespace and name of a service."""

INTERVAL_S = 5.0
QUEUE_INTERVAL_S = 1.0
TIMEOUT_S = 3.0
MAX_CONCURRENT = 32
MAX_PER_SECOND = 200
"""Beyond this many engine pods per second, each is asked less often."""
MAX_BYTES = 16 << 20
_MAX_PAUSE_S = 60.0
_SCRAPE_ERRORS = (httpx2.HTTPError, OSError, ValueError)


@dataclass(frozen=True, slots=True)
class Target:
    """A pod that tells metrics."""

    uid: str
    url: str
    restarts: int = 0


@dataclass(slots=True)
class _Due:
    at: float = 0.0
    """Monotonic seconds of the next scrape."""
    failures: int = 0
    busy: bool = False


@dataclass(slots=True)
class Scraper:
    """`want` says whose engines to ask, `gateways` who the gateways are; `on_queued` is told for whom requests wait."""

    client: httpx2.AsyncClient
    signals: Signals
    gateways: Callable[[], Iterable[Target]]
    on_queued: Callable[[Key], None] = lambda _: None
    _wanted: dict[Key, Sequence[Target]] = field(default_factory=dict[Key, "Sequence[Target]"])
    _due: dict[str, _Due] = field(default_factory=dict[str, _Due])
    _tasks: set[asyncio.Task[None]] = field(default_factory=set["asyncio.Task[None]"])
    _slots: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(MAX_CONCURRENT))

    def want(self, key: Key, targets: Sequence[Target]) -> None:
        """From now on, these are the engine pods of the service to ask. None: nobody wants to know."""
        if targets:
            self._wanted[key] = targets
        else:
            self._wanted.pop(key, None)

    async def run(self) -> None:
        """Until cancelled."""
        try:
            while True:
                self.round(time.monotonic())
                await asyncio.sleep(QUEUE_INTERVAL_S / 4)
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def round(self, now: float) -> None:
        """Start every scrape that is due. now: monotonic seconds."""
        gateways = list(self.gateways())
        engines = [target for targets in self._wanted.values() for target in targets]
        names = {target.uid for target in engines}
        self.signals.retain(names, {target.uid for target in gateways})
        for uid in self._due.keys() - names - {f"{g.uid}/{what}" for g in gateways for what in ("queues", "seen")}:
            if not self._due[uid].busy:
                del self._due[uid]
        for target in gateways:
            self._start(f"{target.uid}/queues", partial(self._ask_queues, target), QUEUE_INTERVAL_S, now)
            if self._wanted:
                self._start(f"{target.uid}/seen", partial(self._ask_gateway, target), INTERVAL_S, now)
        interval = max(INTERVAL_S, len(engines) / MAX_PER_SECOND)
        for target in engines:
            self._start(target.uid, partial(self._ask_engine, target), interval, now)

    def _start(self, uid: str, ask: Callable[[], Coroutine[None, None, None]], interval: float, now: float) -> None:
        due = self._due.setdefault(uid, _Due())
        if due.busy or now < due.at:
            return
        due.busy = True
        task = asyncio.create_task(self._guarded(due, ask, interval), name=f"scrape {uid}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _guarded(self, due: _Due, ask: Callable[[], Coroutine[None, None, None]], interval: float) -> None:
        """One scrape whose failure only makes the next one later."""
        try:
            async with self._slots, asyncio.timeout(TIMEOUT_S):
                await ask()
            due.failures = 0
        except (TimeoutError, *_SCRAPE_ERRORS) as error:
            due.failures += 1
            if due.failures in (3, 10, 100):
                log.info(
                    "%s: %d scrapes failed: %s", asyncio.current_task(), due.failures, error or type(error).__name__
                )
        finally:
            due.busy = False
            due.at = time.monotonic() + min(_MAX_PAUSE_S, interval * 2**due.failures)

    async def _page(self, url: str) -> str:
        """Raises httpx2.HTTPError, ValueError for a page that is none or too long."""
        async with self.client.stream("GET", url) as response:
            response.raise_for_status()
            parts: list[bytes] = []
            size = 0
            async for part in response.aiter_bytes():
                size += len(part)
                if size > MAX_BYTES:
                    raise ValueError(f"{url}: more than {MAX_BYTES} bytes of metrics")
                parts.append(part)
        return b"".join(parts).decode()

    async def _ask_engine(self, target: Target) -> None:
        samples = dict(parse(await self._page(target.url), is_engine_signal))
        history = self.signals.engines.setdefault(target.uid, History())
        history.add(time.time(), samples, target.restarts)

    async def _ask_queues(self, target: Target) -> None:
        names = "&".join(f"name[]={name}" for name in DEMAND)
        queues = waiting(parse(await self._page(f"{target.url}?{names}"), DEMAND.__contains__))
        self.signals.queued(target.uid, time.time(), queues)
        for service, found in queues.items():
            if found.requests or found.held:
                self.on_queued(service)

    async def _ask_gateway(self, target: Target) -> None:
        """Only what is wanted is kept: a gateway tells about every pod of every service."""
        samples = parse(await self._page(target.url), is_gateway_signal)
        kept = {series: value for series, value in samples if _service(series) in self._wanted}
        history = self.signals.gateways.setdefault(target.uid, History(LONG_HORIZON_S))
        history.add(time.time(), kept, target.restarts)


def _service(series: Series) -> Key | None:
    labels = dict(series[1])
    return (labels["namespace"], labels["service"]) if {"namespace", "service"} <= labels.keys() else None
