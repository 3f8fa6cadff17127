"""The process: listeners, signals, limits of a connection, and the drain.

SIGTERM: readiness fails; for `drain_delay_s` requests are still taken, and every answer tells its client to close the
connection, so that keep-alive clients move to another gateway; then, as soon as no answer that could not tell so is
just over, the listener closes, running answers finish within `drain_timeout_s`, and the process exits with 0. A second
signal ends it at once.
"""

import asyncio
import contextlib
import logging
import os
import resource
import signal
import socket
import ssl
import sys
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import httpx2
import msgspec
import uvicorn
from lightkube.config.client_adapter import AsyncClient, ConnectionParams
from lightkube.config.kubeconfig import KubeConfig
from lightkube.core.exceptions import ConfigError
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from mainsail_gateway import record
from mainsail_gateway.app import Gateway
from mainsail_gateway.asgi import GONE
from mainsail_gateway.auth import Secret
from mainsail_gateway.crew import Post
from mainsail_gateway.debug import routes
from mainsail_gateway.errors import GatewayError
from mainsail_gateway.health import Debug, HealthServer, checks_of, exposition
from mainsail_gateway.hold import Waker
from mainsail_gateway.keys import KeyWatch
from mainsail_gateway.kv_events import Listener
from mainsail_gateway.routes import Routes
from mainsail_gateway.scrape import Scraper
from mainsail_gateway.settings import Settings
from mainsail_gateway.sharing import Sharing
from mainsail_gateway.watch import Reflector, Timing

DEBUG_S = 5.0
KNOWING_S = 10.0
RESERVED_FILES = 256
"""Files of a process that are no clients' nor their engines': listeners, watches, scrapes, probes, and connections that
are still to be refused. A quarter, where so few are allowed that this would be more."""
WANTED_CONNECTIONS = 10_000
"""With fewer, the log says how to get more."""
CROWDED = 0.9
"""Above this part of the connections, some of clients that ask for nothing are closed."""
ROOMY = 0.75
"""Down to this part, and no further: a client may send its next request just while its connection is closed."""
SETTLED_S = 1.0
"""None is closed that was answered within this time: such clients are the likeliest to ask again at once."""
_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

log = logging.getLogger(__name__)


def notice_death(transport: asyncio.Transport, after_s: float) -> None:
    """A client that vanished sends no reset: without this its stream would run on, at the engine's cost. Probes while
    nothing is sent, and a bound on how long what was sent may stay unconfirmed."""
    sock = transport.get_extra_info("socket")
    if sock is None:
        return
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, max(1, round(after_s / 4)))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, max(1, round(after_s / 4)))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(after_s * 1000))


class LimitedProtocol(HttpToolsProtocol):
    """uvicorn's connection, which bounds neither the size nor the time of a request's head: here it is bounded."""

    max_header_bytes = 64 * 1024
    client_timeout_s = 120.0
    most_connections = sys.maxsize

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        if len(self.connections) > self.most_connections:  # there is no file left even to refuse it
            transport.abort()
        self._gone: Callable[[], None] | None = None
        # Later than the relay itself gives up a client that takes nothing, and says so.
        notice_death(transport, self.client_timeout_s + 10.0)
        self.head_bytes = 0
        self.head_since: float | None = time.monotonic()
        self.closing_since: float | None = None

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._gone is not None:
            self._gone()

    def on_gone(self, told: Callable[[], None] | None) -> None:
        """Whom to tell that the client has left; it may have left before."""
        self._gone = told
        if told is not None and self.transport.is_closing():
            self.loop.call_soon(told)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["extensions"] = {GONE: {"tell": self.on_gone}}
        self.head_since = time.monotonic()

    def on_headers_complete(self) -> None:
        self.head_since = None
        self.head_bytes = 0
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.head_since is None:
            return
        self.head_bytes += len(data)
        if self.head_bytes > self.max_header_bytes and not self.transport.is_closing():
            self.transport.write(b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\n\r\n")
            self.transport.close()

    @property
    def idle_s(self) -> float | None:
        """For how long its client, which has been answered, has asked for nothing; None if it waits for an answer."""
        if self.timeout_keep_alive_task is None:
            return None
        return self.loop.time() - self.timeout_keep_alive_task.when() + self.config.timeout_keep_alive

    def overdue(self, now: float, timeout_s: float) -> bool:
        """Whether the connection has been sending a head, or been closing, for too long."""
        if self.transport.is_closing() and self.closing_since is None:
            self.closing_since = now
        starts = (self.head_since, self.closing_since)
        return any(start is not None and now - start > timeout_s for start in starts)


class Certificate:
    """The TLS certificate's files, read again when they change: new connections get the new one."""

    def __init__(self, settings: Settings) -> None:
        self._files = (settings.tls_cert, settings.tls_key)
        self._seen = self._state()

    def _state(self) -> tuple[tuple[int, int, int], ...]:
        states = [Path(name).stat() for name in self._files if name]
        return tuple((state.st_ino, state.st_mtime_ns, state.st_size) for state in states)

    def refresh(self, context: ssl.SSLContext | None) -> None:
        cert, key = self._files
        if context is None or cert is None:
            return
        try:
            state = self._state()
            if state == self._seen:
                return
            context.load_cert_chain(cert, key)
        except (OSError, ssl.SSLError) as error:
            # Half of a change, or a mistake: the old one stays, and the next second tries again.
            log.warning("the TLS certificate cannot be read again: %s", error)
            return
        self._seen = state
        log.info("the TLS certificate was read again")


class Server(uvicorn.Server):
    """uvicorn's server with a drain before its shutdown, and an exit code of 0 after it."""

    def __init__(self, config: uvicorn.Config, gateway: Gateway) -> None:
        super().__init__(config)
        self._gateway = gateway
        self._drain_since: float | None = None
        self._certificate = Certificate(gateway.settings)
        gateway.num_clients = lambda: len(self.server_state.connections)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        del frame
        if self._drain_since is None:
            log.info("signal %d: draining", sig)
            self._drain_since = time.monotonic()
            self._gateway.health.draining = True
        elif time.monotonic() - self._drain_since > 0.5:
            self.should_exit = True
            self.force_exit = True

    async def on_tick(self, counter: int) -> bool:
        now = time.monotonic()
        if counter % 10 == 0:
            self._sweep(now)
            self._certificate.refresh(self.config.ssl)
        if self._drain_since is not None:
            late_s = now - self._drain_since - self._gateway.settings.drain_delay_s
            if late_s >= 0 and (late_s >= 2 * SETTLED_S or self._are_settled()):
                return True
        return await super().on_tick(counter)

    def _are_settled(self) -> bool:
        """Whether no client that may ask again on its connection was answered just now."""
        return not any(one.idle_s is not None and one.idle_s < SETTLED_S for one in self._clients())

    def _clients(self) -> list[LimitedProtocol]:
        every: list[object] = list(self.server_state.connections)
        return [one for one in every if isinstance(one, LimitedProtocol)]

    def _sweep(self, now: float) -> None:
        connections = self._clients()
        for connection in connections:
            if connection.overdue(now, self._gateway.settings.head_timeout_s):
                connection.transport.abort()
        for place in makes_room([connection.idle_s for connection in connections], self._gateway.most_clients):
            connections[place].transport.close()


def makes_room(idle_s: Sequence[float | None], most: int) -> list[int]:
    """Which connections to close, by their places, when nearly as many are open as may be: those that have asked for
    nothing for longest. idle_s: for how long each has, None where it waits for an answer. most: that may be open."""
    if len(idle_s) <= CROWDED * most:
        return []
    settled = [place for place, idle in enumerate(idle_s) if idle is not None and idle >= SETTLED_S]
    settled.sort(key=lambda place: -(idle_s[place] or 0.0))
    return settled[: len(idle_s) - int(ROOMY * most)]


class _NotOurs(logging.Filter):
    """An answer that is cut off on purpose is no error of the application."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "returned without completing response" not in record.getMessage()


def kubernetes_client(settings: Settings) -> httpx2.AsyncClient:
    """An HTTP client with the API server's address and our credentials. Raises lightkube's ConfigError."""
    config = KubeConfig.from_file(settings.kubeconfig) if settings.kubeconfig else KubeConfig.from_env()
    single = config.get()
    if single is None:
        raise ConfigError("the kubeconfig has no current context: set one or pass --kubeconfig")
    return AsyncClient(single, ConnectionParams(timeout=httpx2.Timeout(10.0)))


@asynccontextmanager
async def picker(gateway: Gateway) -> AsyncGenerator[None]:
    """The endpoint picker, while inside, if one is wanted."""
    settings = gateway.settings
    if not settings.epp_port:
        yield
        return
    try:
        from mainsail_gateway.epp import Picker
    except ImportError as error:
        raise ConfigError(
            f"--epp-port needs an optional part: pip install '.[epp]' in Mainsail's repository ({error})"
        ) from None
    server = Picker(gateway, settings.host, settings.epp_port)
    await server.start()
    try:
        yield
    finally:
        await server.stop(settings.drain_timeout_s)


def own_namespace() -> str:
    """The Pod's namespace; `default` outside of a cluster."""
    try:
        return _NAMESPACE.read_text().strip()
    except OSError:
        return "default"


@asynccontextmanager
async def background(gateway: Gateway, client: httpx2.AsyncClient, timing: Timing) -> AsyncGenerator[None]:
    """The watches and the sweeps, while inside."""
    table = Routes(client, gateway.settings.namespaces, gateway.use, timing=timing)
    waker = Waker(client, gateway.admission.asked_for)
    gateway.wake = waker.woken.set
    parts: list[Routes | Gateway | Waker | KeyWatch | Reflector[Secret] | Scraper | Listener] = [table, gateway, waker]
    parts += gateway.outside.watch(client, timing)
    if gateway.settings.scrape_s:
        scraper = Scraper(gateway.fleet, gateway.settings.scrape_s, gateway.heard)
        gateway.scrape = scraper.wanted.set
        parts.append(scraper)
    if gateway.settings.kv_events:
        parts.append(listener := Listener(gateway.fleet))
        gateway.metrics.registry.register(listener)
    if gateway.keys is not None:
        namespace = gateway.settings.keys_namespace or own_namespace()
        parts.append(KeyWatch(client, namespace, gateway.keys, timing=timing))
    else:
        log.warning("no API keys are asked for: whoever reaches this gateway may use every model (--auth anonymous)")
    tasks = [asyncio.create_task(part.run()) for part in parts]
    for task in tasks:
        task.add_done_callback(_report)
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        gateway.connections.close()
        await gateway.outside.close()
        await client.aclose()


def _report(task: asyncio.Task[Any]) -> None:
    """A background task never ends by itself. If one does, say why at once."""
    if not task.cancelled() and (error := task.exception()) is not None:
        log.critical("a background task ended", exc_info=error)


def configure(gateway: Gateway) -> uvicorn.Config:
    settings = gateway.settings
    LimitedProtocol.max_header_bytes = settings.max_header_bytes
    LimitedProtocol.client_timeout_s = settings.client_timeout_s
    LimitedProtocol.most_connections = gateway.most_clients + reserved(gateway.most_clients * 2) // 2
    logging.getLogger("uvicorn.error").addFilter(_NotOurs())
    return uvicorn.Config(
        gateway,  # pyright: ignore[reportArgumentType]  # our ASGI types are wider than uvicorn's TypedDicts
        host=settings.host,
        port=settings.port,
        loop="uvloop",
        http=LimitedProtocol,
        ws="none",
        lifespan="off",
        interface="asgi3",
        access_log=False,
        log_config=None,
        server_header=False,
        backlog=4096,
        ssl_certfile=settings.tls_cert,
        ssl_keyfile=settings.tls_key,
        timeout_keep_alive=round(settings.keep_alive_s),
        timeout_graceful_shutdown=round(settings.drain_timeout_s),
        proxy_headers=False,
    )


async def serve(settings: Settings, post: Post | None = None) -> None:
    """Run a gateway until it is told to go. post: its place, when it is one of several workers."""
    client = kubernetes_client(settings)
    gateway = Gateway(settings, _traces(settings), most_clients=room(allow_many_files(), settings.workers))
    debug = debugger(gateway, asyncio.get_running_loop())
    address = (settings.host, settings.health_port) if post is None else post.health
    health = HealthServer(address, checks_of(gateway.health), exposition(gateway.metrics.registry), debug)
    health.start()
    try:
        async with (
            background(gateway, client, Timing(relist_s=settings.relist_s)), picker(gateway), beside(gateway, post)
        ):  # fmt: skip
            sockets = None
            if post is not None:
                sockets = [socket.socket(fileno=post.listener)]
                await knowing(gateway)
            await Server(configure(gateway), gateway).serve(sockets)
    finally:
        health.stop()
        gateway.recorder.close()


async def knowing(gateway: Gateway) -> None:
    """Returns when the gateway has something to serve by. Clients wait in the listener's queue meanwhile: a worker that
    takes another's place has them before it is ready. If it takes too long, they are told so."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(KNOWING_S):
            while not (gateway.health.synced and (gateway.keys is None or gateway.keys.synced)):  # noqa: ASYNC110
                await asyncio.sleep(0.02)


@asynccontextmanager
async def beside(gateway: Gateway, post: Post | None) -> AsyncGenerator[None]:
    """What a worker does because there are others: limits of keys together, and no life without the crew."""
    if post is None:
        yield
        return
    loop = asyncio.get_running_loop()
    loop.add_reader(sys.stdin.fileno(), _orphaned, loop)
    tasks: list[asyncio.Task[None]] = []
    if gateway.keys is not None:
        sharing = Sharing(gateway.keys, Path(post.folder), post.index, gateway.settings.workers)
        tasks.append(asyncio.create_task(sharing.run()))
        tasks[0].add_done_callback(_report)
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _orphaned(loop: asyncio.AbstractEventLoop) -> None:
    """The crew's end of standard input is closed: it is gone, and nobody will tell this worker to go."""
    if not os.read(sys.stdin.fileno(), 1):
        loop.remove_reader(sys.stdin.fileno())
        os.kill(os.getpid(), signal.SIGTERM)


def allow_many_files() -> int:
    """A stream has two sockets, and shells allow 1,024 files: as many as this process may have; how many that is."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return most


def reserved(files: int) -> int:
    """Of so many files: those that are kept for other things than clients and their engines."""
    return min(RESERVED_FILES, files // 4)


def room(files: int, workers: int) -> int:
    """How many clients may be connected to this process, one of so many workers: each may have a connection to an
    engine besides its own. Says so in the log."""
    most = max(1, (files - reserved(files)) // 2)
    log.info("up to %d clients at once: %d open files are allowed", most, files)
    if most * workers < WANTED_CONNECTIONS:
        log.warning(
            "only %d open files are allowed to a process, so this gateway takes %d clients at once and refuses others: "
            "raise the hard limit (ulimit -Hn; the container runtime's LimitNOFILE), or start more --workers",
            files,
            most * workers,
        )
    return most


def log_to_stderr(level: str, worker: int | None = None) -> None:
    name = "" if worker is None else f"worker {worker} "
    logging.basicConfig(
        level=level.upper(), format=f"%(asctime)s %(levelname)s {name}%(name)s: %(message)s", stream=sys.stderr
    )
    for library in ("httpx2", "httpcore2"):
        logging.getLogger(library).setLevel(logging.WARNING)


def _traces(settings: Settings) -> "TracerProvider | None":
    if settings.otlp_endpoint is None:
        return None
    try:
        return record.tracing(settings.otlp_endpoint, settings.trace_ratio)
    except ImportError as error:
        message = f"--otlp-endpoint needs an optional part: pip install '.[tracing]' in Mainsail's repository ({error})"
        raise ConfigError(message) from None


def debugger(gateway: Gateway, loop: asyncio.AbstractEventLoop) -> Debug:
    """`/debug/routes` for the health server's threads; the state is read in the event loop, where it changes."""

    async def read(query: str) -> tuple[int, bytes]:
        try:
            return 200, msgspec.json.format(msgspec.json.encode(routes(gateway, query, time.monotonic())))
        except GatewayError as error:
            return error.status, error.body()

    def ask(query: str) -> tuple[int, bytes]:
        try:
            return asyncio.run_coroutine_threadsafe(read(query), loop).result(DEBUG_S)
        except TimeoutError:
            return 503, b'{"error": {"message": "the event loop did not answer in time"}}'

    return ask
