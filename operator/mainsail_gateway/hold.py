"""Waiting for a replica: what a client hears meanwhile, and how a service at zero is woken.

Held requests lie in the service's queue (shed.py), in order, bounded in number and time; here is what goes out because
of them. A client of a stream gets the head of its answer and then a comment every few seconds (`: waiting`, which
clients of server-sent events ignore), so that neither it nor a proxy in between gives up. From then on the answer's
status is 200, and what goes wrong comes as an error event, as for any stream that has begun.

The first held request, and every `WAKE_EVERY_S` while any is held, asks the operator for a replica: the annotation
`mainsail.dev/wake` of the InferenceService gets the present time. It is a signal, not state: the operator scales by how
recent it is, and a lost one is repeated.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Mapping
from datetime import UTC, datetime
from typing import Literal, TypeVar

import httpx2
import msgspec

from mainsail_gateway.asgi import Headers, Message, Receive, Send
from mainsail_gateway.relay import ClientGone
from mainsail_gateway.watch import Key

log = logging.getLogger(__name__)

BEAT_S = 5.0
WAKE_EVERY_S = 5.0
WAKE_ANNOTATION = "mainsail.dev/wake"
_SSE_HEAD: Headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
_COMMENT = b": waiting\n\n"
_MOST_ERROR_BYTES = 1 << 20


HoldReason = Literal["queue_full", "deadline"]
"""Why a turn is refused instead of being held."""
Result = TypeVar("Result")


async def until(future: asyncio.Future[Result], receive: Receive, beat: Callable[[], Awaitable[None]] | None) -> Result:
    """The future's result. beat: tells the client meanwhile that it waits. Raises ClientGone when it leaves."""
    left = asyncio.ensure_future(_left(receive))
    try:
        while not future.done():
            await asyncio.wait((future, left), timeout=BEAT_S, return_when=asyncio.FIRST_COMPLETED)
            if left.done() and not future.done():
                raise ClientGone
            if beat is not None and not future.done():
                await beat()
        return future.result()
    finally:
        left.cancel()


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Reply:
    """Where an answer goes: straight to the client, or behind heartbeats that went out already."""

    def __init__(self, send: Send) -> None:
        self.send: Send = send
        self._client = send
        self._begun = False
        self._status = 200
        self._error: list[bytes] | None = None

    async def beat(self, extra: Headers) -> None:
        """A sign of life to the client of a stream."""
        if not self._begun:
            self._begun = True
            self.send = self._after_beats
            await self._client({"type": "http.response.start", "status": 200, "headers": _SSE_HEAD + extra})
        await self._client({"type": "http.response.body", "body": _COMMENT, "more_body": True})

    async def _after_beats(self, message: Message) -> None:
        """The answer itself: its head is not sent again; anything but a stream of events is an error event."""
        if message["type"] == "http.response.start":
            headers: Headers = message["headers"]
            kind = next((value for name, value in headers if name == b"content-type"), b"")
            self._error = None if message["status"] == 200 and kind.startswith(b"text/event-stream") else []
            return
        if self._error is None:
            await self._client(message)
            return
        if sum(map(len, self._error)) < _MOST_ERROR_BYTES:
            self._error.append(message["body"])
        if not message.get("more_body", False):
            # An event's data must be one line: JSON from anywhere, made anew without line breaks.
            event = b"data: " + _one_line(b"".join(self._error)) + b"\n\n"
            await self._client({"type": "http.response.body", "body": event, "more_body": False})


def _one_line(body: bytes) -> bytes:
    try:
        return msgspec.json.encode(msgspec.json.decode(body))
    except msgspec.DecodeError:
        return msgspec.json.encode({"error": {"message": body.decode(errors="replace"), "type": "server_error"}})


def due(wanted: Collection[Key], last: Mapping[Key, float], now: float) -> list[Key]:
    """The services to wake now, of those whose replicas are wanted: the last wake-up is a while ago. Pure."""
    return [key for key in sorted(wanted) if now - last.get(key, -WAKE_EVERY_S) >= WAKE_EVERY_S]


def annotation(at: datetime) -> bytes:
    """The merge patch that asks for a replica."""
    stamp = at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return msgspec.json.encode({"metadata": {"annotations": {WAKE_ANNOTATION: stamp}}})


class Waker:
    """Asks the operator for replicas while requests are held."""

    def __init__(self, client: httpx2.AsyncClient, wanted: Callable[[], Collection[Key]]) -> None:
        self._client = client
        self._wanted = wanted
        self._last: dict[Key, float] = {}
        self.woken = asyncio.Event()
        """Set when a request begins to wait for a replica."""

    async def run(self) -> None:
        """Until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            now = loop.time()
            wanted = self._wanted()
            self._last = {key: at for key, at in self._last.items() if now - at < WAKE_EVERY_S}
            for key in due(wanted, self._last, now):
                self._last[key] = now
                await self._wake(key)
            self.woken.clear()
            timeout = WAKE_EVERY_S / 5 if wanted else None
            try:
                async with asyncio.timeout(timeout):
                    await self.woken.wait()
            except TimeoutError:
                continue

    async def _wake(self, key: Key) -> None:
        namespace, name = key
        path = f"/apis/mainsail.dev/v1alpha1/namespaces/{namespace}/inferenceservices/{name}"
        headers = {"content-type": "application/merge-patch+json"}
        try:
            response = await self._client.patch(path, content=annotation(datetime.now(UTC)), headers=headers)
        except (httpx2.HTTPError, OSError) as error:
            log.warning("%s/%s: cannot ask for a replica: %s", namespace, name, str(error) or type(error).__name__)
            return
        level = logging.INFO if response.status_code < 300 else logging.WARNING
        log.log(level, "%s/%s: asked for a replica: HTTP %d", namespace, name, response.status_code)
