"""How far a fetch is, for whoever scrapes it: bytes so far, bytes in all.

Counted on the disk, not by the clients that write there: it is the same for all of them, and includes what an earlier
try has left.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from mainsail_fetch.place import Place

BYTES = "mainsail:fetch_bytes"
TOTAL_BYTES = "mainsail:fetch_total_bytes"
COMPLETE = "mainsail:fetch_complete"


@dataclass(slots=True)
class Progress:
    place: Place
    total: int = 0
    """0 while the source has not been asked yet."""
    done: bool = False
    _server: ThreadingHTTPServer | None = field(default=None)

    def exposition(self) -> str:
        values = {BYTES: self.total if self.done else self.place.size(), TOTAL_BYTES: self.total,
                  COMPLETE: int(self.done)}  # fmt: skip
        return "".join(f"# TYPE {name} gauge\n{name} {value}\n" for name, value in values.items())

    def serve(self, port: int) -> int:
        """GET /metrics, and /ready once it is complete, on a thread of its own. Returns the port.

        Raises OSError when the port is taken."""
        progress = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body, status = progress.exposition().encode(), 200
                if self.path == "/ready":
                    body, status = b"complete\n" if progress.done else b"fetching\n", 200 if progress.done else 503
                elif self.path != "/metrics":
                    body, status = b"not found\n", 404
                self.send_response(status)
                self.send_header("content-type", "text/plain; version=0.0.4")
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                """Scrapes are not worth a line each."""

        self._server = ThreadingHTTPServer(("", port), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, name="progress", daemon=True).start()
        return self._server.server_address[1]

    def close(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
