"""Bytes through, both ways: one request to an endpoint, its answer back as it comes.

What it promises:

- **Before the first byte** of an answer a broken endpoint is replaced by another, invisibly, within the retry budget.
  An engine that answers 503 is draining: its requests go elsewhere too, and it gets no new ones for a while. Other
  statuses, 429 among them, are an engine's answers and pass.
- **After it** nothing is repeated. A stream that breaks at the border of an event ends with an error event, which
  OpenAI's clients raise; otherwise the connection is cut, so that no client takes half an answer for a whole one.
- **A client that leaves** frees its endpoint at once: the connection to it is closed, and the engine aborts.
- **Slow ends** are bounded by `Call.overdue`, which one sweep a second asks; there is no timer per chunk.

Hop-by-hop headers end here (RFC 9110, 7.6.1). The request is framed anew from the body that was read, so what a client
says about its length or encoding never reaches an engine: there is nothing to smuggle with.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal

import msgspec

from mainsail_gateway import balance
from mainsail_gateway.asgi import Headers, Receive, Send
from mainsail_gateway.balance import Load
from mainsail_gateway.errors import GatewayError, no_capacity
from mainsail_gateway.fleet import Pool, in_flight
from mainsail_gateway.metrics import ServiceMetrics
from mainsail_gateway.pod_metrics import PodMetrics
from mainsail_gateway.routes import Endpoint, Service
from mainsail_gateway.settings import Settings
from mainsail_gateway.upstream import Connection, ConnectionPool, UpstreamError

log = logging.getLogger(__name__)

HOP_BY_HOP = frozenset(
    b"connection keep-alive proxy-connection proxy-authenticate proxy-authorization te trailer transfer-encoding "
    b"upgrade".split()
)
_NOT_FORWARDED = HOP_BY_HOP | {b"host", b"content-length", b"expect", b"http2-settings"}
_NOT_RETURNED = HOP_BY_HOP | {b"date", b"server"}

MAX_ATTEMPTS = 4
CLIENT_GONE = 499
"""nginx's code for it; only in metrics."""

Phase = Literal["connecting", "waiting", "reading", "sending"]


class ClientGone(Exception):
    """Nobody is there to answer any more."""


class BrokenOff(Exception):
    """The answer had begun and cannot be finished; the client's connection is to be cut."""


@dataclass(slots=True, eq=False)
class Call:
    """A request on its way: what to send, where it stands, and whether it was broken off."""

    method: bytes
    target: bytes
    """Path and query, as the client sent them."""
    headers: Headers
    body: bytes
    model: str
    weight: int
    prefixes: Sequence[bytes]
    arrived: float
    service: Service
    sticky: str | None = None
    """Session or user: decides the revision while several have a weight."""
    pod: PodMetrics | None = None
    """The endpoint that has the request, or had it last; None: none has."""
    sent: float = 0.0
    """When it was sent there."""
    on_first: Callable[[float], None] | None = None
    """Told the time to the first chunk, when the answer is a stream."""
    deadline: float | None = None
    """By the event loop's clock: an answer that has not begun then is not wanted any more."""
    phase: Phase = "connecting"
    since: float = 0.0
    code: int = CLIENT_GONE
    abort_reason: Literal["", "client", "overdue"] = ""
    task: asyncio.Task[object] | None = field(default_factory=asyncio.current_task)

    def at(self, pod: PodMetrics) -> None:
        """The request goes to another endpoint now; the last one broke it."""
        if self.pod is not None:
            self.pod.count(502)
        self.pod = pod
        self.sent = time.monotonic()

    def enter(self, phase: Phase) -> None:
        self.phase = phase
        self.since = asyncio.get_running_loop().time()

    def abort(self, reason: Literal["client", "overdue"]) -> None:
        if not self.abort_reason and self.task is not None:
            self.abort_reason = reason
            self.task.cancel()

    def overdue(self, now: float, settings: Settings) -> bool:
        limits: dict[Phase, float] = {
            "connecting": settings.response_timeout_s,
            "waiting": settings.response_timeout_s,
            "reading": settings.idle_timeout_s,
            "sending": settings.client_timeout_s,
        }
        late = self.deadline is not None and now > self.deadline and self.phase in ("connecting", "waiting")
        return late or now - self.since > limits[self.phase]


class _Watched(AbstractAsyncContextManager[None]):
    """While inside, the client's leaving aborts the call; an abort comes out as ClientGone or as TimeoutError."""

    def __init__(self, call: Call, receive: Receive) -> None:
        self._call = call
        self._receive = receive

    async def __aenter__(self) -> None:
        self._watcher = asyncio.ensure_future(self._watch())

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._call.abort("client")

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._watcher.cancel()
        call = self._call
        if isinstance(error, asyncio.CancelledError) and call.abort_reason and call.task is not None:
            call.task.uncancel()
            if call.abort_reason == "client":
                raise ClientGone from None
            raise TimeoutError(call.phase) from None


class Relay:
    def __init__(self, connections: ConnectionPool, settings: Settings, extra_headers: Callable[[], Headers]) -> None:
        self.calls: set[Call] = set()
        self._connections = connections
        self._settings = settings
        self._extra_headers = extra_headers
        """Headers for every answer: `connection: close` while draining."""

    def sweep(self, now: float) -> None:
        """Abort what has not moved for too long. Called about once a second."""
        for call in list(self.calls):
            if call.overdue(now, self._settings):
                call.abort("overdue")

    async def forward(self, call: Call, pool: Pool, metrics: ServiceMetrics, receive: Receive, send: Send) -> None:
        """Answer `call` from one of the pool's endpoints.

        Raises GatewayError when nothing has been sent to the client yet, ClientGone, and BrokenOff."""
        call.enter("connecting")
        self.calls.add(call)
        metrics.in_flight.inc()
        pool.budget.deposit()
        try:
            async with _Watched(call, receive):
                await self._attempts(call, pool, metrics, send)
        except TimeoutError:
            raise self._overdue(call, metrics) from None
        finally:
            self.calls.discard(call)
            metrics.in_flight.dec()

    def _overdue(self, call: Call, metrics: ServiceMetrics) -> Exception:
        if call.phase == "sending":
            metrics.failure("client_timeout")
            return BrokenOff("the client takes no bytes")
        if call.deadline is not None and asyncio.get_running_loop().time() > call.deadline:
            metrics.failure("deadline")
            return GatewayError(504, "No answer began within the request's timeout.", code="deadline_exceeded")
        metrics.failure("timeout")
        message = f"No answer from a replica of `{call.model}` within {self._settings.response_timeout_s:g} s."
        return GatewayError(504, message, code="upstream_timeout")

    async def _attempts(self, call: Call, pool: Pool, metrics: ServiceMetrics, send: Send) -> None:
        tried: set[str] = set()
        failure: UpstreamError | None = None
        while (found := pool.pick(call.weight, call.prefixes, tried, time.monotonic(), call.sticky)) is not None:
            endpoint, load = found
            tried.add(endpoint.key)
            call.at(metrics.pod(endpoint))
            with in_flight(load, call.weight):
                try:
                    connection = await self._exchange(call, endpoint)
                except UpstreamError as error:
                    failure = error
                    _failed(call, endpoint, load, metrics, error)
                else:
                    if connection.status != 503 or not _elsewhere(pool, tried, metrics):
                        pool.index.learn(call.prefixes, endpoint.key)
                        await self._answer(call, connection, load, metrics, send)
                        return
                    balance.failed(load, time.monotonic(), at_once=True)
                    connection.close()
                    call.pod = None
                    continue
            if len(tried) >= MAX_ATTEMPTS or not _affordable(failure, pool, metrics):
                break
        if failure is None or failure.reason == "connect":
            raise no_capacity(call.model, self._settings.retry_after_s)
        message = f"The replica of `{call.model}` that had the request failed before it answered ({failure.reason})."
        raise GatewayError(502, message, code="upstream_failed", retry_after_s=1.0) from failure

    async def _exchange(self, call: Call, endpoint: Endpoint) -> Connection:
        """Send the request and wait for the answer's head. A connection found dead on reuse is replaced once."""
        head = _request_head(call, endpoint)
        fresh = False
        while True:
            call.enter("connecting")
            connection = await self._connections.acquire(endpoint, fresh=fresh)
            try:
                connection.request(head, call.body)
                call.enter("waiting")
                await connection.head()
                return connection
            except UpstreamError as error:
                connection.close()
                if not error.stale:
                    raise
                fresh = True
            except BaseException:
                connection.close()
                raise

    async def _answer(
        self, call: Call, connection: Connection, load: Load, metrics: ServiceMetrics, send: Send
    ) -> None:
        call.code = connection.status
        sse = _is_event_stream(connection.headers)
        ended = b"\n\n"
        try:
            call.enter("sending")
            await send({"type": "http.response.start", "status": call.code, "headers": self._head(connection)})
            more = True
            chunks = call.pod.stream(call.sent, call.on_first) if sse and call.pod is not None else None
            while more:
                call.enter("reading")
                data, more = await connection.read()
                if chunks is not None and data:
                    chunks.arrived(time.monotonic())
                ended = data[-2:] or ended
                call.enter("sending")
                await send({"type": "http.response.body", "body": data, "more_body": more})
            balance.succeeded(load)
            self._connections.release(connection)
        except (UpstreamError, asyncio.CancelledError) as error:
            connection.close()
            await _broken(call, error, load, metrics, send, whole=sse and ended == b"\n\n")
        except BaseException:
            connection.close()
            raise

    def _head(self, connection: Connection) -> Headers:
        dropped = _NOT_RETURNED | _connection_options(connection.headers)
        headers = [header for header in connection.headers if header[0] not in dropped] + self._extra_headers()
        if connection.status in (429, 503) and not any(name == b"retry-after" for name, _ in headers):
            headers.append((b"retry-after", b"%d" % max(1, round(self._settings.retry_after_s))))
        return headers


async def _broken(
    call: Call,
    error: UpstreamError | asyncio.CancelledError,
    load: Load,
    metrics: ServiceMetrics,
    send: Send,
    *,
    whole: bool,
) -> None:
    """An answer broke after it had begun. `whole`: at the border of an event."""
    stalled = isinstance(error, asyncio.CancelledError)
    if stalled and (call.abort_reason != "overdue" or call.phase != "reading"):
        raise error
    if stalled and call.task is not None:
        call.task.uncancel()
    reason = "stalled" if stalled else "truncated"
    metrics.failure(reason)
    balance.failed(load, time.monotonic())
    log.warning("%s/%s: an answer was %s after it had begun", *call.service.key, reason)
    if not whole:
        raise BrokenOff(reason) from error
    call.code = 504 if stalled else 502
    message = f"The replica of `{call.model}` that had the request failed in the middle of its answer ({reason})."
    event = {"error": {"message": message, "type": "server_error", "param": None, "code": "stream_broken"}}
    body = b"data: " + msgspec.json.encode(event) + b"\n\n"
    await send({"type": "http.response.body", "body": body, "more_body": False})


def _failed(call: Call, endpoint: Endpoint, load: Load, metrics: ServiceMetrics, error: UpstreamError) -> None:
    balance.failed(load, time.monotonic())
    metrics.failure(error.reason)
    log.warning("%s/%s: pod %s at %s: %s", *call.service.key, endpoint.pod, endpoint.host, error)


def _elsewhere(pool: Pool, tried: set[str], metrics: ServiceMetrics) -> bool:
    """After a 503: whether another endpoint is there and the budget allows to ask it."""
    if len(tried) >= MAX_ATTEMPTS or not (pool.loads.keys() - tried) or not pool.budget.withdraw(time.monotonic()):
        return False
    metrics.retry("draining")
    return True


def _affordable(failure: UpstreamError, pool: Pool, metrics: ServiceMetrics) -> bool:
    """A refused connection added no load; every other failure pays for its retry."""
    if failure.reason != "connect" and not pool.budget.withdraw(time.monotonic()):
        return False
    metrics.retry(failure.reason)
    return True


def _request_head(call: Call, endpoint: Endpoint) -> bytes:
    host = f"[{endpoint.host}]" if ":" in endpoint.host else endpoint.host
    dropped = _NOT_FORWARDED | _connection_options(call.headers)
    lines = [b"%b %b HTTP/1.1\r\nhost: %b:%d\r\n" % (call.method, call.target, host.encode(), endpoint.port)]
    lines += [b"%b: %b\r\n" % header for header in call.headers if header[0] not in dropped]
    lines.append(b"content-length: %d\r\n\r\n" % len(call.body))
    return b"".join(lines)


def _connection_options(headers: Headers) -> set[bytes]:
    """Headers that `Connection` names, which are between two hops only."""
    named: set[bytes] = set()
    for name, value in headers:
        if name == b"connection":
            named.update(option.strip().lower() for option in value.split(b","))
    return named


def _is_event_stream(headers: Headers) -> bool:
    return any(name == b"content-type" and value.lower().startswith(b"text/event-stream") for name, value in headers)
