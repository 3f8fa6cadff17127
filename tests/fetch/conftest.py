"""Runs `mainsail-fetch` as a pod does, and servers for it on loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from mainsail_fetch.cli import main

Answer = tuple[int, dict[str, str], bytes]


@dataclass
class Server:
    """Answers GET and HEAD by a function of the path and the headers; keeps what was asked."""

    answer: Callable[[str, dict[str, str]], Answer]
    url: str = ""
    asked: list[str] = field(default_factory=list)


@contextmanager
def serving(answer: Callable[[str, dict[str, str]], Answer]) -> Iterator[Server]:
    server = Server(answer)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            server.asked.append(f"{self.command} {self.path}")
            status, headers, body = server.answer(self.path, {k.lower(): v for k, v in self.headers.items()})
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(body))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    threading.Thread(target=http.serve_forever, daemon=True).start()
    server.url = f"http://127.0.0.1:{http.server_address[1]}"
    yield server
    http.shutdown()
    http.server_close()


@dataclass(frozen=True)
class Done:
    code: int
    reason: str
    message: str
    log: str


@pytest.fixture
def fetch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """fetch(uri, folder, *flags, VARIABLE=value) → how it ended. In this process: imports take longer than the work."""
    said = tmp_path / "termination-log"

    def run(uri: str, folder: Path, *flags: str, **environment: str) -> Done:
        said.unlink(missing_ok=True)
        with monkeypatch.context() as patch:
            patch.setenv("MAINSAIL_TERMINATION_LOG", str(said))
            for name, value in environment.items():
                patch.setenv(name, value)
            code = main([uri, str(folder), *flags])
        told = json.loads(said.read_text()) if said.exists() else {"reason": "", "message": ""}
        return Done(code, told["reason"], told["message"], capsys.readouterr().err)

    return run


@pytest.fixture
def fetch_process(tmp_path: Path):
    """The same as a process of its own."""

    def run(uri: str, folder: Path, *flags: str, **environment: str) -> Done:
        said = tmp_path / "termination-log"
        said.unlink(missing_ok=True)
        kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
        settings = {"HOME": str(tmp_path), "MAINSAIL_TERMINATION_LOG": str(said)}
        done = subprocess.run(
            [sys.executable, "-m", "mainsail_fetch", uri, str(folder), *flags],
            env=kept | settings | environment, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        told = json.loads(said.read_text()) if said.exists() else {"reason": "", "message": ""}
        return Done(done.returncode, told["reason"], told["message"], done.stderr)

    return run
