"""One request to an engine and its answer back, as bytes.

Until an engine has sent the head of its answer nothing has reached the client, so a replica that refuses the connection,
breaks it or says that it is draining (503) is replaced by another, each one once. Afterwards chunks pass as they come, one
for one. A client that goes away cancels the engine's work at once; an engine that breaks off a stream ends it with an
error event in OpenAI's form.
"""

from __future__ import annotations

import asyncio
import logging
import time

import aiohttp
from multidict import CIMultiDict

from mainsail_gateway.asgi import Headers, Receive, Send
from mainsail_gateway.balance import Load, pick
from mainsail_gateway.errors import GatewayError, no_capacity
from mainsail_gateway.metrics import Metrics
from mainsail_gateway.request import Parsed
from mainsail_gateway.routes import Endpoint, Service
from mainsail_gateway.settings import Settings

log = logging.getLogger(__name__)

HOP_BY_HOP = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization te trailer transfer-encoding upgrade".split()
)
_NOT_FORWARDED = HOP_BY_HOP | {b"host", b"content-length", b"expect"}
_ATTEMPTS = 3


def forwarded(headers: Headers) -> CIMultiDict[str]:
    """The client's headers for the engine: all but those of the one hop, and those that `connection` names."""
    named = {token.strip().lower() for name, value in headers if name == b"connection" for token in value.split(b",")}
    kept: CIMultiDict[str] = CIMultiDict()
    for name, value in headers:
        if name not in _NOT_FORWARDED and name not in named:
            kept.add(name.decode("latin-1"), value.decode("latin-1"))
    return kept


class Relay:
    def __init__(self, settings: Settings, load: Load, metrics: Metrics) -> None:
        self._settings = settings
        self._load = load
        self._metrics = metrics
        timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=settings.connect_timeout_s, sock_read=settings.response_timeout_s
        )
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=settings.upstream_idle_s, use_dns_cache=False)
        self._session = aiohttp.ClientSession(
            connector=connector, timeout=timeout, auto_decompress=False, cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=("user-agent", "accept", "accept-encoding", "content-type"),
        )  # fmt: skip

    async def close(self) -> None:
        await self._session.close()

    async def answer(
        self, path: str, headers: Headers, body: bytes, parsed: Parsed, service: Service, receive: Receive, send: Send
    ) -> int:
        """Relay the request to one of the service's endpoints; returns the status that the client got.

        Raises GatewayError while nothing has been sent to the client. Returns 499 when the client went away.
        """
        work = asyncio.ensure_future(self._relay(path, headers, body, parsed, service, send))
        gone = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            return await work if work.done() else 499
        finally:
            for task in (work, gone):
                task.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)

    async def _relay(
        self, path: str, headers: Headers, body: bytes, parsed: Parsed, service: Service, send: Send
    ) -> int:
        tried: list[Endpoint] = []
        started = time.monotonic()
        upstream_headers = forwarded(headers)
        while len(tried) < _ATTEMPTS:
            endpoint = pick(service.endpoints, self._load, tried)
            if endpoint is None:
                break
            if tried:
                self._metrics.retries.labels(parsed.model).inc()
            tried.append(endpoint)
            self._load.started(endpoint, parsed.weight)
            try:
                status = await self._try(endpoint, path, upstream_headers, body, parsed, send, started)
                if status is not None:
                    return status
            finally:
                self._load.ended(endpoint, parsed.weight)
        raise no_capacity(parsed.model, self._settings.retry_after_s)

    async def _try(
        self, endpoint: Endpoint, path: str, headers: CIMultiDict[str], body: bytes, parsed: Parsed, send: Send,
        started: float,
    ) -> int | None:  # fmt: skip
        """One attempt. None: this endpoint cannot answer, and nothing has reached the client."""
        try:
            response = await self._session.post(
                endpoint.base_url + path, data=body, headers=headers, allow_redirects=False
            )
        except aiohttp.SocketTimeoutError as error:
            if isinstance(error, aiohttp.ConnectionTimeoutError):
                return None
            raise GatewayError(504, "The engine did not answer in time.", code="engine_timeout") from error
        except (aiohttp.ClientError, OSError) as error:
            log.info("%s: %s", endpoint.base_url, error)
            return None
        try:
            if response.status == 503:
                return None
            self._metrics.first_byte.labels(parsed.model).observe(time.monotonic() - started)
            await self._pass(response, parsed, send)
            return response.status
        finally:
            response.close()

    async def _pass(self, response: aiohttp.ClientResponse, parsed: Parsed, send: Send) -> None:
        """Head and chunks of an answer, as they come."""
        head = [
            (name.lower(), value) for name, value in response.raw_headers
            if name.lower() not in HOP_BY_HOP or name.lower() == b"content-length"
        ]  # fmt: skip
        await send({"type": "http.response.start", "status": response.status, "headers": head})
        streams = response.content_type == "text/event-stream"
        try:
            async for chunk in response.content.iter_any():
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        except (aiohttp.ClientError, OSError) as error:
            self._metrics.broken.labels(parsed.model).inc()
            log.warning("an answer of %s broke off: %s", parsed.model, error)
            if not streams:
                raise  # the server closes the connection: the client sees that the body is not whole
            broken = GatewayError(502, "The engine broke off the answer.", code="engine_failed")
            await send({"type": "http.response.body", "body": b"data: " + broken.body() + b"\n\n", "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
