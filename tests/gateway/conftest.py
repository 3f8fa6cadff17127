"""Counterparts for the gateway's tests, all with real sockets on loopback: engines that speak SSE or misbehave on
request, and an API server that lists and watches as a script tells it."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import openai
import pytest
import uvicorn
import uvloop
from tests.ports import free_ports

from mainsail_gateway.app import Gateway
from mainsail_gateway.routes import Endpoint, Service, Table
from mainsail_gateway.server import Server, configure
from mainsail_gateway.settings import Settings

HANG_S = 120.0
"""What ends a wait that would never end: no measurement, however slow the machine."""
openai.DEFAULT_TIMEOUT.connect = HANG_S


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(HANG_S):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


@dataclass
class Seen:
    head: bytes
    body: bytes

    def header(self, name: str) -> str | None:
        for line in self.head.decode("latin-1").split("\r\n")[1:]:
            key, _, value = line.partition(":")
            if key.lower() == name:
                return value.strip()
        return None


class Upstream:
    """A real HTTP server; `behave(seen, reader, writer)` writes the answer, byte by byte if need be."""

    def __init__(self, behave: Callable[..., Awaitable[None]]) -> None:
        self.behave = behave
        self.seen: list[Seen] = []
        self.closed_early = 0
        self.connections = 0
        self.release = asyncio.Event()
        self._tasks: set[asyncio.Task] = set()

    async def start(self, host: str = "127.0.0.1") -> "Upstream":
        self._server = await asyncio.start_server(self._serve, host, 0, limit=1 << 25)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def stop(self) -> None:
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def endpoint(self, name: str = "pod") -> Endpoint:
        return Endpoint(key=f"{name}:{self.port}", host="127.0.0.1", port=self.port, pod=name)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self.connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                seen = Seen(head[:-4], b"")
                seen.body = await reader.readexactly(int(seen.header("content-length") or 0))
                self.seen.append(seen)
                await self.behave(self, seen, reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


SSE_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


async def answer(up: Upstream, seen: Seen, reader, writer: asyncio.StreamWriter) -> None:
    """An engine that does its work: a completion, streamed if asked."""
    try:
        wanted = json.loads(seen.body)
    except ValueError:
        writer.write(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 2\r\n\r\n{}")
        return
    model = wanted["model"]
    if wanted.get("stream"):
        writer.write(SSE_HEAD)
        for word in ("Hello", " world"):
            event = {
                "id": "c1",
                "object": "chat.completion.chunk",
                "created": 1,
                "model": model,
                "choices": [
                    {"index": 0, "delta": {"content": word}, "finish_reason": "stop" if word == " world" else None}
                ],
            }
            writer.write(chunk(b"data: " + json.dumps(event).encode() + b"\n\n"))
            await writer.drain()
        writer.write(chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")
    else:
        body = json.dumps(
            {
                "id": "c1",
                "object": "chat.completion",
                "created": 1,
                "model": model,
                "choices": [
                    {"index": 0, "message": {"role": "assistant", "content": "Hello world"}, "finish_reason": "stop"}
                ],
            }
        ).encode()
        writer.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body) + body
        )
    await writer.drain()


async def hold(up: Upstream, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One event, then silence until released; notes a client that leaves."""
    writer.write(SSE_HEAD + chunk(b"data: first\n\n"))
    await writer.drain()
    gone = asyncio.ensure_future(reader.read(1))
    released = asyncio.ensure_future(up.release.wait())
    await asyncio.wait((gone, released), return_when=asyncio.FIRST_COMPLETED)
    released.cancel()
    if gone.done() and not up.release.is_set():
        up.closed_early += 1
        raise ConnectionResetError
    gone.cancel()
    writer.write(chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")
    await writer.drain()
    raise ConnectionResetError  # its reader was used


def raw(data: bytes, *, cut: bool = True):
    """An upstream that writes these bytes and, with `cut`, closes."""

    async def behave(up: Upstream, seen: Seen, reader, writer: asyncio.StreamWriter) -> None:
        writer.write(data)
        await writer.drain()
        if cut:
            raise ConnectionResetError
        await up.release.wait()

    return behave


@dataclass
class Running:
    gateway: Gateway
    server: Server
    url: str
    port: int
    task: asyncio.Task = field(repr=False)

    def metric(self, name: str, **labels: str) -> float:
        """The sum of the series that have these labels."""
        samples = [x for family in self.gateway.metrics.registry.collect() for x in family.samples if x.name == name]
        return sum(x.value for x in samples if labels.items() <= x.labels.items())


def service(*endpoints: Endpoint, name: str = "m", **more) -> Service:
    values = {
        "namespace": "default",
        "name": name,
        "created": 1700000000,
        "served_names": (name,),
        "max_model_len": None,
        "endpoints": tuple(endpoints),
    }
    return Service(**{**values, **more})


def table(*services: Service) -> Table:
    return Table({n: s for s in services for n in s.served_names}, {s.key: s for s in services})


@asynccontextmanager
async def gateway(*services: Service, traces=None, **settings) -> AsyncIterator[Running]:
    """The real gateway on a real socket, with this routing table."""
    values = {"host": "127.0.0.1", "port": 0, "drain_delay_s": 0.0, "drain_timeout_s": 10.0}
    values["connect_timeout_s"] = HANG_S  # engines, clients and gateway stand still together, where the machine does
    app = Gateway(Settings(**{**values, **settings}), traces)
    app.use(table(*services))
    config: uvicorn.Config = configure(app)
    server = Server(config, app)
    sweeps = asyncio.create_task(app.run())
    task = asyncio.create_task(server._serve())
    await until(lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield Running(app, server, f"http://127.0.0.1:{port}", port, task)
    finally:
        server.should_exit = server.force_exit = True
        await task
        sweeps.cancel()
        app.connections.close()


@pytest.fixture(scope="session")
def event_loop_policy():
    """The loop that the gateway runs on."""
    return uvloop.EventLoopPolicy()


@pytest.fixture
async def kit():
    """Everything above, and an `upstream(behave)` that is stopped at the end."""
    started: list[Upstream] = []

    class Kit:
        answer = staticmethod(answer)
        hold = staticmethod(hold)
        raw = staticmethod(raw)
        chunk = staticmethod(chunk)
        sse_head = SSE_HEAD
        gateway = staticmethod(gateway)
        service = staticmethod(service)
        table = staticmethod(table)
        until = staticmethod(until)
        free_ports = staticmethod(free_ports)

        @staticmethod
        async def upstream(behave=answer) -> Upstream:
            started.append(await Upstream(behave).start())
            return started[-1]

    yield Kit
    for upstream in started:
        await upstream.stop()


@pytest.fixture(scope="session")
def small_engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Endpoint]]:
    """Two real engines of a tiny model with pools of 4800 tokens, that tell what they have cached."""
    from tests.engine.server.conftest import Engine, start
    from tests.engine.tiny import make_tiny_model

    model = make_tiny_model(tmp_path_factory.mktemp("tiny") / "model")
    engines: list[Engine] = []
    ends: list[Endpoint] = []
    try:
        for name in ("one", "two"):
            live, replay = free_ports()
            told = json.dumps({"endpoint": f"tcp://127.0.0.1:{live}", "replay_endpoint": f"tcp://127.0.0.1:{replay}"})
            folder = tmp_path_factory.mktemp(name)
            engines.append(start(folder, model, "--kv-cache-blocks", "300", "--kv-events-config", told))
            port = urlsplit(engines[-1].url).port or 0
            ends.append(Endpoint(name, "127.0.0.1", port, name, kv_events=(live, replay)))
        yield ends
    finally:
        for engine in engines:
            engine.close()
