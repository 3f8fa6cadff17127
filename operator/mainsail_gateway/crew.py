"""Several processes behind one port: `--workers N`, for pods with more than one core.

    crew (this module) ── starts, watches, tells to go ──▶ worker 0 … N-1 (worker.py): each a whole gateway
      │ holds every worker's listening socket                 │ health, metrics and debug on a Unix socket
      └ health port: all workers' health and metrics as one ◀─┘ usage of API keys, to one another (sharing.py)

Each worker has a socket of its own on the same address (SO_REUSEPORT), among which the kernel spreads connections by
their hash; no accept lock, no thundering herd. The sockets are made here and stay open here: when a worker dies, the
connections that wait in its queue are served by the one that takes its place. Nobody answers for another: routes,
balance and limits are learned by each worker for itself, as by gateways in pods of their own. What a spec bounds is
divided among them (`Policy.part`); the limits of API keys hold for all of them together.

SIGTERM goes on to all of them, and each drains as a gateway alone does. A worker that dies unasked is started again,
after a pause that grows while it dies early. Workers that lose this process drain too: their standard input ends.
"""

import asyncio
import logging
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

import msgspec

from mainsail_gateway.health import HealthServer
from mainsail_gateway.merge import Merged
from mainsail_gateway.settings import Settings

log = logging.getLogger(__name__)

EARLY_S = 10.0
"""A worker that dies within this time of its start is started again later and later."""
LONGEST_PAUSE_S = 30.0
BACKLOG = 4096


class Post(msgspec.Struct, frozen=True):
    """What a worker is told, as a line of JSON on its standard input."""

    index: int
    folder: str
    """Where all workers' Unix sockets are."""
    listener: int
    """File descriptor of its listening socket."""
    settings: Settings

    @property
    def health(self) -> Path:
        return health_socket(Path(self.folder), self.index)


def health_socket(folder: Path, index: int) -> Path:
    return folder / f"health-{index}"


def listeners(host: str, port: int, count: int) -> list[socket.socket]:
    """So many listening sockets of one address. Raises OSError."""
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    found: list[socket.socket] = []
    for _ in range(count):
        sock = socket.socket(family, kind)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(found[0].getsockname() if found else address)
        found.append(sock)
    for sock in found:  # from here on clients come; all sockets share them
        sock.listen(BACKLOG)
    return found


class Crew:
    """The workers of one pod."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self._settings = settings
        self._folder = folder
        self._listeners = listeners(settings.host, settings.port, settings.workers)
        self._processes: dict[int, asyncio.subprocess.Process] = {}
        self._stopping = False
        self._stopped = asyncio.Event()
        self.merged = Merged({str(index): health_socket(folder, index) for index in range(settings.workers)})

    @property
    def port(self) -> int:
        return int(self._listeners[0].getsockname()[1])

    async def run(self) -> int:
        """Until all have ended, after a signal; the exit code: the first that is not 0."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.signal, number)
        codes = await asyncio.gather(*(self._keep(index) for index in range(self._settings.workers)))
        return next((code for code in codes if code), 0)

    def signal(self, number: signal.Signals) -> None:
        """Tell all workers; from the first signal on none is started again. The listeners are the workers' alone then,
        so that they are closed when these close them."""
        log.info("signal %d: %d workers are told", number, len(self._processes))
        self._stopping = self.merged.health.draining = True
        self._stopped.set()
        for sock in self._listeners:
            sock.close()
        for process in self._processes.values():
            if process.returncode is None:
                process.send_signal(number)

    async def _keep(self, index: int) -> int:
        """Keep one worker running; its last exit code."""
        pause = 0.0
        while not self._stopping:
            began = time.monotonic()
            code = await self._run(index)
            if self._stopping:  # a worker that was not yet up ends by the signal itself
                return 0 if code == -signal.SIGTERM else code
            self.merged.lost(str(index))
            pause = min(LONGEST_PAUSE_S, max(1.0, 2 * pause)) if time.monotonic() - began < EARLY_S else 0.0
            log.critical("worker %d ended with %d; another is started in %.0f s", index, code, pause)
            await self._wait(pause)
        return 0

    async def _wait(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._stopped.wait()
        except TimeoutError:
            return

    async def _run(self, index: int) -> int:
        """One worker, from its start to its end."""
        listener = self._listeners[index].fileno()
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "mainsail_gateway.worker", stdin=asyncio.subprocess.PIPE, pass_fds=(listener,)
        )
        self._processes[index] = process
        if self._stopping:
            process.terminate()
        post = Post(index, str(self._folder), listener, self._settings)
        if process.stdin is not None:  # it stays open: its end tells the worker that this process is gone
            process.stdin.write(msgspec.json.encode(post) + b"\n")
        return await process.wait()


async def lead(settings: Settings) -> int:
    """Run `settings.workers` workers until they are told to go; the exit code. Raises OSError."""
    with tempfile.TemporaryDirectory(prefix="mainsail-") as name:
        crew = Crew(settings, Path(name))
        merged = crew.merged
        health = HealthServer((settings.host, settings.health_port), merged.checks(), merged.metrics, merged.debug)
        health.start()
        try:
            return await crew.run()
        finally:
            health.stop()
