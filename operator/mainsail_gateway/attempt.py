"""One of several tries to answer a request, which may come to nothing before the client has seen anything of it.

An `Attempt` stands between a relay and the client. An answer whose status is a reason to ask somebody else is swallowed
(`dropped` says so). An answer that has to pass a check is kept back until it is whole, and swallowed when it fails; one
that is too large to keep is let through. Everything else passes at once.
"""

from collections.abc import Awaitable, Callable, Collection

from mainsail_gateway.asgi import Headers, Message
from mainsail_gateway.hold import Reply
from mainsail_gateway.schema import Check
from mainsail_gateway.virtual import Event, event_of

MOST_KEPT_BYTES = 4 << 20


def stopping(status: int) -> Event | None:
    """What an engine says that is on its way out."""
    return "Down" if status == 503 else None


class Attempt:
    """A `Reply` for one try."""

    def __init__(
        self, reply: "Reply | Attempt", on: Collection[Event], check: Check | None, headers: Headers,
        *, means: Callable[[int], Event | None] = event_of,
    ) -> None:  # fmt: skip
        """on: what makes the answer one to drop; means: which statuses are that. headers: added to the answer's."""
        self._reply = reply
        self._means = means
        self._on = on
        self._check = check if "SchemaFailure" in on else None
        self._headers = headers
        self._head: Message | None = None
        self._kept: list[bytes] = []
        self._size = 0
        self.dropped: Event | None = None
        self.send: Callable[[Message], Awaitable[None]] = self._take

    async def beat(self, extra: Headers) -> None:
        await self._reply.beat(extra)

    async def _take(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            await self._begin({**message, "headers": [*message["headers"], *self._headers]})
        elif self.dropped is None:
            await self._body(message)

    async def _begin(self, head: Message) -> None:
        event = self._means(head["status"])
        if event is not None and event in self._on:
            self.dropped = event
        elif self._check is not None and head["status"] == 200 and _is_json(head["headers"]):
            self._head = head
        else:
            await self._reply.send(head)

    async def _body(self, message: Message) -> None:
        if self._head is None:
            await self._reply.send(message)
            return
        self._kept.append(message.get("body", b""))
        self._size += len(self._kept[-1])
        whole = not message.get("more_body", False)
        if not whole and self._size <= MOST_KEPT_BYTES:
            return
        body = b"".join(self._kept)
        if whole and self._check is not None and not self._check(body):
            self.dropped = "SchemaFailure"
            return
        head, self._head, self._kept = self._head, None, []
        await self._reply.send(head)
        await self._reply.send({**message, "body": body})


def _is_json(headers: Headers) -> bool:
    return any(name == b"content-type" and value.lower().startswith(b"application/json") for name, value in headers)
