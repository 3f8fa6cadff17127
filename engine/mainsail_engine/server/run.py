"""The server from start to end: health listener, core, API processes, drain. Imports no torch.

main thread: asyncio + uvloop (HTTP, tokens)      health thread: probes      core: a process of its own

This is the leader, API process 0. With --api-server-count further ones stand beside it, with the same duties but these.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
import time
from collections.abc import Mapping

import msgspec
import uvloop

from mainsail_engine.client import startup_error
from mainsail_engine.collector import settle
from mainsail_engine.config import EngineConfig, ServerConfig
from mainsail_engine.core_process import CoreProcess
from mainsail_engine.protocol import Ready
from mainsail_engine.server.api import BACKLOG, ApiServer, bind
from mainsail_engine.server.drain import Drain, unfinished
from mainsail_engine.server.health import (
    LIVE_LIMIT_CPU_S,
    LIVE_LIMIT_CUDA_S,
    Verdict,
    Vitals,
    health_listener,
    judge,
)
from mainsail_engine.server.serving import Serving
from mainsail_engine.server.worker import WorkerStart
from mainsail_engine.server.workers import Workers
from mainsail_engine.timeline import in_words, of_server, process_began_s

log = logging.getLogger(__name__)


class Leader(ApiServer):
    """Owns the parts and their order of birth and death."""

    def __init__(self, engine: EngineConfig, server: ServerConfig, core: CoreProcess) -> None:
        super().__init__(engine, server, core, process=0)
        self._core_started_s = core.started_s
        self._live_limit_s = server.live_limit_s or LIVE_LIMIT_CUDA_S
        self._workers = Workers(self.board)
        self._drain = Drain(
            timeout_s=server.drain_timeout_s, num_running=self._num_running, on_begin=self._on_drain_begin
        )

    async def run(self) -> None:
        """Serve until drained. Raises StartupError when the core cannot start, or dies."""
        shared = self.config.api_server_count > 1
        listener = bind(self.config.host, self.config.port, shared=shared)
        with health_listener(self.config, self._look):
            loop = asyncio.get_running_loop()
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, self._drain.begin)
            try:
                serving = await self._start_engine(listener)
                if serving is not None:
                    await self._serve(serving, listener)
            finally:
                await self._workers.close()
                await self.client.close()
                listener.close()
                self.send_traces()

    async def _start_engine(self, listener: socket.socket) -> Serving | None:
        """Core, tokenizer and workers, side by side. None: told to stop before they were ready."""
        stopping = asyncio.create_task(self._drain.wait())
        starting = asyncio.create_task(self._start_processes(listener.getsockname()[1]))
        try:
            tokenizer = self.load_tokenizer()
            await asyncio.wait((stopping, starting), return_when=asyncio.FIRST_COMPLETED)
            if not starting.done():
                return None
            ready = starting.result()
            if self.config.live_limit_s is None:
                self._live_limit_s = LIVE_LIMIT_CUDA_S if ready.device.startswith("cuda") else LIVE_LIMIT_CPU_S
            return self.build_serving(ready, tokenizer)
        finally:
            for task in (stopping, starting):
                task.cancel()
            await asyncio.gather(stopping, starting, return_exceptions=True)

    async def _start_processes(self, port: int) -> Ready:
        server = msgspec.structs.replace(self.config, port=port)
        await self._workers.start(
            [
                WorkerStart(engine=self.engine, server=server, process=number, folder=str(self.client.folder))
                for number in range(1, self.config.api_server_count)
            ]
        )
        ready = await self.client.start()
        await self._workers.serving()
        return ready

    async def _serve(self, serving: Serving, listener: socket.socket) -> None:
        http = self.http(look=self._look, drain=self._drain.begin)
        listener.listen(BACKLOG)
        serve = asyncio.create_task(http.serve(sockets=[listener]))
        while not http.started and not serve.done():  # noqa: ASYNC110 (uvicorn tells in no other way)
            await asyncio.sleep(0.005)
        host, port = listener.getsockname()[:2]
        phases = of_server(
            serving.ready.start, began_s=process_began_s(), core_started_s=self._core_started_s, now=time.monotonic()
        )
        serving.metrics.started(phases)
        log.info("%s", in_words(phases))
        settle()
        announce(f"ready: http://{host}:{port}/v1 serves {', '.join(serving.model_names)}", serving.ready, phases)
        died = asyncio.create_task(self.client.died.wait())
        drained = asyncio.create_task(self._drain.wait())
        lost = asyncio.create_task(self._workers.ended())
        lag = asyncio.create_task(self.watch_loop_lag())
        try:
            await asyncio.wait((died, drained, lost, serve), return_when=asyncio.FIRST_COMPLETED)
            if drained.done() and drained.result():
                log.warning("drain: %d requests did not finish in time", drained.result())
                self.client.fail_all(unfinished())
            http.should_exit = True
            await serve
            if died.done():
                raise startup_error(self.client.failure)
            if lost.done():
                raise self._workers.failure()
        finally:
            for task in (died, drained, lost, lag):
                task.cancel()
            await asyncio.gather(died, drained, lost, lag, return_exceptions=True)

    def _num_running(self) -> int:
        return int(self.board.total("in_progress"))

    def _on_drain_begin(self) -> None:
        self.board.set("draining", 1)
        log.info("draining: %d requests in progress", self._num_running())

    def _look(self, path: str) -> Verdict | None:
        """Called from the health thread too: reads plain attributes and cells only."""
        vitals = Vitals(
            core_alive=self.client.is_alive,
            started=self.serving is not None,
            draining=self._drain.has_begun,
            num_requests=int(self.board.total("running")),
            progress_at_s=max(self.client.progress_at_s, self.board.working_since_s() or 0.0),
            asleep=self.board.is_asleep,
        )
        return judge(path, vitals, limit_s=self._live_limit_s, now=time.monotonic())


def announce(line: str, ready: Ready, phases: Mapping[str, float]) -> None:
    pool = f"{ready.num_blocks} KV blocks of {ready.block_size}, context {ready.max_model_len}"
    took_s = sum(phases.values())
    print(f"{line} ({ready.device}, {ready.dtype}; {pool}; {took_s:.1f} s)", file=sys.stderr, flush=True)


def run_server(engine: EngineConfig, server: ServerConfig, core: CoreProcess) -> None:
    """Blocks until the server has ended, and the core with it. Raises StartupError."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(Leader(engine, server, core).run())
