"""Answers that notice when the client has gone: server-sent events, and plain JSON that was long in the making.

Pure ASGI: a task watches for the disconnect while another produces. Whichever ends first ends the other, and with it
the generators, whose `finally` aborts the request. (A BaseHTTPMiddleware anywhere would hide the disconnect.)

A chunk of a stream differs from the next in a few words only: `ChunkWriter` serializes what stays the same once.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Mapping
from contextlib import aclosing
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mainsail_engine.errors import RequestError
from mainsail_engine.server.errors import error_body

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"
_encode = msgspec.json.Encoder().encode


def event(data: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + _encode(data) + b"\n\n"


class ChunkWriter:
    """Events of one stream: {**head, "choices": [choice]}, and their most frequent form ready-made.

    opening and closing are the JSON around a choice's text, e.g. '"delta":{"content":' and '},"logprobs":null,…'.
    """

    __slots__ = ("_before", "_closing", "_opening", "_starts")

    def __init__(self, head: dict[str, Any], *, opening: bytes, closing: bytes) -> None:
        self._before = b"data: " + _encode(head)[:-1] + b',"choices":['
        self._opening, self._closing = opening, closing + b"}]}\n\n"
        self._starts: dict[int, bytes] = {}

    def text(self, index: int, text: str) -> bytes:
        """An event with nothing but text."""
        start = self._starts.get(index)
        if start is None:
            start = self._starts[index] = self._before + b'{"index":%d,' % index + self._opening
        return start + _encode(text) + self._closing

    def choice(self, choice: dict[str, Any], **others: Any) -> bytes:
        """An event with any choice, and other fields beside the choices."""
        rest = b"," + _encode(others)[1:] if others else b"}"
        return self._before + _encode(choice) + b"]" + rest + b"\n\n"

    def no_choice(self, **others: Any) -> bytes:
        return self._before + b"]," + _encode(others)[1:] + b"\n\n"


class EventStream(Response):
    """`events` yields ready-made events. An error on the way becomes a last event in OpenAI's error form."""

    def __init__(self, events: AsyncGenerator[bytes, None], headers: Mapping[str, str] | None = None) -> None:
        self.events = events
        self.status_code = 200
        self.background = None
        own = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"}
        self.init_headers({**own, **(headers or {})})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        producing = asyncio.create_task(self._produce(send))
        await _until_gone(producing, receive)

    async def _produce(self, send: Send) -> None:
        async with aclosing(self.events) as events:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            try:
                async for data in events:
                    await send({"type": "http.response.body", "body": data, "more_body": True})
            except RequestError as error:
                last = event(error_body(error)) + DONE
                await send({"type": "http.response.body", "body": last, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _until_gone(producing: asyncio.Task[T], receive: Receive) -> T | None:
    """The task's result, or None when the client went first (the task is cancelled and has ended by then)."""
    watching = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait((producing, watching), return_when=asyncio.FIRST_COMPLETED)
        return producing.result() if producing.done() else None
    finally:
        for task in (producing, watching):
            task.cancel()
        await asyncio.gather(producing, watching, return_exceptions=True)


async def while_connected(request: Request, work: Coroutine[Any, Any, None]) -> bool:
    """Do something before the answer begins. False: the client has gone, and it was left."""

    async def all_of_it() -> bool:
        await work
        return True

    return bool(await _until_gone(asyncio.create_task(all_of_it()), request.receive))


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """Do the work for as long as the client waits for it."""
    response = await _until_gone(asyncio.create_task(work), request.receive)
    return response if response is not None else Response(status_code=499)
