"""Health and metrics on a port and threads of their own, so that load on the event loop never fails a probe.

`/health/live`: the event loop's heartbeat moved in the last `STUCK_S`. `/health/ready`: everything was listed once,
and the gateway is not draining. `/metrics`: Prometheus' text form; `/metrics?name[]=NAME` only that metric, which the
operator asks for every second. `/debug/routes`: see debug.py.
"""

import socketserver
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
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


Check = Callable[[], tuple[bool, str]]
Checks = Mapping[str, Check]
"""By path: whether all is well, and in words."""
Exposition = Callable[[Sequence[str]], bytes]
"""Names of metrics (none: all) → Prometheus' text form."""


def checks(live: Check, ready: Check) -> Checks:
    return {"/health": ready, "/health/ready": ready, "/health/live": live, "/health/startup": live}


def checks_of(health: Health) -> Checks:
    return checks(lambda: health.live(time.monotonic()), lambda: health.ready(time.monotonic()))


def exposition(registry: CollectorRegistry) -> Exposition:
    def told(names: Sequence[str]) -> bytes:
        return generate_latest(registry.restricted_registry(names) if names else registry)

    return told


class _UnixServer(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True


class HealthServer:
    def __init__(
        self, address: tuple[str, int] | Path, checks: Checks, metrics: Exposition, debug: Debug | None = None
    ) -> None:
        """address: host and port, or a Unix socket, which is made anew."""

        class Handler(BaseHTTPRequestHandler):
            timeout = 30.0  # longer than scrapers keep a connection idle
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                path, _, query = self.path.partition("?")
                if path == "/metrics":
                    self._answer(200, metrics(parse_qs(query).get("name[]", ())), CONTENT_TYPE_LATEST)
                elif path == "/debug/routes" and debug is not None:
                    self._answer(*debug(query), "application/json")
                elif path in checks:
                    good, text = checks[path]()
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

        self.port = 0
        if isinstance(address, Path):
            address.unlink(missing_ok=True)
            self._server: socketserver.BaseServer = _UnixServer(str(address), Handler)
        else:
            self._server = server = ThreadingHTTPServer(address, Handler)
            server.daemon_threads = True
            self.port = int(server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, name="health", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
