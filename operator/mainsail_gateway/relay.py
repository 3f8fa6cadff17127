"""Bytes through, both ways: one request to an endpoint, its answer back as it comes.

What it promises:

- **Before the first byte** of an answer a broken endpoint is replaced by another, invisibly, within the retry budget.
  An engine that answers 503 is draining: its requests go elsewhere too, and it gets no new ones for a while. Other
  statuses, 429 among them, are an engine's answers and pass.
- **After it** a stream goes on at another endpoint from the tokens that the client has (`journal.py`), within a budget
  of its own and not for ever: a request that breaks engine after engine is not let loose on all of them. An answer that
  is not streamed is kept until it is whole, and so is simply asked for again. Where neither can be, a stream that
  breaks at the border of an event ends with an error event, which OpenAI's clients raise; otherwise the connection
  is cut, so that no client takes half an answer for a whole one.
- **A client that leaves** frees its endpoint at once: the connection to it is closed, and the engine aborts.
- **Slow ends** are bounded by `Call.overdue`, which one sweep a second asks; there is no timer per chunk.

Hop-by-hop headers end here (RFC 9110, 7.6.1). The request is framed anew from the body that was read, so what a client
says about its length or encoding never reaches an engine: there is nothing to smuggle with.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal

from mainsail_gateway import balance
from mainsail_gateway.asgi import Headers, OnGone, Receive, Send
from mainsail_gateway.balance import Load, Prefix
from mainsail_gateway.errors import GatewayError, no_capacity, out_of_sockets
from mainsail_gateway.fleet import Flight, Picked, Pool
from mainsail_gateway.journal import OWN_HEADERS, RESUME_HEADER, STREAM_HEADER, Journal
from mainsail_gateway.kv_index import BLOCKS_HEADER, Blocks
from mainsail_gateway.metrics import ServiceMetrics
from mainsail_gateway.pod_metrics import PodMetrics
from mainsail_gateway.routes import Endpoint, Service
from mainsail_gateway.sessions import Session
from mainsail_gateway.settings import Settings
from mainsail_gateway.split import Sticky
from mainsail_gateway.upstream import Connection, ConnectionPool, UpstreamError

log = logging.getLogger(__name__)

HOP_BY_HOP = frozenset(
    b"connection keep-alive proxy-connection proxy-authenticate proxy-authorization te trailer transfer-encoding "
    b"upgrade".split()
)
_NOT_FORWARDED = HOP_BY_HOP | OWN_HEADERS | {b"host", b"content-length", b"expect", b"http2-settings"}
_NOT_RETURNED = HOP_BY_HOP | {b"date", b"server"}

MAX_ATTEMPTS = 4
"""Endpoints that a request may be sent to before one answers."""
MAX_FAILOVERS = 3
"""Times that an answer may break after it had begun."""
BUFFER_BYTES = 4 << 20
"""An answer that is not streamed is kept back until it is whole, up to this size."""
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
    prefixes: Sequence[Prefix]
    prompt_tokens: int
    """The prompt's part of the weight."""
    arrived: float
    service: Service
    sticky: Sticky | None = None
    """Session or user: decides the revision while several have a weight."""
    session: Session | None = None
    """The conversation that it is a turn of."""
    places: Collection[str] | None = None
    """The endpoints where its turn belongs; None: all alike."""
    answer_tokens: int = 0
    """Of the answer so far, by the pieces of its stream."""
    pod: PodMetrics | None = None
    """The endpoint that has the request, or had it last; None: none has."""
    sent: float = 0.0
    """When it was sent there."""
    on_first: Callable[[float], None] | None = None
    """Told the time to the first chunk, when the answer is a stream."""
    deadline: float | None = None
    """By the event loop's clock: an answer that has not begun then is not wanted any more."""
    stream: bool = False
    on_gone: OnGone | None = None
    """Tells when the client has left; None: whoever asks for its next message hears it."""
    once: bool = False
    """The client does not want its request to run twice."""
    started: bool = False
    """The client has the head of an answer."""
    journal: Journal | None = None
    """What it has of a stream that can be resumed."""
    failovers: int = 0
    revision: str | None = None
    """Which one began the answer that broke."""
    phase: Phase = "connecting"
    since: float = 0.0
    code: int = CLIENT_GONE
    abort_reason: Literal["", "client", "overdue"] = ""
    task: asyncio.Task[object] | None = field(default_factory=asyncio.current_task)

    def where(self) -> dict[str, str]:
        """Who has the request, or had it last."""
        return {"revision": self.pod.key[2], "pod": self.pod.key[3]} if self.pod is not None else {}

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
        self._watcher: asyncio.Future[None] | None = None
        if self._call.on_gone is not None:
            self._call.on_gone(self._left)
        else:
            self._watcher = asyncio.ensure_future(self._watch())

    def _left(self) -> None:
        self._call.abort("client")

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._left()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        call = self._call
        if call.on_gone is not None:
            call.on_gone(None)
        if self._watcher is not None:
            self._watcher.cancel()
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
        pool.failovers.deposit()
        try:
            await self._watched(call, pool, metrics, receive, send)
        except GatewayError as error:
            if not call.started:
                raise
            await self._end_with_error(call, error, send)
        finally:
            self.calls.discard(call)
            metrics.in_flight.dec()

    async def _watched(self, call: Call, pool: Pool, metrics: ServiceMetrics, receive: Receive, send: Send) -> None:
        try:
            async with _Watched(call, receive):
                await self._attempts(call, pool, metrics, send)
        except TimeoutError:
            raise self._overdue(call, metrics) from None

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

    async def _end_with_error(self, call: Call, error: GatewayError, send: Send) -> None:
        """The last event of a stream that nobody could finish. The client has whole events only."""
        call.code = error.status
        body = b"data: " + error.body() + b"\n\n"
        try:
            async with asyncio.timeout(self._settings.client_timeout_s):
                await send({"type": "http.response.body", "body": body, "more_body": False})
        except TimeoutError:
            raise BrokenOff("the client takes no bytes") from None

    async def _attempts(self, call: Call, pool: Pool, metrics: ServiceMetrics, send: Send) -> None:
        tried: set[str] = set()
        failure: UpstreamError | None = None
        while (found := _pick(call, pool, tried)) is not None:
            endpoint, load, _ = found
            tried.add(endpoint.key)
            call.at(metrics.pod(endpoint))
            answering = False
            with pool.in_flight(found, call.prefixes) as flight:
                try:
                    connection = await self._exchange(call, endpoint)
                    if connection.status == 503 and _elsewhere(call, pool, tried, metrics):
                        balance.failed(load, time.monotonic(), at_once=True)
                        connection.close()
                        call.pod = None
                        continue
                    _must_take_over(call, connection)
                    pool.index.learn(call.prefixes, endpoint.key)
                    _learn(call, pool, connection)
                    answering = True
                    await self._answer(call, connection, load, metrics, send, flight)
                    return
                except UpstreamError as error:
                    failure = error
                    _failed(call, endpoint, load, metrics, error)
            if answering:
                call.revision = endpoint.revision
            if failure.reason == "exhausted":
                break
            if answering or (call.started and failure.reason not in ("connect", "refused")):
                if not _goes_on(call, pool, failure, metrics):
                    break
                # Alone, it may have lost just this connection: better asked again than not at all.
                tried = {endpoint.key} if pool.loads.keys() - {endpoint.key} else set()
            elif len(tried) >= MAX_ATTEMPTS or not _affordable(call, failure, pool, metrics):
                break
        raise self._gave_up(call, failure) from failure

    def _gave_up(self, call: Call, failure: UpstreamError | None) -> GatewayError:
        if call.started and failure is not None:
            message = f"The replica of `{call.model}` that had the request failed in the middle of its answer"
            return GatewayError(502, f"{message} ({failure.reason}), and no other could go on.", code="stream_broken")
        if failure is not None and failure.reason == "exhausted":
            return out_of_sockets(call.model)
        if failure is None or failure.reason == "connect":
            return no_capacity(call.model, self._settings.retry_after_s)
        message = f"The replica of `{call.model}` that had the request failed before it answered ({failure.reason})."
        return GatewayError(502, message, code="upstream_failed", retry_after_s=1.0)

    async def _exchange(self, call: Call, endpoint: Endpoint) -> Connection:
        """Send the request and wait for the answer's head. A connection found dead on reuse is replaced once."""
        head, body = _request(call, endpoint)
        fresh = False
        while True:
            call.enter("connecting")
            connection = await self._connections.acquire(endpoint, fresh=fresh)
            try:
                connection.request(head, body)
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
        self, call: Call, connection: Connection, load: Load, metrics: ServiceMetrics, send: Send, flight: Flight
    ) -> None:
        """Pass an answer on. Raises UpstreamError when it broke, and can be asked for again or resumed."""
        sse = _is_event_stream(connection.headers)
        journal = call.journal = _journal(call, connection) if sse else None
        ended = b"\n\n"
        try:
            piece = None if sse or call.started else await self._gather(call, connection)
            on_first = None if call.started else call.on_first
            await self._start(call, connection, send)
            if sse:
                flight.answering()
            more = True
            chunks = call.pod.stream(call.sent, on_first) if sse and call.pod is not None else None
            while more:
                call.enter("reading")
                data, more = piece or await connection.read()
                piece = None
                if chunks is not None and data:
                    chunks.arrived(time.monotonic())
                    call.answer_tokens += 1
                if journal is not None:
                    data = journal.feed(data)
                ended = data[-2:] or ended
                last = not more and (journal is None or journal.complete)
                if data or last:
                    call.enter("sending")
                    await send({"type": "http.response.body", "body": data, "more_body": not last})
                if not more and journal is not None:
                    journal.end()
            balance.succeeded(load)
            self._connections.release(connection)
        except (UpstreamError, asyncio.CancelledError) as error:
            connection.close()
            broken = _broken(call, error)
            if journal is not None and journal.complete:
                await send({"type": "http.response.body", "body": b"", "more_body": False})
            elif journal is not None or not call.started:
                raise broken from error
            else:
                _failed(call, connection.endpoint, load, metrics, broken)
                await self._cut(call, broken, whole=sse and ended == b"\n\n", send=send)
        except BaseException:
            connection.close()
            raise

    async def _gather(self, call: Call, connection: Connection) -> tuple[bytes, bool]:
        """An answer that is not streamed, as a whole; the beginning of one that is too large to keep."""
        parts: list[bytes] = []
        more = True
        while more and sum(map(len, parts)) <= BUFFER_BYTES:
            call.enter("reading")
            data, more = await connection.read()
            parts.append(data)
        return b"".join(parts), more

    async def _start(self, call: Call, connection: Connection, send: Send) -> None:
        """The answer's head, once: who goes on with an answer has nothing to say there."""
        if call.started:
            return
        call.code = connection.status
        call.enter("sending")
        call.started = True
        await send({"type": "http.response.start", "status": call.code, "headers": self._head(connection)})

    async def _cut(self, call: Call, error: UpstreamError, *, whole: bool, send: Send) -> None:
        """End an answer that cannot be resumed. `whole`: it broke at the border of an event."""
        if not whole:
            raise BrokenOff(error.reason) from error
        message = f"The replica of `{call.model}` that had the request failed in the middle of its answer"
        status = 504 if error.reason == "stalled" else 502
        await self._end_with_error(
            call, GatewayError(status, f"{message} ({error.reason}).", code="stream_broken"), send
        )

    def _head(self, connection: Connection) -> Headers:
        dropped = _NOT_RETURNED | OWN_HEADERS | _connection_options(connection.headers)
        headers = [header for header in connection.headers if header[0] not in dropped] + self._extra_headers()
        if connection.status in (429, 503) and not any(name == b"retry-after" for name, _ in headers):
            headers.append((b"retry-after", b"%d" % max(1, round(self._settings.retry_after_s))))
        return headers


def _pick(call: Call, pool: Pool, tried: set[str]) -> Picked | None:
    found = pool.pick(
        call.prompt_tokens, call.prefixes, tried, time.monotonic(), call.sticky, call.revision, call.places
    )  # fmt: skip
    if found is not None and call.session is not None:
        pool.sessions.begin(call.session, found.endpoint.key)
    return found


def _learn(call: Call, pool: Pool, connection: Connection) -> None:
    """What the engine says of the prompt: its tokens, and the blocks that they fill."""
    value = next((value for name, value in connection.headers if name == BLOCKS_HEADER), None)
    blocks = Blocks.told(value) if value is not None else None
    if blocks is not None:
        pool.kv.learn(call.prefixes, blocks, call.prompt_tokens)
        if call.session is not None:
            pool.sessions.measured(call.session, blocks.tokens, call.prompt_tokens)


def _journal(call: Call, connection: Connection) -> Journal | None:
    """What is known of the answer so far, or a new journal; None when this engine's answer cannot be followed."""
    journal = Journal.of(connection.headers)
    if call.journal is None or call.journal.empty or journal is None:
        return journal
    call.journal.broken()
    return call.journal


def _must_take_over(call: Call, connection: Connection) -> None:
    """Whoever is to go on with an answer answers in the side form, or not at all."""
    if call.started and (connection.status != 200 or Journal.of(connection.headers) is None):
        connection.close()
        raise UpstreamError("refused", f"an engine answered {connection.status} to a resumed stream")


def _broken(call: Call, error: UpstreamError | asyncio.CancelledError) -> UpstreamError:
    """Why an answer broke. A cancellation that is not the sweep's verdict on a silent endpoint goes on its way."""
    if isinstance(error, UpstreamError):
        return error
    if call.abort_reason != "overdue" or call.phase != "reading" or call.task is None:
        raise error
    call.task.uncancel()
    call.abort_reason = ""
    return UpstreamError("stalled", "no bytes for too long")


def _goes_on(call: Call, pool: Pool, failure: UpstreamError, metrics: ServiceMetrics) -> bool:
    """Whether an answer that broke may be resumed, or asked for again, elsewhere."""
    call.failovers += 1
    if call.once or call.failovers > MAX_FAILOVERS or not pool.failovers.withdraw(time.monotonic()):
        return False
    metrics.failover(failure.reason)
    return True


def _failed(call: Call, endpoint: Endpoint, load: Load, metrics: ServiceMetrics, error: UpstreamError) -> None:
    if error.reason != "exhausted":
        balance.failed(load, time.monotonic(), at_once=error.reason == "handover")
    metrics.failure(error.reason)
    log.warning("%s/%s: pod %s at %s: %s", *call.service.key, endpoint.pod, endpoint.host, error)


def _elsewhere(call: Call, pool: Pool, tried: set[str], metrics: ServiceMetrics) -> bool:
    """After a 503: whether another endpoint is there and the budget allows to ask it."""
    if len(tried) >= MAX_ATTEMPTS or not (pool.loads.keys() - tried):
        return False
    if not _paid(call, pool):
        return False
    metrics.retry("draining")
    return True


def _paid(call: Call, pool: Pool) -> bool:
    """Pay for one more attempt. A resumed stream has paid. What one engine lost without having answered may, beyond the
    budget for retries, draw on that for fail-overs while the others work; where most fail, retries stay a tenth."""
    now = time.monotonic()
    return call.started or pool.budget.withdraw(now) or (pool.sound(now) and pool.failovers.withdraw(now))


def _affordable(call: Call, failure: UpstreamError, pool: Pool, metrics: ServiceMetrics) -> bool:
    """A refused connection added no load; every other failure pays for its retry."""
    if failure.reason != "connect" and (call.once or not _paid(call, pool)):
        return False
    metrics.retry(failure.reason)
    return True


def _request(call: Call, endpoint: Endpoint) -> tuple[bytes, bytes]:
    """Head and body for an engine. Of an answer that has begun, what was delivered stands before the body."""
    host = f"[{endpoint.host}]" if ":" in endpoint.host else endpoint.host
    dropped = _NOT_FORWARDED | _connection_options(call.headers)
    lines = [b"%b %b HTTP/1.1\r\nhost: %b:%d\r\n" % (call.method, call.target, host.encode(), endpoint.port)]
    lines += [b"%b: %b\r\n" % header for header in call.headers if header[0] not in dropped]
    body = call.body
    if call.stream and not call.once:
        lines.append(b"%b: ids\r\n" % STREAM_HEADER)
    if endpoint.kv_events is not None:
        lines.append(b"%b: tell\r\n" % BLOCKS_HEADER)
    if call.journal is not None and not call.journal.empty:
        resume = call.journal.resume(time.monotonic() - call.arrived)
        lines.append(b"%b: %d\r\n" % (RESUME_HEADER, len(resume)))
        body = resume + body
    lines.append(b"content-length: %d\r\n\r\n" % len(body))
    return b"".join(lines), body


def _connection_options(headers: Headers) -> set[bytes]:
    """Headers that `Connection` names, which are between two hops only."""
    named: set[bytes] = set()
    for name, value in headers:
        if name == b"connection":
            named.update(option.strip().lower() for option in value.split(b","))
    return named


def _is_event_stream(headers: Headers) -> bool:
    return any(name == b"content-type" and value.lower().startswith(b"text/event-stream") for name, value in headers)
