"""One API process: tokenizer, HTTP, and its part of the core's outputs. Imports no torch.

What all API processes of a server have in common. The first one, the leader (`run.py`), owns the core, the health port
and the signals besides; the others (`worker.py`) are its children. All listen on the same port: the kernel spreads
connections over them.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Callable, Generator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn

from mainsail_engine.cells import Cells
from mainsail_engine.client import EngineClient
from mainsail_engine.config import EngineConfig, ServerConfig
from mainsail_engine.core_process import CoreProcess
from mainsail_engine.errors import InvalidConfigurationError, StartupError
from mainsail_engine.metrics import Metrics
from mainsail_engine.protocol import FirstScheduled, Ready, StepOutputs
from mainsail_engine.server.admission import Admission
from mainsail_engine.server.answer_format import choose_format
from mainsail_engine.server.app import build_app
from mainsail_engine.server.board import Board
from mainsail_engine.server.health import Verdict
from mainsail_engine.server.serving import Serving
from mainsail_engine.server.tracing import provider_for
from mainsail_engine.text.embedding import read_embedding_form
from mainsail_engine.text.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

LAST_BYTES_S = 3
"""After the drain: how long open connections may take to read what was sent."""
LAG_PERIOD_S = 0.25
KEEP_ALIVE_S = 75
"""How long an idle connection is kept: much longer than clients keep theirs (httpx and the gateway: 5 s and less), or
one would send its next request just while its connection is closed, and not know whether it was taken."""
BACKLOG = 2048
"""Connections that may wait to be accepted: a burst of clients, not a queue of requests."""


class HttpServer(uvicorn.Server):
    """uvicorn without its own signal handlers: a signal begins the drain here."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Never called: no signal is captured."""


class ApiServer:
    """process: this one's number; core: the process that it owns, or the folder of its leader's."""

    def __init__(self, engine: EngineConfig, server: ServerConfig, core: CoreProcess | Path, *, process: int) -> None:
        self.engine, self.config, self.process = engine, server, process
        count = server.api_server_count
        self.client = EngineClient(
            core, on_step=self._on_step, on_first_scheduled=self._on_first_scheduled, process=process
        )
        path = self.client.folder / "cells" if count > 1 else None
        self.board = Board(Cells(num_rows=count, row=process, path=path))
        self.serving: Serving | None = None
        self._traces: TracerProvider | None = None

    def load_tokenizer(self) -> Tokenizer | None:
        """None for a model of random weights that has none. Raises StartupError."""
        tokenizer = load_tokenizer(Path(self.engine.model.path))
        if tokenizer is None and self.engine.model.load_format != "dummy":
            raise StartupError(f"{self.engine.model.path} has no tokenizer.json")
        return tokenizer

    def build_serving(self, ready: Ready, tokenizer: Tokenizer | None) -> Serving:
        config = self.config
        names = config.served_model_names or (Path(self.engine.model.path).name,)
        if both := sorted(set(names) & set(ready.adapters)):
            raise InvalidConfigurationError(f"--lora-modules: {both[0]} is the base model's name too")
        metrics = Metrics(names[0], ready.max_model_len, self.board.cells)
        metrics.set_cache_info(ready, self.engine.cache)
        metrics.max_num_seqs = self.engine.scheduler.max_num_seqs
        metrics.is_asleep = lambda: self.board.is_asleep
        if self.engine.lora is not None:
            metrics.set_adapters(self.engine.lora.max_loras, lambda: self.client.adapter_use)
        self.serving = Serving(
            client=self.client,
            tokenizer=tokenizer,
            metrics=metrics,
            admission=Admission(
                max_requests=config.max_num_queued_reqs,
                max_tokens=config.max_num_queued_tokens,
                max_wait_s=config.max_queue_wait_s,
                board=self.board,
            ),
            ready=ready,
            model_names=names,
            model_path=self.engine.model.path,
            embedding_form=read_embedding_form(Path(self.engine.model.path)),
            answer_format=choose_format(
                tokenizer.template.source if tokenizer and tokenizer.template else None,
                tool_parser=config.tool_call_parser,
                reasoning_parser=config.reasoning_parser,
            ),
            board=self.board,
            log_requests=config.log_requests,
        )
        return self.serving

    def http(self, *, look: Callable[[str], Verdict | None], drain: Callable[[], None]) -> HttpServer:
        """The HTTP server, to be started with `serve(sockets=[…])`."""
        if self.serving is None:
            raise StartupError("the engine was not started")
        if self.config.otlp_traces_endpoint is not None:
            self._traces = provider_for(self.config.otlp_traces_endpoint)
        app = build_app(
            self.serving, look=look, drain=drain, api_key=self.config.api_key, traces=self._traces
        )  # fmt: skip
        return HttpServer(
            uvicorn.Config(
                app,
                loop="uvloop",
                http="httptools",
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=LAST_BYTES_S,
            )
        )

    def send_traces(self) -> None:
        """Send what is left, at the end."""
        if self._traces is not None:
            self._traces.shutdown()

    async def watch_loop_lag(self) -> None:
        """How late the loop wakes is how late every token leaves."""
        while self.serving is not None:
            asked_s = time.monotonic()
            await asyncio.sleep(LAG_PERIOD_S)
            self.serving.metrics.lagged(max(0.0, time.monotonic() - asked_s - LAG_PERIOD_S))

    def _on_step(self, step: StepOutputs) -> None:
        if self.serving is not None and self.process == 0:
            self.serving.metrics.step(step)

    def _on_first_scheduled(self, first: FirstScheduled) -> None:
        if self.serving is not None:
            self.serving.first_scheduled(first)


def bind(host: str, port: int, *, shared: bool = False) -> socket.socket:
    """Take the port before the model is loaded: a taken one is an error within milliseconds.

    shared: other processes of this server will listen on it too. (Somebody else's port is still an error.)
    """
    if shared and port:
        bind(host, port).close()
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if shared:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise InvalidConfigurationError(f"--port {port} on {host} cannot be used: {error}") from error
    return listener


def join_port(host: str, port: int) -> socket.socket:
    """A listening socket of one more process, on a port that the leader has taken as shared."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listener.bind((host, port))
    listener.listen(BACKLOG)
    return listener
