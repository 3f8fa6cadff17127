"""Health and metrics on a port and a thread of their own, so that load on the event loop never fails a probe.

`/health/live`: the event loop's heartbeat moved in the last `STUCK_S`. `/health/ready`: everything was listed once,
and the gateway is not draining. `/metrics`: Prometheus' text form; `/metrics?name[]=NAME` only that metric, which the
operator asks for every second. `/debug/routes`: see debug.py.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

STUCK_S = 30.0


@dataclass(slots=True)
class Health:
    """What the probes read; the event loop writes it."""

    synced: bool = False
    draining: bool = False
    beat: float = field(default_factory=time.monotonic)

    def live(self, now: float) -> tuple[bool, str]:
        late = now - self.beat
        return late < STUCK_S, "ok" if late < STUCK_S else f"the event loop has not moved for {late:.0f} s"

    def ready(self, now: float) -> tuple[bool, str]:
        if self.draining:
            return False, "draining"
        if not self.synced:
            return False, "InferenceServices and EndpointSlices have not been listed yet"
        return self.live(now)


Debug = Callable[[str], tuple[int, bytes]]
"""Query string → status and JSON; called from the server's threads."""


class HealthServer:
    def __init__(
        self, host: str, port: int, health: Health, registry: CollectorRegistry, debug: Debug | None = None
    ) -> None:
        checks: dict[str, Callable[[float], tuple[bool, str]]] = {
            "/health": health.ready,
            "/health/ready": health.ready,
            "/health/live": health.live,
            "/health/startup": health.live,
        }

        class Handler(BaseHTTPRequestHandler):
            timeout = 10.0
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                path, _, query = self.path.partition("?")
                if path == "/metrics":
                    names = parse_qs(query).get("name[]")
                    chosen = registry.restricted_registry(names) if names else registry
                    self._answer(200, generate_latest(chosen), CONTENT_TYPE_LATEST)
                elif path == "/debug/routes" and debug is not None:
                    self._answer(*debug(query), "application/json")
                elif path in checks:
                    good, text = checks[path](time.monotonic())
                    self._answer(200 if good else 503, text.encode() + b"\n", "text/plain")
                else:
                    self._answer(404, b"not found\n", "text/plain")

            def _answer(self, status: int, body: bytes, kind: str) -> None:
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                """Probes come every second; they are not logged."""

        self._server = ThreadingHTTPServer((host, port), Handler)
        self._server.daemon_threads = True
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, name="health", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
