"""Pure ASGI middleware: the name of a request, the bound on bodies, the key, and the count of requests in progress.

Starlette's BaseHTTPMiddleware would run the application behind a queue and hide disconnects from it.
"""

from __future__ import annotations

import contextlib
import hmac
import re
import time
import uuid
from collections.abc import Awaitable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mainsail_engine.errors import RequestError
from mainsail_engine.metrics import Metrics
from mainsail_engine.server.board import Board
from mainsail_engine.server.errors import error_response

MAX_BODY_BYTES = 8 * 2**20
"""A prompt of a million tokens as ids fits; nothing sensible is larger."""
_ARRIVAL = "mainsail.arrival_s"
OPEN_PATHS = ("/health", "/metrics", "/version")


REQUEST_ID = b"x-request-id"
_ID = re.compile(rb"[!-~]{1,128}")


class _TooLargeError(Exception):
    """The body outgrew the bound while it was read."""


def arrival_s(scope: Scope) -> float:
    """Monotonic time at which the request's head had been read."""
    return scope[_ARRIVAL]


class RequestId:
    """Every answer says which request it answers: by the name that the request came with, or a new one."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = next((value for name, value in scope["headers"] if name == REQUEST_ID), b"")
        header = (REQUEST_ID, given if _ID.fullmatch(given) else b"req_" + uuid.uuid4().hex.encode())

        def naming_send(message: Message) -> Awaitable[None]:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), header]}
            return send(message)

        await self._app(scope, receive, naming_send)


class BodyLimit:
    """413 for a body above the bound, whether or not its length was announced."""

    def __init__(self, app: ASGIApp, limit_bytes: int = MAX_BODY_BYTES) -> None:
        self._app = app
        self._limit = limit_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if self._announced(scope) > self._limit:
            await self._refuse(scope, receive, send)
            return
        seen, answering = 0, False

        async def counting_receive() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._limit:
                raise _TooLargeError
            return message

        async def noting_send(message: Message) -> None:
            nonlocal answering
            if seen > self._limit and not answering:
                return  # the application's own view of a body that was cut short: refused below
            answering = True
            await send(message)

        with contextlib.suppress(_TooLargeError):
            await self._app(scope, counting_receive, noting_send)
        if seen > self._limit and not answering:
            await self._refuse(scope, receive, send)

    def _announced(self, scope: Scope) -> int:
        values = [value for name, value in scope["headers"] if name == b"content-length"]
        return int(values[0]) if values and values[0].isdigit() else 0

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        message = f"the body is larger than {self._limit} bytes"
        response = error_response(RequestError(message, status=413, code="body_too_large"))
        response.headers["connection"] = "close"
        await response(scope, receive, send)


class ApiKey:
    """401 without the right bearer token; probes and metrics stay open."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app = app
        self._expected = f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._is_open(scope["path"]) or self._is_right(scope):
            await self._app(scope, receive, send)
            return
        error = RequestError("a valid key is needed: Authorization: Bearer …", status=401, code="invalid_api_key")
        await error_response(error)(scope, receive, send)

    def _is_open(self, path: str) -> bool:
        return any(path == known or path.startswith(f"{known}/") for known in OPEN_PATHS)

    def _is_right(self, scope: Scope) -> bool:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        return len(given) == 1 and hmac.compare_digest(given[0], self._expected)


class InProgress:
    """How many HTTP requests are being answered on the endpoints that generate: what a drain waits for."""

    def __init__(self, app: ASGIApp, board: Board) -> None:
        self._app = app
        self._board = board
        self._count = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            await self._app(scope, receive, send)
            return
        self._change(1)
        try:
            await self._app(scope, receive, send)
        finally:
            self._change(-1)

    def _change(self, by: int) -> None:
        self._count += by
        self._board.set("in_progress", self._count)


class HttpMetrics:
    """Counts and times what is answered; probes and scrapes do not count. Notes when a request arrived."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith(OPEN_PATHS):
            await self._app(scope, receive, send)
            return
        began_s, status = time.monotonic(), 499
        scope[_ARRIVAL] = began_s

        async def noting_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noting_send)
        finally:
            self._metrics.http(scope["path"], scope["method"], status, time.monotonic() - began_s)
