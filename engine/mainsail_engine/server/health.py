"""Health from the step heartbeat, on a thread and a port of its own, so that load never fails a probe.

startup: the first token was generated. ready: and not draining, and the core lives. live: the core lives, and the step
counter moved within the limit if there is work (a saturated engine steps on; a hung one does not).
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from mainsail_engine.config import ServerConfig
from mainsail_engine.errors import InvalidConfigurationError

LIVE_LIMIT_CUDA_S, LIVE_LIMIT_CPU_S = 10.0, 60.0


@dataclass(frozen=True, slots=True)
class Vitals:
    """What health is judged from, at one moment."""

    core_alive: bool
    started: bool
    draining: bool
    num_requests: int
    progress_at_s: float
    """Monotonic time of the last step, or since when there is work."""
    asleep: bool = False
    """Weights are on the host (/sleep): alive, but of no use to clients."""


@dataclass(frozen=True, slots=True)
class Verdict:
    ok: bool
    message: str


def judge(path: str, vitals: Vitals, *, limit_s: float, now: float) -> Verdict | None:
    """The answer to a probe. None: no such probe."""
    if path == "/health/live":
        return _live(vitals, limit_s, now)
    if path == "/health/startup":
        return Verdict(vitals.started, "started" if vitals.started else "loading the model")
    if path in ("/health", "/health/ready"):
        return _ready(vitals)
    return None


def _live(vitals: Vitals, limit_s: float, now: float) -> Verdict:
    if not vitals.started:
        return Verdict(True, "loading the model")
    if not vitals.core_alive:
        return Verdict(False, "the core process ended")
    stalled_s = now - vitals.progress_at_s
    if vitals.num_requests and stalled_s > limit_s:
        return Verdict(False, f"no step finished for {stalled_s:.0f} s while requests wait")
    return Verdict(True, "alive")


def _ready(vitals: Vitals) -> Verdict:
    if not vitals.started:
        return Verdict(False, "loading the model")
    if vitals.draining:
        return Verdict(False, "draining")
    if vitals.asleep:
        return Verdict(False, "asleep")
    return Verdict(vitals.core_alive, "ready" if vitals.core_alive else "the core process ended")


def body(verdict: Verdict) -> bytes:
    return json.dumps({"status": "ok" if verdict.ok else "failed", "message": verdict.message}).encode()


class HealthServer:
    """The second listener. `look` must be cheap and safe from another thread (it reads plain attributes)."""

    def __init__(self, host: str, port: int, look: Callable[[str], Verdict | None]) -> None:
        try:
            self._server = ThreadingHTTPServer((host, port), _handler(look))
        except OSError as error:
            raise InvalidConfigurationError(f"--health-port {port} on {host} cannot be used: {error}") from error
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, name="health", daemon=True)

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def health_listener(server: ServerConfig, look: Callable[[str], Verdict | None]) -> Generator[None]:
    """Probes are answered within the block, where --health-port asks for it. Raises InvalidConfigurationError."""
    if server.health_port is None:
        yield
        return
    health = HealthServer(server.host, server.health_port, look)
    health.start()
    try:
        yield
    finally:
        health.close()


def _handler(look: Callable[[str], Verdict | None]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = 30

        def do_GET(self) -> None:
            verdict = look(self.path.partition("?")[0])
            status, content = (404, b"{}") if verdict is None else (200 if verdict.ok else 503, body(verdict))
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            """Probes are not worth a line each."""

    return Handler
