"""Answers that notice when the client has gone: server-sent events, and plain JSON that was long in the making.

Pure ASGI: a task watches for the disconnect while another produces. Whichever ends first ends the other, and with it
the generators, whose `finally` aborts the request. (A BaseHTTPMiddleware anywhere would hide the disconnect.)
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine
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


def event(data: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + msgspec.json.encode(data) + b"\n\n"


class EventStream(Response):
    """`events` yields ready-made events. An error on the way becomes a last event in OpenAI's error form."""

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        self.events = events
        self.status_code = 200
        self.background = None
        self.init_headers({"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        producing = asyncio.create_task(self._produce(send))
        await _until_gone(producing, receive)

    async def _produce(self, send: Send) -> None:
        async with aclosing(_with_error(self.events)) as events:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for data in events:
                await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _with_error(events: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    async with aclosing(events):
        try:
            async for data in events:
                yield data
        except RequestError as error:
            yield event(error_body(error))
            yield DONE


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


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """Do the work for as long as the client waits for it."""
    response = await _until_gone(asyncio.create_task(work), request.receive)
    return response if response is not None else Response(status_code=499)
