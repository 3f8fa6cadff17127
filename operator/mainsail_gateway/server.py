"""Listening, and ending well: after SIGTERM readiness fails first, then no new connection, then running answers finish."""

from __future__ import annotations

import asyncio
import logging
import signal
from types import FrameType

import uvicorn

from mainsail_gateway.app import App
from mainsail_gateway.health import HealthServer
from mainsail_gateway.metrics import Metrics
from mainsail_gateway.routes import Routes, kube_client
from mainsail_gateway.settings import Settings

log = logging.getLogger(__name__)


class _Server(uvicorn.Server):
    """uvicorn, whose first signal begins the drain instead of the end."""

    draining = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.draining or sig == signal.SIGINT:
            super().handle_exit(sig, frame)
        self.draining = True


async def serve(settings: Settings) -> None:
    """Run until a signal. Raises OSError when a port is taken, ConfigError without a way to the API server."""
    metrics = Metrics()
    async with kube_client(settings.kubeconfig) as kube:
        routes = Routes(kube, settings)
        app = App(settings, routes, metrics)
        server = _Server(_uvicorn(app, settings))
        health = HealthServer(
            settings.host, settings.health_port, registry=metrics.registry,
            live=lambda: True, ready=lambda: routes.synced and not server.draining,
        )  # fmt: skip
        watching = asyncio.create_task(routes.run())
        ending = asyncio.create_task(_end_after_drain(server, settings))
        gauging = asyncio.create_task(_gauge(routes, metrics))
        try:
            await server.serve()
        finally:
            for task in (watching, ending, gauging):
                task.cancel()
            await asyncio.gather(watching, ending, gauging, return_exceptions=True)
            await app.close()
            health.close()


def _uvicorn(app: App, settings: Settings) -> uvicorn.Config:
    return uvicorn.Config(
        app,  # pyright: ignore[reportArgumentType]  # our ASGI types are wider than uvicorn's TypedDicts
        host=settings.host,
        port=settings.port,
        loop="uvloop",
        http="httptools",
        lifespan="off",
        access_log=False,
        server_header=False,
        log_level=settings.log_level,
        timeout_keep_alive=round(settings.keep_alive_s),
        timeout_graceful_shutdown=round(settings.drain_timeout_s),
    )


async def _end_after_drain(server: _Server, settings: Settings) -> None:
    """Once readiness fails, go on accepting until load balancers have noticed; then let uvicorn finish."""
    while not server.draining:
        await asyncio.sleep(0.1)
    log.info("draining")
    await asyncio.sleep(settings.drain_delay_s)
    server.should_exit = True


async def _gauge(routes: Routes, metrics: Metrics) -> None:
    while True:
        metrics.endpoints.clear()
        for name, service in routes.table.services.items():
            metrics.endpoints.labels(name).set(len(service.endpoints))
        await asyncio.sleep(1.0)
