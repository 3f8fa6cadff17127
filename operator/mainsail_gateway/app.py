"""The ASGI application: which paths there are, bodies within their limits, every error in OpenAI's form."""

from __future__ import annotations

import asyncio
import logging

import msgspec

from mainsail_gateway.asgi import Headers, Message, Receive, Scope, Send
from mainsail_gateway.balance import Load
from mainsail_gateway.errors import GatewayError, no_capacity, send_error, too_large, unknown_model
from mainsail_gateway.metrics import Metrics
from mainsail_gateway.relay import Relay
from mainsail_gateway.request import parse
from mainsail_gateway.routes import Routes, Service, Table
from mainsail_gateway.settings import Settings

log = logging.getLogger(__name__)


class App:
    def __init__(self, settings: Settings, routes: Routes, metrics: Metrics) -> None:
        self._settings = settings
        self._routes = routes
        self._metrics = metrics
        self._load = Load()
        self._relay: Relay | None = None

    @property
    def relay(self) -> Relay:
        if self._relay is None:
            self._relay = Relay(self._settings, self._load, self._metrics)
        return self._relay

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        try:
            await self._route(scope, receive, send)
        except GatewayError as error:
            await send_error(send, error, [])

    async def close(self) -> None:
        if self._relay is not None:
            await self._relay.close()

    async def _route(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, method = scope["path"], scope["method"]
        if path == "/v1/models" or path.startswith("/v1/models/"):
            _only("GET", method)
            await _send_json(send, models(self._routes.table, path.removeprefix("/v1/models").strip("/")))
        elif path in ("/health", "/health/ready"):
            await _send_json(send, {"status": "ok"})
        elif path.startswith("/v1/") or path in ("/tokenize", "/detokenize"):
            _only("POST", method)
            await self._forward(scope, receive, send)
        else:
            raise GatewayError(404, f"There is no {method} {path} here.", code="unknown_path")

    async def _forward(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers: Headers = scope["headers"]
        body = await self._body(receive, headers)
        parsed = parse(body)
        service = self._service(parsed.model)
        code = 500
        with self._metrics.in_flight.labels(parsed.model).track_inprogress():
            try:
                code = await self.relay.answer(_target(scope), headers, body, parsed, service, receive, send)
            except GatewayError as error:
                code = error.status
                raise
            finally:
                self._metrics.requests.labels(parsed.model, str(code)).inc()

    def _service(self, model: str) -> Service:
        table = self._routes.table
        service = table.services.get(model)
        if service is None:
            if not self._routes.synced:
                raise no_capacity(model, self._settings.retry_after_s)
            raise unknown_model(model)
        return service

    async def _body(self, receive: Receive, headers: Headers) -> bytes:
        """The whole body. Raises 413 over the limit (before reading it, where the length is told), 408 when too slow."""
        limit = self._settings.max_body_bytes
        told = next((value for name, value in headers if name == b"content-length"), b"0")
        if told.isdigit() and int(told) > limit:
            raise too_large(limit)
        parts, size = list[bytes](), 0
        try:
            async with asyncio.timeout(self._settings.body_timeout_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise GatewayError(499, "The client went away.", code="client_closed_request")
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > limit:
                        raise too_large(limit)
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            raise GatewayError(408, "The request's body did not arrive in time.", code="request_timeout") from None


def models(table: Table, name: str) -> object:
    """OpenAI's model list, or one model of it. Raises 404 for an unknown one."""
    cards = {
        model: {"id": model, "object": "model", "created": service.created, "owned_by": "mainsail"}
        for model, service in sorted(table.services.items())
    }
    if not name:
        return {"object": "list", "data": list(cards.values())}
    if name not in cards:
        raise unknown_model(name)
    return cards[name]


def _target(scope: Scope) -> str:
    query: bytes = scope.get("query_string", b"")
    raw: bytes = scope.get("raw_path") or scope["path"].encode()
    return raw.decode("latin-1") + (f"?{query.decode('latin-1')}" if query else "")


def _only(wanted: str, method: str) -> None:
    if method != wanted:
        allow: Headers = [(b"allow", wanted.encode())]
        raise GatewayError(405, f"Use {wanted} here.", code="method_not_allowed", headers=allow)


async def _send_json(send: Send, value: object) -> None:
    body = msgspec.json.encode(value)
    headers: Headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    start: Message = {"type": "http.response.start", "status": 200, "headers": headers}
    await send(start)
    await send({"type": "http.response.body", "body": body})
