"""Leader election against a small API server that keeps one Lease, with real clocks of a second."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx2
import pytest

from mainsail_operator.lease import MARGIN, Lease


class Api:
    """GET, POST and PUT of one object, with the conflict that a stale resourceVersion gets."""

    def __init__(self) -> None:
        self.lease: dict | None = None
        self.down = False
        self.lock = threading.Lock()
        api = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._answer(*((200, api.lease) if api.lease else (404, {"message": "not found"})))

            def do_POST(self) -> None:
                with api.lock:
                    self._answer(*api.write(self._body(), create=True))

            def do_PUT(self) -> None:
                with api.lock:
                    self._answer(*api.write(self._body(), create=False))

            def _body(self) -> dict:
                return json.loads(self.rfile.read(int(self.headers["content-length"])))

            def _answer(self, status: int, body: dict) -> None:
                data = json.dumps(body).encode()
                self.send_response(503 if api.down else status)
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: object) -> None:
                """Quiet."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def write(self, body: dict, *, create: bool) -> tuple[int, dict]:
        if self.down:
            return 503, {}
        if create == (self.lease is not None):
            return 409, {}
        version = self.lease["metadata"]["resourceVersion"] if self.lease else "0"
        if not create and body["metadata"].get("resourceVersion") != version:
            return 409, {}
        body["metadata"]["resourceVersion"] = str(int(version) + 1)
        self.lease = body
        return 200, body

    @property
    def holder(self) -> str:
        return self.lease["spec"]["holderIdentity"] if self.lease else ""


@pytest.fixture
def api() -> Iterator[Api]:
    found = Api()
    yield found
    found.server.shutdown()
    found.server.server_close()


@contextlib.asynccontextmanager
async def contender(api: Api, name: str):
    async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{api.server.server_port}", trust_env=False) as client:
        lease = Lease(client, "ns", name, duration_s=1)
        task = asyncio.create_task(lease.run())
        try:
            yield lease, task
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


async def until(condition) -> None:
    async with asyncio.timeout(120):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def never() -> None:
    """A round that does not end."""
    await asyncio.Event().wait()


def at_once(one: Lease, other: Lease) -> bool:
    """Whether both may write at one and the same moment."""
    now = time.monotonic()
    return now < one._until and now < other._until


async def test_one_leads_and_a_release_hands_over(api: Api) -> None:
    async with contender(api, "b") as (second, _):
        async with contender(api, "a") as (first, _):
            await until(lambda: first.holds() or second.holds())
            for _ in range(100):
                assert not at_once(first, second)
                await asyncio.sleep(0.01)
            leader = api.holder
        assert leader in ("a", "b")
        await until(lambda: second.holds() and api.holder == "b")


async def test_one_that_is_stopped_may_not_write_before_the_other_leads(api: Api) -> None:
    """The holder's loop stands still, as under SIGSTOP: its right ends by its own clock, before the other's begins."""
    async with contender(api, "a") as (first, _):
        await until(first.holds)
        async with contender(api, "b") as (second, _):
            await asyncio.sleep(0.3)
            first._round = never
            await until(second.holds)
            began = second._until - second._duration_s * (1 - MARGIN)
            assert began >= first._until, "a gap, never an overlap"
            assert not first.holds()
            assert api.holder == "b"


async def test_without_the_api_server_the_right_ends(api: Api) -> None:
    async with contender(api, "a") as (first, _):
        await until(first.holds)
        api.down = True
        await until(lambda: not first.holds())
        await until(lambda: not first.acquired.is_set())
        api.down = False
        await until(first.holds)
