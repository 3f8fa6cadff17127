"""`mainsail-operator`: watch, lead, reconcile, until a signal. With arguments: `cli`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import sys
import time
from collections.abc import Coroutine, Sequence
from typing import Any

import httpx2
import kopf
import uvloop

from mainsail_operator import cli, groups, memory
from mainsail_operator.apply import Writer, kube_client
from mainsail_operator.handlers import Store, register, settings_for_watching, woken
from mainsail_operator.health import serve_health
from mainsail_operator.lease import Lease
from mainsail_operator.model_routes import ModelRoutes
from mainsail_operator.reconcile import Reconciler
from mainsail_operator.relist import Relister
from mainsail_operator.scrape import TIMEOUT_S, Scraper
from mainsail_operator.settings import VARIABLES, Settings, from_environment
from mainsail_operator.signals import Signals
from mainsail_operator.sizing import Sizer

log = logging.getLogger(__name__)

_LOOP_STUCK_S = 60.0
_NEW_API_S = 20.0
"""How often it is looked whether an API that was missing at the start is there."""


async def run(settings: Settings) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    beat = [time.monotonic()]
    health = serve_health(settings.health_port, lambda: time.monotonic() - beat[0] < _LOOP_STUCK_S)
    async with kube_client() as client, httpx2.AsyncClient(trust_env=False, timeout=TIMEOUT_S) as pods:
        lease = Lease(client, settings.namespace, settings.identity)
        grouped = await _has_groups(client)
        store = Store(settings.watch_namespaces, groups=grouped)
        signals = Signals()
        scraper = Scraper(pods, signals, gateways=lambda: store.gateways() if lease.holds() else [])
        writer = Writer(client, lease.holds, settings.identity, store.heard)
        sizer = Sizer(signals, store.room)
        reconciler = Reconciler(writer, lease, settings, store.read, scraper.want, signals, sizer, groups=grouped)
        scraper.on_queued = lambda key: reconciler.wake(key) if sizer.watches(key) else None
        registry = kopf.OperatorRegistry()
        relister = Relister(client, settings.listened_namespaces, store.sources(), woken(reconciler))
        register(registry, store, reconciler, relister)
        routes = ModelRoutes(client, writer, lease, settings.watch_namespaces, store.services.owners)
        routes.register(registry)
        tasks = start(
            stop, lease.run(), _beat(beat), scraper.run(), relister.run(), routes.run(),
            *([] if grouped else [_until_groups(client, stop)]),
        )  # fmt: skip
        try:
            await relister.first()
            await kopf.operator(
                registry=registry,
                settings=settings_for_watching(),
                standalone=True,
                clusterwide=not settings.watch_namespaces,
                namespaces=settings.listened_namespaces,
                stop_flag=stop,
            )
        finally:
            await reconciler.close()
            failure = await end(tasks)
            health.shutdown()
    if failure is not None:
        raise failure


def start(stop: asyncio.Event, *work: Coroutine[Any, Any, None]) -> list[asyncio.Task[None]]:
    """What runs beside the watches. Whatever of it fails ends the process, for the kubelet to start a new one: without
    its Lease, say, an operator would be alive and do nothing for ever."""

    def ended(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            log.critical("%s has failed", task.get_name(), exc_info=error)
            stop.set()

    tasks = [asyncio.create_task(one, name=one.__qualname__) for one in work]
    for task in tasks:
        task.add_done_callback(ended)
    return tasks


async def end(tasks: Sequence[asyncio.Task[None]]) -> Exception | None:
    """Cancel them and let them tidy up. The failure of the first that failed."""
    for task in tasks:
        task.cancel()
    told = await asyncio.gather(*tasks, return_exceptions=True)
    return next((one for one in told if isinstance(one, Exception)), None)


async def _has_groups(client: httpx2.AsyncClient) -> bool:
    """Whether the cluster has LeaderWorkerSets."""
    try:
        return (await client.get(groups.API)).status_code == 200
    except (httpx2.HTTPError, OSError) as error:
        log.warning("looking for LeaderWorkerSets: %s", error or type(error).__name__)
        return False


async def _until_groups(client: httpx2.AsyncClient, stop: asyncio.Event) -> None:
    """Ends the process once there are LeaderWorkerSets: the next one, a second later, watches them from its start."""
    while not await _has_groups(client):
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_NEW_API_S):
                await stop.wait()
                return
    log.info("the LeaderWorkerSet API has appeared: starting anew to watch it")
    stop.set()


async def _beat(beat: list[float]) -> None:
    while True:
        beat[0] = time.monotonic()
        await asyncio.sleep(1.0)


def main() -> None:
    if sys.argv[1:]:
        cli.main(sys.argv[1:], prog="mainsail-operator", more=VARIABLES)
        return
    memory.map_large_blocks()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    for name in ("httpx2", "kopf.objects"):  # a line for every event would drown what matters
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        uvloop.run(run(from_environment()))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
