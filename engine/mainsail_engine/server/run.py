"""The API process from start to end: health listener, core, tokenizer, HTTP, drain. Imports no torch.

main thread: asyncio + uvloop (HTTP, tokens)      health thread: probes      core: a process of its own
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import sys
import time
from collections.abc import Generator
from pathlib import Path
from types import FrameType

import uvicorn
import uvloop

from mainsail_engine.client import EngineClient, startup_error
from mainsail_engine.config import EngineConfig, ServerConfig
from mainsail_engine.errors import InvalidConfigurationError, StartupError
from mainsail_engine.metrics import Metrics
from mainsail_engine.protocol import FirstScheduled, Ready, StepOutputs
from mainsail_engine.server.admission import Admission
from mainsail_engine.server.answer_format import choose_format
from mainsail_engine.server.app import Application, build_app
from mainsail_engine.server.drain import Drain, unfinished
from mainsail_engine.server.health import (
    LIVE_LIMIT_CPU_S,
    LIVE_LIMIT_CUDA_S,
    HealthServer,
    Verdict,
    Vitals,
    judge,
)
from mainsail_engine.server.serving import Serving
from mainsail_engine.text.tokenizer import Tokenizer, load_tokenizer

log = logging.getLogger(__name__)
LAST_BYTES_S = 3
"""After the drain: how long open connections may take to read what was sent."""


class _HttpServer(uvicorn.Server):
    """uvicorn without its own signal handlers: a signal begins the drain here."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Never called: no signal is captured."""


class ApiProcess:
    """Owns the parts and their order of birth and death."""

    def __init__(self, engine: EngineConfig, server: ServerConfig) -> None:
        self._engine = engine
        self._config = server
        self._client = EngineClient(engine, on_step=self._on_step, on_first_scheduled=self._on_first_scheduled)
        self._serving: Serving | None = None
        self._app: Application | None = None
        self._live_limit_s = server.live_limit_s or LIVE_LIMIT_CPU_S
        self._drain = Drain(
            timeout_s=server.drain_timeout_s, num_running=self._num_running, on_begin=self._on_drain_begin
        )

    async def run(self) -> None:
        """Serve until drained. Raises StartupError when the core cannot start, or dies."""
        began_s = time.monotonic()
        listener = bind(self._config.host, self._config.port)
        health = self._start_health()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._drain.begin)
        try:
            if await self._start_engine():
                await self._serve(listener, began_s)
        finally:
            await self._client.close()
            listener.close()
            if health is not None:
                health.close()

    def _start_health(self) -> HealthServer | None:
        if self._config.health_port is None:
            return None
        health = HealthServer(self._config.host, self._config.health_port, self._look)
        health.start()
        return health

    async def _start_engine(self) -> bool:
        """Core and tokenizer, side by side. False: told to stop before they were ready."""
        stopping = asyncio.create_task(self._drain.wait())
        starting = asyncio.create_task(self._client.start())
        try:
            tokenizer = load_tokenizer(Path(self._engine.model.path))
            if tokenizer is None and self._engine.model.load_format != "dummy":
                raise StartupError(f"{self._engine.model.path} has no tokenizer.json")
            await asyncio.wait((stopping, starting), return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                self._serving = self._build_serving(starting.result(), tokenizer)
            return starting.done()
        finally:
            for task in (stopping, starting):
                task.cancel()
            await asyncio.gather(stopping, starting, return_exceptions=True)

    def _build_serving(self, ready: Ready, tokenizer: Tokenizer | None) -> Serving:
        names = self._config.served_model_names or (Path(self._engine.model.path).name,)
        metrics = Metrics(names[0], ready.max_model_len)
        metrics.set_cache_info(ready, enable_prefix_caching=self._engine.cache.enable_prefix_caching)
        if self._config.live_limit_s is None:
            self._live_limit_s = LIVE_LIMIT_CUDA_S if ready.device.startswith("cuda") else LIVE_LIMIT_CPU_S
        admission = Admission(
            max_requests=self._config.max_num_queued_reqs,
            max_tokens=self._config.max_num_queued_tokens,
            max_wait_s=self._config.max_queue_wait_s,
        )
        return Serving(
            client=self._client,
            tokenizer=tokenizer,
            metrics=metrics,
            admission=admission,
            ready=ready,
            model_names=names,
            model_path=self._engine.model.path,
            answer_format=choose_format(
                tokenizer.template.source if tokenizer and tokenizer.template else None,
                tool_parser=self._config.tool_call_parser,
                reasoning_parser=self._config.reasoning_parser,
            ),
        )

    async def _serve(self, listener: socket.socket, began_s: float) -> None:
        serving = self._serving
        if serving is None:
            raise StartupError("the engine was not started")
        self._app = build_app(serving, look=self._look, drain=self._drain.begin, api_key=self._config.api_key)
        config = uvicorn.Config(
            self._app.asgi,
            loop="uvloop",
            http="httptools",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=LAST_BYTES_S,
        )
        http = _HttpServer(config)
        serve = asyncio.create_task(http.serve(sockets=[listener]))
        while not http.started and not serve.done():  # noqa: ASYNC110 (uvicorn tells in no other way)
            await asyncio.sleep(0.005)
        host, port = listener.getsockname()[:2]
        announce(f"ready: http://{host}:{port}/v1 serves {', '.join(serving.model_names)}", serving.ready, began_s)
        died = asyncio.create_task(self._client.died.wait())
        drained = asyncio.create_task(self._drain.wait())
        try:
            await asyncio.wait((died, drained, serve), return_when=asyncio.FIRST_COMPLETED)
            if drained.done() and drained.result():
                log.warning("drain: %d requests did not finish in time", drained.result())
                self._client.fail_all(unfinished())
            http.should_exit = True
            await serve
            if died.done():
                raise startup_error(self._client.failure)
        finally:
            for task in (died, drained):
                task.cancel()
            await asyncio.gather(died, drained, return_exceptions=True)

    def _on_step(self, step: StepOutputs) -> None:
        if self._serving is not None:
            self._serving.metrics.step(step)

    def _on_first_scheduled(self, first: FirstScheduled) -> None:
        if self._serving is not None:
            self._serving.first_scheduled(first)

    def _num_running(self) -> int:
        return self._app.in_progress.count if self._app is not None else 0

    def _on_drain_begin(self) -> None:
        if self._serving is not None:
            self._serving.draining = True
        log.info("draining: %d requests in progress", self._num_running())

    def _look(self, path: str) -> Verdict | None:
        """Called from the health thread too: reads plain attributes only."""
        vitals = Vitals(
            core_alive=self._client.is_alive,
            started=self._serving is not None,
            draining=self._drain.has_begun,
            num_requests=self._client.num_requests,
            progress_at_s=self._client.progress_at_s,
        )
        return judge(path, vitals, limit_s=self._live_limit_s, now=time.monotonic())


def bind(host: str, port: int) -> socket.socket:
    """Take the port before the model is loaded: a taken one is an error within milliseconds."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise InvalidConfigurationError(f"--port {port} on {host} cannot be used: {error}") from error
    return listener


def announce(line: str, ready: Ready, began_s: float) -> None:
    pool = f"{ready.num_blocks} KV blocks of {ready.block_size}, context {ready.max_model_len}"
    took_s = time.monotonic() - began_s
    print(f"{line} ({ready.device}, {ready.dtype}; {pool}; {took_s:.1f} s)", file=sys.stderr, flush=True)


def run_server(engine: EngineConfig, server: ServerConfig) -> None:
    """Blocks until the server has ended. Raises StartupError."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(ApiProcess(engine, server).run())
