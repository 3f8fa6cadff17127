"""HTTP/1.1 connections to endpoints: kept alive, pooled, and as thin as a stream of tokens wants.

A `Connection` is an asyncio protocol over httptools' parser. It carries one exchange at a time: `request` writes the
head and the body, `head` waits for the answer's head, `read` gives what has arrived of its body since, without framing,
and says whether that was the end. Bytes are handed on as they come; nothing is parsed beyond HTTP. Reading pauses when
the consumer is slow. A connection goes back to the pool only after a clean end; everything else closes it, which
is also how an engine learns that nobody waits for an answer any more.
"""

import asyncio
import contextlib
import errno
import socket
import sys
from collections import defaultdict, deque
from collections.abc import Callable
from typing import Literal, cast

import httptools

from mainsail_gateway.asgi import Headers
from mainsail_gateway.routes import Endpoint

HIGH_WATER_BYTES = 256 * 1024
MAX_HEAD_BYTES = 64 * 1024

OWN_SHORTAGE = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL))
"""Errors of `connect` that say nothing of who was to be reached."""

Reason = Literal["connect", "reset", "garbage", "truncated", "stalled", "handover", "refused", "exhausted"]


class UpstreamError(Exception):
    """An exchange that an endpoint broke.

    `reason`: `connect` (nothing was sent), `reset` (closed before the answer's first byte), `garbage` (not HTTP),
    `truncated` (closed within the answer), `stalled` (no bytes for too long within the answer), `handover` (the engine
    itself asks for another to go on), `refused` (it would not take over what another began), `exhausted` (this process
    has no file, port or memory for a connection: nobody else's fault). `stale`: the connection had been idle and was
    found closed; the request was most likely never read.
    """

    def __init__(self, reason: Reason, detail: str, *, stale: bool = False) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason: Reason = reason
        self.stale = stale


class Connection(asyncio.Protocol):
    def __init__(self, endpoint: Endpoint, on_lost: Callable[["Connection"], None]) -> None:
        self.endpoint = endpoint
        self._on_lost = on_lost
        self.reused = False
        self.idle_since = 0.0
        self.status = 0
        self.headers: Headers = []
        self._transport: asyncio.Transport | None = None
        self._lost: str | None = None
        self._reset()

    def _reset(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._chunks: list[bytes] = []
        self._buffered = 0
        self._paused = False
        self._head_bytes = 0
        self._started = False
        self._head_done = False
        self._done = False
        self._excess = False
        self._framed = False
        self._keep_alive = False
        self._error: UpstreamError | None = None
        self._waiter: asyncio.Future[None] | None = None

    # What the relay calls.

    @property
    def open(self) -> bool:
        return self._transport is not None and self._lost is None and not self._transport.is_closing()

    def request(self, head: bytes, body: bytes) -> None:
        if self._transport is None or self._lost is not None:
            raise UpstreamError("reset", "the connection was closed while idle", stale=self.reused)
        self._reset()
        if len(body) < 65536:
            self._transport.write(head + body)
        else:
            self._transport.write(head)
            self._transport.write(body)

    async def head(self) -> None:
        """Wait for the answer's head: `status` and `headers`."""
        while not self._head_done:
            await self._wait()

    async def read(self) -> tuple[bytes, bool]:
        """What has arrived of the body (something, unless it is the end), and whether more follows."""
        while not self._chunks and not self._done:
            await self._wait()
        chunks = self._chunks
        data = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        self._chunks = []
        self._buffered = 0
        if self._paused and self._transport is not None:
            self._paused = False
            self._transport.resume_reading()
        return data, not self._done

    @property
    def reusable(self) -> bool:
        return self._done and self._keep_alive and not self._chunks and self.open

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    async def _wait(self) -> None:
        if self._error is not None:
            raise self._error
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _fail(self, reason: Reason, detail: str) -> None:
        if self._error is None and not self._done:
            stale = reason == "reset" and self.reused
            self._error = UpstreamError(reason, detail, stale=stale)
        self.close()
        self._wake()

    # What the event loop calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none of asyncio's classes
        sock = transport.get_extra_info("socket")
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                # A node that vanished sends no reset: its streams are to go on elsewhere after some 20 s. Probes find
                # it out where nothing is under way; where a request was just sent, the bound on what stays unconfirmed.
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 8)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 4)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 20_000)

    def data_received(self, data: bytes) -> None:
        if self._done or self._error is not None:
            # Bytes after the end, or on an idle connection: nothing we asked for may be in them.
            self._keep_alive = False
            self.close()
            return
        self._started = True
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._fail("garbage" if not self._head_done else "truncated", f"not HTTP: {error}")
            return
        if self._excess:
            self._keep_alive = False
            self.close()
        if not self._head_done:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self._fail("garbage", f"the answer's head is over {MAX_HEAD_BYTES} bytes")
                return
        if self._buffered > HIGH_WATER_BYTES and not self._paused and not self._done and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost = str(exc or "closed")
        self._on_lost(self)
        if self._done:
            return
        if self._head_done and not self._framed and exc is None:
            self._done = True  # a body without a length ends with its connection
            self._wake()
        elif self._head_done:
            self._fail("truncated", self._lost)
        elif self._started:
            self._fail("garbage", "closed within the answer's head")
        else:
            self._fail("reset", self._lost)

    # What the parser calls.

    def on_message_begin(self) -> None:
        if self._done:  # in the same bytes as the end of what was asked for: it is none of ours
            self._excess = True
            return
        self.headers = []
        self._framed = False

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._excess:
            return
        name = name.lower()
        self.headers.append((name, value))
        if name == b"content-length" or (name == b"transfer-encoding" and value.lower().endswith(b"chunked")):
            self._framed = True

    def on_headers_complete(self) -> None:
        if self._excess:
            return
        self.status = self._parser.get_status_code()
        if self.status < 200:
            return  # 100 Continue, 103 Early Hints: the answer itself follows
        self._keep_alive = self._parser.should_keep_alive()
        self._head_done = True

    def on_body(self, body: bytes) -> None:
        if self._excess:
            return
        self._chunks.append(body)
        self._buffered += len(body)

    def on_message_complete(self) -> None:
        if self._head_done:
            self._done = True


class ConnectionPool:
    """Idle connections by endpoint, the most recently used first. Endpoints that leave are dropped by `retain`.

    most: how many may be open in all; an idle one makes room for one that is wanted."""

    def __init__(
        self, *, connect_timeout_s: float, idle_s: float, max_idle: int = 256, most: int = sys.maxsize
    ) -> None:
        self._most = most
        self._open: set[Connection] = set()
        self._connect_timeout_s = connect_timeout_s
        self._idle_s = idle_s
        self._max_idle = max_idle
        self._idle: defaultdict[str, deque[Connection]] = defaultdict(deque)

    async def acquire(self, endpoint: Endpoint, *, fresh: bool = False) -> Connection:
        """An idle connection, or with `fresh` always a new one. Raises UpstreamError(connect)."""
        idle = self._idle.get(endpoint.key)
        now = asyncio.get_running_loop().time()
        while idle and not fresh:
            connection = idle.pop()
            if connection.open and now - connection.idle_since < self._idle_s:
                connection.reused = True
                return connection
            connection.close()
        return await self._connect(endpoint)

    async def _connect(self, endpoint: Endpoint) -> Connection:
        loop = asyncio.get_running_loop()
        where = f"{endpoint.host}:{endpoint.port}"
        if len(self._open) >= self._most:
            self._make_room()

        def made() -> Connection:
            return Connection(endpoint, self._open.discard)

        try:
            async with asyncio.timeout(self._connect_timeout_s):
                _, connection = await loop.create_connection(made, endpoint.host, endpoint.port)
        except TimeoutError:
            raise UpstreamError("connect", f"{where} did not answer in {self._connect_timeout_s} s") from None
        except OSError as error:
            reason = "exhausted" if error.errno in OWN_SHORTAGE else "connect"
            raise UpstreamError(reason, f"{where}: {error.strerror or error}") from None
        if connection.open:
            self._open.add(connection)
        return connection

    def _make_room(self) -> None:
        """Close the connection that has been idle longest, if there is one."""
        waiting = [idle for idle in self._idle.values() if idle]
        if waiting:
            min(waiting, key=lambda idle: idle[0].idle_since).popleft().close()

    def release(self, connection: Connection) -> None:
        """Take a connection back after an exchange, to keep or to close."""
        idle = self._idle[connection.endpoint.key]
        if not connection.reusable or len(idle) >= self._max_idle:
            connection.close()
            return
        connection.idle_since = asyncio.get_running_loop().time()
        idle.append(connection)

    def retain(self, endpoints: set[str]) -> None:
        """Close what is idle at endpoints that are not among these."""
        for key in self._idle.keys() - endpoints:
            for connection in self._idle.pop(key):
                connection.close()

    def sweep(self, now: float) -> None:
        """Close what has been idle for too long."""
        for idle in self._idle.values():
            while idle and (not idle[0].open or now - idle[0].idle_since >= self._idle_s):
                idle.popleft().close()

    def close(self) -> None:
        self.retain(set())
