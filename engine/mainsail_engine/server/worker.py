"""A further API process: a child of the leader, which hands it the port and the folder where they meet.

It ends when the leader says so (SIGTERM: what still runs gets an error that says why) or dies (its end of standard
input closes). Probes that arrive here are answered from the board; a drain that is asked for here is the leader's.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from pathlib import Path

import msgspec
import uvloop

from mainsail_engine.child import end_with_parent
from mainsail_engine.collector import settle
from mainsail_engine.config import EngineConfig, ServerConfig
from mainsail_engine.server.api import ApiServer, join_port
from mainsail_engine.server.drain import unfinished
from mainsail_engine.server.health import Verdict

log = logging.getLogger(__name__)


class WorkerStart(msgspec.Struct, frozen=True, kw_only=True):
    """The line of JSON on standard input."""

    engine: EngineConfig
    server: ServerConfig
    """`port` is the one that the leader got."""
    process: int
    folder: str


class Worker(ApiServer):
    def __init__(self, start: WorkerStart) -> None:
        super().__init__(start.engine, start.server, Path(start.folder), process=start.process)
        self._told_to_end = asyncio.Event()

    async def run(self) -> None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self._told_to_end.set)
        starting = asyncio.create_task(self.client.start())
        tokenizer = self.load_tokenizer()
        self.build_serving(await starting, tokenizer)
        http = self.http(look=self._look, drain=_drain_all)
        listener = join_port(self.config.host, self.config.port)
        serve = asyncio.create_task(http.serve(sockets=[listener]))
        lag = asyncio.create_task(self.watch_loop_lag())
        settle()
        self.board.set("serving", 1)
        try:
            await self._told_to_end.wait()
            self.client.fail_all(unfinished())
            http.should_exit = True
            await serve
        finally:
            lag.cancel()
            await self.client.close()
            self.send_traces()

    def _look(self, path: str) -> Verdict | None:
        """The leader's health listener knows more; here the flags decide."""
        if path == "/health/live":
            return Verdict(self.client.is_alive, "alive" if self.client.is_alive else "the core process ended")
        if path not in ("/health", "/health/ready", "/health/startup"):
            return None
        closed = "draining" if self.board.raised("draining") else "asleep" if self.board.is_asleep else ""
        return Verdict(self.client.is_alive and not closed, closed or "ready")


def _drain_all() -> None:
    os.kill(os.getppid(), signal.SIGTERM)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    start = msgspec.json.decode(sys.stdin.buffer.readline(), type=WorkerStart)
    end_with_parent()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(Worker(start).run())


if __name__ == "__main__":
    main()
